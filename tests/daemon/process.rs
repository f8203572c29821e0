//! The real daemon as a process whose log is read line by line, in a directory of its own.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// How long anything may take on a loaded machine before the test gives up.
pub(super) const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) struct Daemon {
    pub(super) child: Child,
    pub(super) log: Receiver<String>,
    pub(super) seen: Vec<String>,
}

impl Daemon {
    /// Starts the program; it may fail.
    pub(super) fn start(args: &[&str]) -> Self {
        Self::spawn(Command::new(env!("CARGO_BIN_EXE_virtioblkd")).args(args))
    }

    /// Starts the program and waits until it serves.
    pub(super) fn serving(args: &[&str]) -> Self {
        let mut daemon = Self::start(args);
        daemon.wait_for("serving on");
        daemon
    }

    pub(super) fn spawn(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("the program starts");
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        let (sender, log) = channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Daemon { child, log, seen: Vec::new() }
    }

    /// Reads the log up to a line with this text.
    pub(super) fn wait_for(&mut self, text: &str) -> String {
        loop {
            match self.log.recv_timeout(WAIT_TIMEOUT) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no '{text}' came in the log: {:#?}", self.seen),
                Err(RecvTimeoutError::Disconnected) => panic!("it ended before '{text}': {:#?}", self.seen),
            }
        }
    }

    pub(super) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    /// Waits for the end; the status and the whole log.
    pub(super) fn ended(mut self) -> (ExitStatus, String) {
        loop {
            match self.log.recv_timeout(WAIT_TIMEOUT) {
                Ok(line) => self.seen.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("it does not end: {:#?}", self.seen),
            }
        }
        (self.child.wait().expect("a child of ours"), self.seen.join("\n"))
    }

    pub(super) fn ends_well(self) -> String {
        let (status, log) = self.ended();
        assert_eq!(status.code(), Some(0), "{log}");
        log
    }

    /// Ends with status 1 and says all of this.
    pub(super) fn fails(self, parts: &[&str]) {
        let (status, log) = self.ended();
        assert_eq!(status.code(), Some(1), "{log}");
        for part in parts {
            assert!(log.contains(part), "'{part}' is missing in: {log}");
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Ended already, in most tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory of the test's own.
pub(super) struct Place(pub(super) tempfile::TempDir);

impl Place {
    pub(super) fn new() -> Self {
        Place(tempfile::tempdir().expect("a temporary directory"))
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `--option=PATH` of this name.
    pub(super) fn arg(&self, option: &str, name: &str) -> String {
        format!("--{option}={}", self.path(name).display())
    }
}

pub(super) fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("somebody listens");
    stream.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a timeout");
    stream
}

/// Waits for the other side's end.
pub(super) fn closed_by_peer(mut stream: &UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(length) => length == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

pub(super) fn still_open(mut stream: &UnixStream) -> bool {
    stream.set_nonblocking(true).expect("ours");
    let open = stream.read(&mut [0]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
    stream.set_nonblocking(false).expect("ours");
    open
}

pub(super) const NULL: &str = "--backend=null";
