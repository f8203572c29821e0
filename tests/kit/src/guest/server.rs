//! A running `virtioblkd` and its operator's command.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use virtioblkd::engine::cache::CacheMode;

use super::{Qmp, mortal, output, wait_until};

/// One disk's server, killed when dropped, whichever process it is by then.
pub struct Server {
    child: Child,
    // Its own directory: a socket's path must be short, and the build's may be long. Kept over a restart.
    dir: Arc<tempfile::TempDir>,
}

impl Server {
    /// Starts a server for `image` and waits until it serves.
    pub fn start(image: &Path, mode: CacheMode, more: &[&str]) -> Server {
        Server::start_as(|socket, control| virtioblkd(socket, control, image, mode, more)).once_serving()
    }

    /// Starts a server by another command, made from the two sockets' paths (vhost-user and control), and waits until it listens.
    pub fn start_as(command: impl FnOnce(&Path, &Path) -> Command) -> Server {
        let dir = tempfile::tempdir().expect("a directory for the sockets");
        let command = command(&dir.path().join("vhost"), &dir.path().join("control"));
        Server::start_in(Arc::new(dir), command)
    }

    /// Ends the server in order and starts another one on the same sockets, while the front-end waits.
    pub fn restart(self, image: &Path, mode: CacheMode, more: &[&str]) -> Server {
        self.restart_after(image, mode, more, || ())
    }

    /// The same; `meanwhile` is done while no server runs.
    pub fn restart_after(self, image: &Path, mode: CacheMode, more: &[&str], meanwhile: impl FnOnce()) -> Server {
        let dir = self.dir.clone();
        let (status, log) = self.terminate();
        assert!(status.success(), "{status}\n{log}");
        meanwhile();
        let command = virtioblkd(&dir.path().join("vhost"), &dir.path().join("control"), image, mode, more);
        Server::start_in(dir, command).once_serving()
    }

    /// Kills the server (SIGKILL) and starts another one on the same sockets, while the front-end waits.
    pub fn kill_and_start(self, image: &Path, mode: CacheMode, more: &[&str]) -> Server {
        self.kill_and_start_after(image, mode, more, || ())
    }

    /// The same; `meanwhile` is done while no server runs.
    pub fn kill_and_start_after(
        self,
        image: &Path,
        mode: CacheMode,
        more: &[&str],
        meanwhile: impl FnOnce(),
    ) -> Server {
        let dir = self.dir.clone();
        // Which kills it.
        drop(self);
        meanwhile();
        let command = virtioblkd(&dir.path().join("vhost"), &dir.path().join("control"), image, mode, more);
        Server::start_in(dir, command).once_serving()
    }

    /// Waits until virtioblkd has logged that it serves, and so all that it logs at its start.
    pub fn once_serving(self) -> Server {
        self.wait_for_log(&["serving on"]);
        self
    }

    fn start_in(dir: Arc<tempfile::TempDir>, mut command: Command) -> Server {
        let log = File::create(dir.path().join("log")).expect("a log");
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second log handle")).stderr(log);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut server = Server { child, dir };
        let socket = server.socket();
        wait_until("virtioblkd listens", || {
            let ended = server.child.try_wait().expect("our own child");
            assert!(ended.is_none(), "virtioblkd ended before it listened: {ended:?}");
            listens(&socket)
        });
        server
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("vhost")
    }

    /// The quiesce socket.
    pub fn control(&self) -> PathBuf {
        self.dir.path().join("control")
    }

