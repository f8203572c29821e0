//! A log that nobody reads holds up nothing: the guest's I/O, the end of a lease, the control socket, SIGTERM.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kit::control::Client;
use kit::front_end;
use kit::front_end::{ALL, FrontEnd};
use kit::stall::fuse::{Stalling, Unable};
use kit::unread::Unread;
use kit::wait::wait_until;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use virtioblkd::engine::cache::CacheMode;

/// How long anything may take on a loaded machine.
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);
const S_OK: u8 = 0;

struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Daemon {
    fn start(mode: CacheMode, log: Stdio) -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk");
        std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
        command.arg("--blk-file").arg(&image).args(["--cache", &mode.to_string()]);
        command.arg("--socket-path").arg(dir.path().join("vhost"));
        command.arg("--control-path").arg(dir.path().join("control"));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        Daemon { child, dir }
    }

    fn client(&self) -> Client {
        let mut client = Client::new(connect(&self.dir.path().join("control")));
        client.line();
        client.ask("qmp_capabilities", json!({})).unwrap();
        client
    }

    fn front_end(&self) -> FrontEnd {
        let mut front_end = FrontEnd::handshake(connect(&self.dir.path().join("vhost")), 1, 64, ALL);
        front_end.start_ring(0, 0);
        front_end
    }

    fn terminate(&mut self) -> ExitStatus {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        let end = Instant::now() + WAIT_TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "SIGTERM is not heard");
            std::thread::sleep(Duration::from_millis(5));
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

fn connect(path: &Path) -> UnixStream {
    let end = Instant::now() + WAIT_TIMEOUT;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
                return stream;
            }
            Err(error) => assert!(Instant::now() < end, "{}: {error}", path.display()),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Chains without a place for their status, which the ring's thread logs.
fn send_malformed_chains(front_end: &mut FrontEnd) {
    for _ in 0..3 {
        front_end.put_chain(0, 0, &[(0x10_0000, 16, 0)]);
        front_end.make_available(0, 0);
        front_end.kick(0);
        assert!(front_end.used_within(0, WAIT_TIMEOUT).is_some(), "the ring stands still");
    }
}

fn serves_while_unread(output: impl Fn() -> Unread) {
    for mode in CacheMode::ALL {
        let unread = output();
        let mut daemon = Daemon::start(mode, unread.output());
        let mut front_end = daemon.front_end();
        send_malformed_chains(&mut front_end);
        assert_eq!(front_end.write(0, 0, &[1; 4096]), S_OK, "{}, {mode}", unread.name);

        let mut client = daemon.client();
        client.quiesce(json!({"lease-ms": 500, "detached": true}));
        front_end.add(0, front_end::OUT, 8, &[2; 4096], 0);
        front_end.kick(0);
        assert!(front_end.used_within(0, WAIT_TIMEOUT).is_some(), "{}, {mode}: the lease does not end", unread.name);
        assert_eq!(client.ask("query-status", json!({})).unwrap()["quiesce"]["state"], "open");

        // A new connection is one more line of the log's.
        drop(front_end);
        let mut front_end = daemon.front_end();
        assert_eq!(front_end.read(0, 8, 4096), (S_OK, vec![2; 4096]));
        assert!(daemon.terminate().success(), "{}, {mode}", unread.name);
        assert!(unread.is_still_blocking(), "{}", unread.name);
    }
}

#[test]
fn a_disk_is_served_while_its_log_is_a_full_pipe() {
    serves_while_unread(Unread::pipe);
}

#[test]
fn a_disk_is_served_while_its_log_is_a_full_socket() {
    serves_while_unread(Unread::socket);
}

#[test]
fn a_disk_is_served_while_its_log_is_a_stopped_terminal() {
    serves_while_unread(Unread::terminal);
}

/// A write to a file waits for its filesystem, whatever it is asked, so none is made before there is a thread for it.
#[test]
fn a_disk_starts_while_its_log_is_a_file_that_hangs() {
    let filesystem = match Stalling::mount(vec![b' '; 64 << 10]) {
        Ok(filesystem) => filesystem,
        Err(Unable(why)) => return kit::guest::tell(&format!("SKIPPED: a log whose filesystem hangs: {why}")),
    };
    filesystem.stall_writes_of(0);
    let log = std::fs::File::options().write(true).open(filesystem.image()).unwrap();
    let mut daemon = Daemon::start(CacheMode::Writeback, log.into());
    let mut front_end = daemon.front_end();
    send_malformed_chains(&mut front_end);
    assert_eq!(front_end.write(0, 0, &[1; 4096]), S_OK);
    assert_eq!(daemon.client().ask("query-status", json!({})).unwrap()["quiesce"]["state"], "open");
    wait_until("the log is written", || filesystem.waiting() > 0);
    filesystem.let_go();
    assert!(daemon.terminate().success());
    let text = std::fs::read_to_string(filesystem.image()).unwrap();
    assert!(text.contains("serving on") && text.contains("drained and synced"), "{text}");
}

/// What waited comes in its order when somebody reads, and the log is complete at the end.
#[test]
fn a_log_that_is_read_again_is_complete() {
    for unread in Unread::all() {
        let name = unread.name;
        let mut daemon = Daemon::start(CacheMode::None, unread.output());
        let mut front_end = daemon.front_end();
        send_malformed_chains(&mut front_end);
        let log = std::thread::spawn(move || unread.read());
        drop(front_end);
        assert!(daemon.terminate().success());
        let log = log.join().unwrap();
        let mut rest = log.as_str();
        for text in
            ["sandbox: ", "serving on", "front-end connected", "no writable byte", "SIGTERM", "drained and synced"]
        {
            let at = rest.find(text).unwrap_or_else(|| panic!("{name}: '{text}' is missing or misplaced in:\n{log}"));
            rest = &rest[at..];
        }
        assert!(!log.contains("missing here"), "{name}: {log}");
    }
}

/// A daemon that cannot start ends, although nobody reads why.
#[test]
fn a_start_that_fails_ends_while_nobody_reads_why() {
    for arguments in [&["--backend", "null:1M", "--socket-path", "/nowhere/s"][..], &["--no-such-option"]] {
        for unread in Unread::all() {
            let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
            let mut child = command.args(arguments).stdout(Stdio::null()).stderr(unread.output()).spawn().unwrap();
            let end = Instant::now() + WAIT_TIMEOUT;
            let status = loop {
                match child.try_wait().unwrap() {
                    Some(status) => break status,
                    None if Instant::now() > end => {
                        child.kill().unwrap();
                        panic!("{arguments:?} on {} does not end", unread.name);
                    }
                    None => std::thread::sleep(Duration::from_millis(5)),
                }
            };
            assert!(!status.success());
        }
    }
}
