//! Starts the servers, and measures their processor time.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::case::Case;

pub enum Server {
    /// virtioblkd with these additional options.
    Virtioblkd(String),
    /// qemu-storage-daemon with this `aio=`, and an iothread.
    Qsd(&'static str),
    /// Another server: its command line with `{socket}`, `{image}` and `{direct}`.
    Other(String),
}

/// A server that is started for one measurement.
pub struct Running {
    child: Child,
    pub socket: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        // This fails if the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The processor time that all threads of the server have used so far, in seconds, by the scheduler's count.
    pub fn cpu_seconds(&self) -> f64 {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("a running server");
        let nanoseconds = |thread: std::io::Result<std::fs::DirEntry>| {
            let text = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<f64>().ok()
        };
        // A thread that ended meanwhile is not counted.
        threads.filter_map(nanoseconds).sum::<f64>() / 1e9
    }
}

pub fn require_qsd() {
    if Command::new("qemu-storage-daemon").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!(
            "qemu-storage-daemon is not installed: on Debian, apt-get install qemu-utils (or qemu-system-common)"
        );
        std::process::exit(1);
    }
}

pub fn start(server: &Server, image: &Path, case: &Case, dir: &Path) -> Running {
    let socket = dir.join(format!("virtioblkd-bench-{}.sock", std::process::id()));
    // A killed run may have left the socket.
    let _ = std::fs::remove_file(&socket);
    let direct = if case.direct { "on" } else { "off" };
    let mut command = match server {
        Server::Virtioblkd(more) => {
            let cache = if case.direct { "none" } else { "writeback" };
            let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
            command.arg("--socket-path").arg(&socket).arg("--blk-file").arg(image).args(["--cache", cache]);
            command.args(["--log-level", "error"]).args(more.split_whitespace());
            command
        }
        Server::Qsd(aio) => {
            let file = format!(
                "driver=file,node-name=f,filename={},aio={aio},cache.direct={direct},locking=off",
                image.display()
            );
            let export = format!(
                "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on,num-queues={},iothread=io",
                socket.display(),
                case.queues
            );
            let mut command = Command::new("qemu-storage-daemon");
            command.args(["--object", "iothread,id=io", "--blockdev", &file, "--export", &export]);
            command
        }
        Server::Other(line) => {
            let line = line
                .replace("{socket}", &socket.display().to_string())
                .replace("{image}", &image.display().to_string())
                .replace("{direct}", direct);
            let mut words = line.split_whitespace();
            let mut command = Command::new(words.next().expect("a program"));
            command.args(words);
            command
        }
    };
    let child = command.stdout(Stdio::null()).spawn().expect("the server");
    Running { child, socket }
}