    /// What the server said so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_else(|error| format!("no log: {error}"))
    }

    /// Waits until the log contains all of `parts`, and returns it.
    pub fn wait_for_log(&self, parts: &[&str]) -> String {
        crate::log::wait_for(|| self.log(), parts)
    }

    /// The server's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `query-status`, over a connection of its own.
    pub fn status(&self) -> Value {
        Qmp::connect(&self.control()).execute("query-status", json!({}))
    }

    /// A figure of the sums over all rings, such as `syncs`.
    pub fn total(&self, figure: &str) -> u64 {
        let status = self.status();
        status["total"][figure].as_u64().unwrap_or_else(|| panic!("no total.{figure} in {status}"))
    }

    /// Runs `virtioblkctl` on this disk.
    pub fn ctl(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(program("virtioblkctl"));
        output(command.arg("--control").arg(self.control()).args(arguments))
    }

    /// Runs `virtioblkctl` on this disk; panics if it fails. Returns what it printed.
    pub fn ctl_ok(&self, arguments: &[&str]) -> String {
        let output = self.ctl(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "virtioblkctl {arguments:?}: {}\n{stderr}", output.status);
        String::from_utf8(output.stdout).expect("text")
    }

    /// Has another process take over, with these options in place of the old ones. Milliseconds that the guest paused.
    pub fn upgrade(&self, options: &[&str]) -> f64 {
        let figures = self.ctl_ok(&[&["upgrade", "--json", "--"], options].concat());
        let figures: Value = serde_json::from_str(&figures).expect("figures");
        figures["pause-us"].as_u64().expect("a number") as f64 / 1000.0
    }

    /// Ends the server by `virtioblkctl quit`, whichever process it is by now.
    pub fn quit(self) {
        self.ctl_ok(&["quit"]);
        wait_until("virtioblkd ends", || self.processes().is_empty());
    }

    /// Kills whoever serves, and returns when nobody does.
    fn kill(&mut self) {
        // Each fails only where the process is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
        wait_until("the killed virtioblkd is dead", || {
            let left = self.processes();
            for pid in &left {
                let _ = kill_process(*pid, Signal::KILL);
            }
            left.is_empty()
        });
    }

    /// Who serves on our socket, or is about to: after an upgrade that is no child of ours. The dead have no command line.
    fn processes(&self) -> Vec<Pid> {
        let socket = self.socket();
        let is_ours = |pid: &Pid| {
            let words = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
            words.split(|byte| *byte == 0).any(|word| word == socket.as_os_str().as_encoded_bytes())
        };
        let names = fs::read_dir("/proc").expect("/proc is mounted").map(|entry| entry.expect("an entry").file_name());
        let pids = names.filter_map(|name| name.to_str()?.parse().ok().and_then(Pid::from_raw));
        pids.filter(is_ours).collect()
    }

    /// Ends the server by SIGTERM and waits for it.
    pub fn terminate(mut self) -> (ExitStatus, String) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::TERM).expect("our own child");
        let mut status = None;
        wait_until("virtioblkd ends after SIGTERM", || {
            status = self.child.try_wait().expect("our own child");
            status.is_some()
        });
        let log = self.log();
        (status.expect("ended"), log)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- virtioblkd said:\n{}", self.log());
        }
    }
}

fn virtioblkd(socket: &Path, control: &Path, image: &Path, mode: CacheMode, more: &[&str]) -> Command {
    let mut command = mortal(program("virtioblkd"));
    command.arg("--socket-path").arg(socket).arg("--control-path").arg(control);
    command.arg("--blk-file").arg(image).args(["--cache", mode.name()]).args(more);
    // A device's neighbours are no copies.
    if image.is_file() {
        command.arg("--copy-dir").arg(image.parent().expect("an absolute path"));
    }
    command
}

/// `virtioblkd` or `virtioblkctl`: the one just built, or an installed one where VIRTIOBLKD_BIN_DIR says so.
pub fn program(name: &str) -> PathBuf {
    match std::env::var_os("VIRTIOBLKD_BIN_DIR") {
        Some(dir) => Path::new(&dir).join(name),
        None => crate::programs::virtioblkd().with_file_name(name),
    }
}

/// Whether somebody listens on this socket. Connecting would count as a front-end.
pub fn listens(socket: &Path) -> bool {
    const SO_ACCEPTCON: &str = "00010000";
    let path = socket.to_str().expect("a plain path");
    let sockets = fs::read_to_string("/proc/net/unix").expect("/proc is mounted");
    sockets.lines().any(|line| line.ends_with(path) && line.split_whitespace().nth(3) == Some(SO_ACCEPTCON))
}
