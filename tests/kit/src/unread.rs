//! Outputs that somebody has stopped reading: a full pipe, a full socket, a terminal after Ctrl-S.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Action, tcflow};

/// What fills an output, to be told from what was written to it.
const FILLING: u8 = b'~';

pub struct Unread {
    pub name: &'static str,
    writer: OwnedFd,
    reader: File,
}

impl Unread {
    /// One of each kind.
    pub fn all() -> [Unread; 3] {
        [Unread::pipe(), Unread::socket(), Unread::terminal()]
    }

    /// A full pipe.
    pub fn pipe() -> Unread {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        fill(&writer);
        Unread { name: "a full pipe", writer, reader: reader.into() }
    }

    /// A full socket, as journald gives one to a service.
    pub fn socket() -> Unread {
        let (reader, writer) = UnixStream::pair().unwrap();
        let writer = OwnedFd::from(writer);
        fill(&writer);
        Unread { name: "a full socket", writer, reader: OwnedFd::from(reader).into() }
    }

    /// A terminal that was stopped.
    pub fn terminal() -> Unread {
        let control = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&control).unwrap();
        unlockpt(&control).unwrap();
        let path = ptsname(&control, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let writer = rustix::fs::open(path.as_c_str(), flags, rustix::fs::Mode::empty()).unwrap();
        tcflow(&writer, Action::OOff).unwrap();
        Unread { name: "a stopped terminal", writer, reader: control.into() }
    }

    /// For a program.
    pub fn output(&self) -> Stdio {
        self.writer.try_clone().unwrap().into()
    }

    /// The program shares the open file description with others: none of them may find it non-blocking.
    pub fn is_still_blocking(&self) -> bool {
        !fcntl_getfl(&self.writer).unwrap().contains(OFlags::NONBLOCK)
    }

    /// Reads all that was written, now and later, until the last writer is gone.
    pub fn read(self) -> String {
        let Unread { name, writer, mut reader } = self;
        if name == "a stopped terminal" {
            tcflow(&writer, Action::OOn).unwrap();
        }
        drop(writer);
        let mut bytes = Vec::new();
        match reader.read_to_end(&mut bytes) {
            Ok(_) => {}
            // A terminal whose last writer is gone says EIO.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {}
            Err(error) => panic!("{name}: {error}"),
        }
        bytes.retain(|byte| *byte != FILLING);
        String::from_utf8(bytes).unwrap()
    }
}

/// Writes until nothing more fits, byte by byte at the end.
fn fill(writer: &OwnedFd) {
    let flags = fcntl_getfl(writer).unwrap();
    fcntl_setfl(writer, flags | OFlags::NONBLOCK).unwrap();
    for size in [4096, 1] {
        loop {
            match rustix::io::write(writer.as_fd(), &vec![FILLING; size]) {
                Ok(_) => {}
                Err(errno) if errno.kind() == ErrorKind::WouldBlock => break,
                Err(errno) => panic!("{errno}"),
            }
        }
    }
    fcntl_setfl(writer, flags).unwrap();
}
