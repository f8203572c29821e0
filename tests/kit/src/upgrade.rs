//! A daemon that may be another process by now: taken over again and again. For tests of upgrades in place.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::{Value, json};

use crate::control::Client;
pub use crate::wait::wait_until;

/// Bytes of the image.
pub const SIZE: usize = 4 << 20;

/// An image with a daemon, whichever process that is.
pub struct Disk {
    pub dir: tempfile::TempDir,
    /// The first one.
    pub child: Child,
}

impl Disk {
    pub fn serve(more: &[&str]) -> Disk {
        let dir = crate::programs::disk_dir();
        fs::write(dir.path().join("disk.img"), vec![0; SIZE]).unwrap();
        let image = dir.path().join("disk.img").into_os_string().into_string().unwrap();
        Disk::serve_in(dir, &[&["--blk-file", &image], more].concat())
    }

    pub fn serve_in(dir: tempfile::TempDir, more: &[&str]) -> Disk {
        // A socket's path is short; its process's directory need not be the test's.
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new(crate::programs::virtioblkd());
        command.args(["--socket-path", "vhost", "--control-path", "control", "--pid-file", "pid"]).args(more);
        let child = command.current_dir(&dir).stdin(Stdio::null()).stderr(log).spawn().unwrap();
        let disk = Disk { dir, child };
        wait_until("the daemon serves", || disk.log().contains("serving on"));
        disk
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn image(&self) -> Vec<u8> {
        fs::read(self.path("disk.img")).unwrap()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// Waits until the log contains all of `parts`, and returns it.
    pub fn wait_for_log(&self, parts: &[&str]) -> String {
        crate::log::wait_for(|| self.log(), parts)
    }

    /// Who serves, by the pid file.
    pub fn pid(&self) -> Pid {
        let text = fs::read_to_string(self.path("pid")).unwrap();
        Pid::from_raw(text.trim().parse().unwrap()).unwrap()
    }

    pub fn ctl(&self, arguments: &[&str]) -> Output {
        let ctl = crate::programs::virtioblkctl();
        Command::new(ctl).current_dir(&self.dir).args(["--control", "control"]).args(arguments).output().unwrap()
    }

    pub fn ctl_ok(&self, arguments: &[&str]) -> String {
        let output = self.ctl(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}\n{}", self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn status(&self) -> Value {
        serde_json::from_str(&self.ctl_ok(&["status", "--json"])).unwrap()
    }

    /// Another process serves then.
    pub fn upgrade(&self, options: &[&str]) -> Value {
        let before = self.pid();
        let figures = self.ctl_ok(&[&["upgrade", "--json", "--"], options].concat());
        let figures: Value = serde_json::from_str(&figures).unwrap();
        assert_eq!(figures["from-pid"], json!(before.as_raw_nonzero().get()));
        assert_ne!(self.pid(), before);
        let status = self.status();
        assert_eq!(status["daemon"]["pid"], json!(self.pid().as_raw_nonzero().get()));
        assert_eq!(status["daemon"]["took-over"], figures);
        figures
    }

    /// The same process serves on; what the operator reads.
    pub fn refuses(&self, arguments: &[&str]) -> String {
        let before = self.pid();
        let output = self.ctl(&[&["upgrade"], arguments].concat());
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert_eq!(self.pid(), before);
        assert_eq!(self.status()["daemon"]["pid"], json!(before.as_raw_nonzero().get()));
        String::from_utf8(output.stderr).unwrap()
    }

    pub fn client(&self) -> Client {
        let stream = UnixStream::connect(self.path("control")).unwrap();
        Client::negotiated(stream)
    }

    /// Ends in order; nothing is left behind.
    pub fn end(self) {
        let pid = self.pid();
        self.ctl_ok(&["quit"]);
        wait_until("the daemon ends", || !lives(pid));
        for name in ["vhost", "control", "pid"] {
            assert!(!self.path(name).exists(), "{name} is left behind:\n{}", self.log());
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Whoever serves, if anybody does.
        if let Ok(text) = fs::read_to_string(self.path("pid"))
            && let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw)
        {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- virtioblkd said:\n{}", self.log());
        }
    }
}

/// A zombie is dead: the first daemon is our child.
pub fn lives(pid: Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap_or_default();
    test_kill_process(pid).is_ok() && !status.contains("State:\tZ")
}

pub fn contains(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
}

/// A new daemon's side of a hand-over, spoken by a test (`src/upgrade/channel.rs`: two lengths, then JSON).
pub struct NewDaemon {
    pub stream: UnixStream,
}

impl NewDaemon {
    /// Asks the daemon to hand over; nothing has been said on the connection yet.
    pub fn connect(disk: &Disk) -> NewDaemon {
        let mut client = disk.client();
        assert_eq!(client.ask("hand-over", json!({"version": 1})), Ok(json!({})));
        NewDaemon { stream: client.reader.into_inner() }
    }

    /// Sends a message that announces so many descriptors.
    pub fn say(&mut self, message: &Value, descriptors: u32) {
        self.try_say(message, descriptors).unwrap();
    }

    /// The same to a daemon that may have given up and closed the connection. What it sent before can still be heard.
    pub fn try_say(&mut self, message: &Value, descriptors: u32) -> io::Result<()> {
        let text = message.to_string();
        let mut bytes = (text.len() as u32).to_le_bytes().to_vec();
        bytes.extend(descriptors.to_le_bytes());
        bytes.extend(text.into_bytes());
        self.stream.write_all(&bytes)
    }

    /// The next message. The descriptors that come with it are lost.
    pub fn hear(&mut self) -> Value {
        let mut header = [0; 8];
        self.stream.read_exact(&mut header).unwrap();
        let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()) as usize;
        let mut text = vec![0; number(0)];
        self.stream.read_exact(&mut text).unwrap();
        self.stream.read_exact(&mut vec![0; number(4).div_ceil(128)]).unwrap();
        serde_json::from_slice(&text).unwrap()
    }
}
