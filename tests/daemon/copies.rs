//! Point-in-time copies by the real daemon: its quiesce socket, a front-end that writes, and the files left behind.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use kit::control::{Client, WAIT_TIMEOUT};
use kit::driver::{ALL, Driver};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const SIZE: usize = 16 << 20;

/// A served image full of ones.
struct Served {
    child: Child,
    dir: tempfile::TempDir,
}

impl Served {
    fn new(cache: &str, more: &[&str]) -> Served {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        std::fs::write(dir.path().join("disk.img"), vec![1; SIZE]).expect("an image");
        let path = |name: &str| dir.path().join(name).into_os_string().into_string().expect("a path");
        let child = Command::new(env!("CARGO_BIN_EXE_virtioblkd"))
            .args(["--socket-path", &path("sock"), "--blk-file", &path("disk.img"), "--cache", cache])
            .args(["--control-path", &path("ctl"), "--copy-dir", &path("")])
            .args(more)
            .spawn()
            .expect("the daemon");
        Served { child, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn client(&self) -> Client {
        let end = Instant::now() + WAIT_TIMEOUT;
        let stream = loop {
            match UnixStream::connect(self.path("ctl")) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < end, "no control socket: {error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        Client::negotiated(stream)
    }

    /// A front-end with one ring.
    fn guest(&self) -> Driver {
        Driver::connect_soon(&self.path("sock"), 1, 64, 1 << 20, ALL)
    }

    fn prepare(&self, client: &mut Client, mut arguments: Value) -> String {
        arguments["target"] = json!(self.path("copy.img"));
        client.prepare_copy(arguments)
    }

    fn exists(&self) -> (bool, bool) {
        (self.path("copy.img").exists(), self.path("copy.img.partial").exists())
    }

    fn kill(&mut self, signal: Signal) -> Option<i32> {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
        self.child.wait().expect("a child of ours").code()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Ended already, in some tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Quiesces, fixes the instant, resumes.
fn start(client: &mut Client, copy: &str) {
    let token = client.quiesce(json!({}));
    client.ask("copy-start", json!({"copy": copy, "token": token})).expect("started");
    client.ask("resume", json!({"token": token})).expect("resumed");
}

fn state(client: &mut Client, copy: &str) -> Value {
    let copies = client.ask("query-copies", json!({})).expect("a list");
    copies.as_array().and_then(|all| all.iter().find(|one| one["copy"] == copy)).expect("it is known").clone()
}

fn wait_for(client: &mut Client, copy: &str, wanted: &str) -> Value {
    let end = Instant::now() + WAIT_TIMEOUT;
    loop {
        let status = state(client, copy);
        if status["state"] == wanted {
            return status;
        }
        assert!(Instant::now() < end, "not {wanted}: {status}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_copy_holds_the_instant_while_the_guest_writes_on() {
    for cache in ["none", "writeback"] {
        let served = Served::new(cache, &[]);
        let mut client = served.client();
        let mut guest = served.guest();
        guest.fill(0, &vec![2; 1 << 20]);
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 0, 0, 1 << 20, id)), 0);
        let copy = served.prepare(&mut client, json!({"digest": true, "bandwidth": 1}));
        assert_eq!(served.exists(), (false, true));
        assert_eq!(state(&mut client, &copy)["state"], "prepared");
        start(&mut client, &copy);
        guest.fill(0, &vec![3; 1 << 20]);
        for part in 0..16u64 {
            assert_eq!(guest.one(0, |guest, id| guest.write(0, part << 20, 0, 1 << 20, id)), 0);
        }
        let status = state(&mut client, &copy);
        assert_eq!(status["state"], "running", "one byte a second");
        assert!(status["saved-before-write-bytes"].as_u64().expect("bytes") > (SIZE - (1 << 20)) as u64, "{status}");
        assert_eq!(client.ask("copy-bandwidth", json!({"copy": copy, "bandwidth": 0})), Ok(json!({})));
        let status = wait_for(&mut client, &copy, "completed");
        let mut wanted = vec![1; SIZE];
        wanted[..1 << 20].fill(2);
        assert!(std::fs::read(served.path("copy.img")).expect("the copy") == wanted, "{cache}");
        assert!(std::fs::read(served.path("disk.img")).expect("the disk") == vec![3; SIZE], "{cache}");
        assert_eq!(served.exists(), (true, false));
        let sum = Command::new("sha256sum").arg(served.path("copy.img")).output().expect("sha256sum").stdout;
        let sum = String::from_utf8(sum).expect("text");
        assert_eq!(sum.split(' ').next(), status["sha256"].as_str());
    }
}

#[test]
fn what_is_asked_at_the_wrong_time_is_refused() {
    let served = Served::new("none", &[]);
    let mut client = served.client();
    let copy = served.prepare(&mut client, json!({}));
    assert_eq!(client.ask("copy-prepare", json!({"target": served.path("other")})), Err("busy".into()));
    let held = client.quiesce(json!({}));
    let ask =
        |client: &mut Client, copy: &str, token: &str| client.ask("copy-start", json!({"copy": copy, "token": token}));
    assert_eq!(ask(&mut client, &copy, "never"), Err("not-held".into()));
    assert_eq!(ask(&mut client, "copy-9", &held), Err("no-such-copy".into()));
    client.ask("resume", json!({"token": held})).expect("resumed");
    assert_eq!(ask(&mut client, &copy, &held), Err("not-held".into()));
    let held = client.quiesce(json!({}));
    client.ask("copy-bandwidth", json!({"copy": copy, "bandwidth": 1})).expect("a limit");
    assert_eq!(ask(&mut client, &copy, &held), Ok(json!({})));
    assert_eq!(ask(&mut client, &copy, &held), Err("busy".into()));
    assert_eq!(client.ask("copy-cancel", json!({"copy": copy})), Ok(json!({})));
    assert_eq!(served.exists(), (false, false));
    assert_eq!(client.ask("copy-cancel", json!({"copy": copy})), Err("no-such-copy".into()));
    let mut watcher = served.client();
    let copy = served.prepare(&mut client, json!({}));
    assert_eq!(watcher.ask("copy-cancel", json!({"copy": copy})), Ok(json!({})), "anybody on the socket may");
    let told = watcher.event("COPY_CANCELLED");
    assert_eq!((&told["copy"], &told["state"]), (&json!(copy), &json!("cancelled")));
    std::fs::write(served.path("copy.img"), "precious").expect("a file");
    let target = json!({"target": served.path("copy.img")});
    assert_eq!(client.ask("copy-prepare", target), Err("target".into()));
    assert_eq!(std::fs::read(served.path("copy.img")).expect("the file"), b"precious");
}

#[test]
fn a_copy_ends_with_its_connection_unless_it_runs_detached() {
    let served = Served::new("none", &[]);
    let mut watcher = served.client();
    for (detached, starts) in [(false, false), (true, false), (false, true)] {
        let mut client = served.client();
        let copy = served.prepare(&mut client, json!({"detached": detached, "bandwidth": 1}));
        if starts {
            start(&mut client, &copy);
        }
        drop(client);
        wait_for(&mut watcher, &copy, "cancelled");
        assert_eq!(served.exists(), (false, false), "detached {detached}, started {starts}");
    }
    let mut client = served.client();
    let copy = served.prepare(&mut client, json!({"detached": true, "bandwidth": 1}));
    start(&mut client, &copy);
    drop(client);
    // The daemon has seen that the connection ended when it answers one that came after it.
    served.client();
    assert_eq!(state(&mut watcher, &copy)["state"], "running");
    watcher.ask("copy-bandwidth", json!({"copy": copy, "bandwidth": 0})).expect("no limit");
    wait_for(&mut watcher, &copy, "completed");
    assert_eq!(served.exists(), (true, false));
}

#[test]
fn the_daemons_end_leaves_no_file_that_looks_finished() {
    for (signal, status, left) in [(Signal::TERM, Some(0), (false, false)), (Signal::KILL, None, (false, true))] {
        let mut served = Served::new("none", &[]);
        let mut client = served.client();
        let copy = served.prepare(&mut client, json!({"detached": true, "bandwidth": 1}));
        start(&mut client, &copy);
        let mut guest = served.guest();
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 1 << 20, 0, 1 << 20, id)), 0);
        assert_eq!(served.kill(signal), status);
        assert_eq!(served.exists(), left, "{signal:?}");
    }
}

#[test]
fn a_read_only_disk_can_be_copied() {
    let served = Served::new("none", &["--read-only"]);
    let mut client = served.client();
    let copy = served.prepare(&mut client, json!({}));
    start(&mut client, &copy);
    wait_for(&mut client, &copy, "completed");
    assert!(std::fs::read(served.path("copy.img")).expect("the copy") == vec![1; SIZE]);
}
