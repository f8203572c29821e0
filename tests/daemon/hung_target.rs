//! The directory for copies is on a filesystem that does not answer any more, or slowly. That costs its copy, and neither
//! the guest nor another copy, nor the next daemon; and what it costs the guest is said.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kit::control::Client;
use kit::driver::{ALL, Driver};
use kit::stall::directory::Stopping;
use serde_json::{Value, json};

const SIZE: usize = 16 << 20;
/// Nothing here takes this long.
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// The image, and the directories for copies: one whose filesystem stops, and a healthy one.
struct Place {
    // First: whatever hangs in it ends.
    target: Stopping,
    dir: tempfile::TempDir,
}

/// A daemon for the image of a place; killed when dropped, which does not wait for it.
struct Daemon {
    child: Child,
}

impl Place {
    fn new() -> Option<Place> {
        let target = match Stopping::mount() {
            Ok(target) => target,
            Err(why) => {
                eprintln!("SKIPPED: {why}");
                return None;
            }
        };
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        std::fs::write(dir.path().join("disk.img"), vec![1; SIZE]).expect("an image");
        std::fs::create_dir(dir.path().join("healthy")).expect("a directory");
        Some(Place { target, dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Waits until the daemon has logged `text`.
    fn wait_for_log(&self, text: &str) {
        kit::log::wait_for(|| self.log(), &[text]);
    }

    fn serve(&self, copy_dir: &Path) -> Daemon {
        self.serve_with(copy_dir, &[])
    }

    fn serve_with(&self, copy_dir: &Path, options: &[&Path]) -> Daemon {
        soon("a daemon that finds the directory in time", || {
            let mut daemon = self.spawn(copy_dir, options);
            self.wait_for_log("serving on");
            // On a loaded machine a directory may take longer than two seconds to open, although nothing hangs.
            if self.target.waiting() > 0 || !self.log().contains("does not answer") {
                return Some(daemon);
            }
            daemon.child.kill().expect("it serves");
            daemon.child.wait().expect("our child");
            None
        })
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).expect("the log")
    }

    fn spawn(&self, copy_dir: &Path, options: &[&Path]) -> Daemon {
        let child = Command::new(env!("CARGO_BIN_EXE_virtioblkd"))
            .arg("--socket-path")
            .arg(self.path("sock"))
            .arg("--blk-file")
            .arg(self.path("disk.img"))
            .arg("--control-path")
            .arg(self.path("ctl"))
            .arg("--copy-dir")
            .arg(copy_dir)
            .arg("--copy-dir")
            .arg(self.path("healthy"))
            .args(options)
            .stderr(Stdio::from(std::fs::File::create(self.path("log")).expect("a log")))
            .spawn();
        Daemon { child: child.expect("the daemon") }
    }

    fn client(&self) -> Client {
        let stream = soon("the control socket", || UnixStream::connect(self.path("ctl")).ok());
        Client::negotiated(stream)
    }

    fn guest(&self) -> Driver {
        Driver::connect_soon(&self.path("sock"), 1, 64, 1 << 20, ALL)
    }

    fn prepare(&self, client: &mut Client, target: &Path) -> String {
        // A busy machine may be taken for a target that hangs.
        let prepared = soon("a prepared copy", || client.ask("copy-prepare", json!({"target": target})).ok());
        prepared["copy"].as_str().expect("a name").to_owned()
    }

    /// A copy that is under way to `target`.
    fn copy(&self, client: &mut Client, target: &Path) -> String {
        let copy = self.prepare(client, target);
        let token = client.quiesce(json!({}));
        client.ask("copy-start", json!({"copy": copy, "token": token})).expect("started");
        client.ask("resume", json!({"token": token})).expect("resumed");
        copy
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
    }
}

fn soon<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + WAIT_TIMEOUT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "not within {WAIT_TIMEOUT:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn status(client: &mut Client, copy: &str) -> Value {
    let copies = client.ask("query-copies", json!({})).expect("a list");
    copies.as_array().and_then(|all| all.iter().find(|one| one["copy"] == copy)).expect("it is known").clone()
}

#[test]
fn a_killed_daemon_frees_its_guest_and_its_image_while_the_target_hangs() {
    let Some(place) = Place::new() else { return };
    let mut old = place.serve(&place.target.path());
    let mut client = place.client();
    let mut front_end = UnixStream::connect(place.path("sock")).expect("served");
    front_end.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a timeout");
    let copy = place.prepare(&mut client, &place.target.path().join("copy.img"));
    place.target.stop();
    let token = client.quiesce(json!({}));
    client.ask("copy-start", json!({"copy": copy, "token": token})).expect("started");
    soon("the copy waits for the target", || (place.target.waiting() > 0).then_some(()));
    old.child.kill().expect("it runs");
    assert_eq!(front_end.read(&mut [0]).expect("an end within the time"), 0, "the front-end learns of it");
    assert_eq!(
        old.child.try_wait().expect("our child"),
        None,
        "its thread waits for the target: else this shows nothing"
    );
    let _new = place.serve(&place.path("healthy"));
    let mut guest = place.guest();
    assert_eq!(guest.one(0, |guest, id| guest.write(0, 0, 0, 1 << 20, id)), 0, "the image's lock was free");
    assert_eq!(old.child.try_wait().expect("our child"), None);
    place.target.go_on();
    soon("the old daemon's end", || old.child.try_wait().expect("our child"));
}

#[test]
fn a_target_that_hangs_hinders_no_other_copy_and_is_counted() {
    let Some(place) = Place::new() else { return };
    let _daemon = place.serve(&place.target.path());
    let mut client = place.client();
    // The filesystem has no hard links: the copy is given its name all the same.
    let copy = place.copy(&mut client, &place.target.path().join("first.img"));
    soon("the first copy", || (status(&mut client, &copy)["state"] == "completed").then_some(()));
    assert_eq!(place.target.files(), ["first.img"]);
    let hung = place.copy(&mut client, &place.target.path().join("hung.img"));
    place.target.stop();
    soon("a request that waits", || (place.target.waiting() > 0).then_some(()));
    assert_eq!(client.ask("copy-cancel", json!({"copy": hung})), Ok(json!({})));
    let seen = status(&mut client, &hung);
    assert_eq!((&seen["state"], &seen["ending"]), (&json!("cancelled"), &json!(true)), "{seen}");
    assert_eq!(client.ask("query-status", json!({})).expect("a status")["copies-ending"], 1);
    let good = place.copy(&mut client, &place.path("healthy/copy.img"));
    soon("the second copy", || (status(&mut client, &good)["state"] == "completed").then_some(()));
    assert!(std::fs::read(place.path("healthy/copy.img")).expect("the copy") == vec![1; SIZE]);
    place.target.go_on();
    soon("the first one's end", || (status(&mut client, &hung)["ending"] == false).then_some(()));
    assert_eq!(client.ask("query-status", json!({})).expect("a status")["copies-ending"], 0);
}

#[test]
fn a_directory_that_hangs_at_the_start_does_not_keep_the_disk_from_its_guest() {
    let Some(place) = Place::new() else { return };
    place.target.stop();
    let daemon = place.serve_with(&place.target.below(), &[Path::new("--scratch"), &place.target.below()]);
    let mut guest = place.guest();
    assert_eq!(guest.one(0, |guest, id| guest.write(0, 0, 0, 1 << 20, id)), 0);
    for option in ["--copy-dir", "--scratch"] {
        let said = format!("{option} '{}' does not answer: its filesystem hangs", place.target.below().display());
        place.wait_for_log(&said);
    }
    let mut client = place.client();
    let refused = client.ask("copy-prepare", json!({"target": place.target.below().join("copy.img")}));
    assert_eq!(refused, Err("target".into()));
    let good = place.copy(&mut client, &place.path("healthy/copy.img"));
    soon("the copy", || (status(&mut client, &good)["state"] == "completed").then_some(()));
    let children = || {
        let list = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", daemon.child.id()));
        list.expect("the kernel lists children")
    };
    assert_eq!(children().split_whitespace().count(), 2, "the processes that open the directories hang");
    place.target.go_on();
    soon("the processes that opened the directories are reaped", || children().trim().is_empty().then_some(()));
}

/// More is changed than fits into memory: the guest then writes as fast as the target does.
#[test]
fn a_target_that_slows_the_guest_down_is_warned_about() {
    const CLUSTER: u64 = 64 << 10;
    const LARGE: u64 = 64 << 20;
    let Some(place) = Place::new() else { return };
    std::fs::write(place.path("disk.img"), vec![1; LARGE as usize]).expect("an image");
    let _daemon = place.serve(&place.target.path());
    let mut client = place.client();
    let mut guest = place.guest();
    place.target.slow_down(2 << 20);
    let copy = place.copy(&mut client, &place.target.path().join("copy.img"));
    for cluster in 0..LARGE / CLUSTER {
        assert_eq!(guest.one(0, |guest, id| guest.write(0, cluster * CLUSTER, 0, 4096, id)), 0);
    }
    let seen = status(&mut client, &copy);
    assert!(seen["slowed-seconds"].as_f64().expect("a number") > 10.0, "{seen}");
    place.wait_for_log("the guest has been slowed for");
    place.target.slow_down(0);
    soon("the copy", || (status(&mut client, &copy)["state"] == "completed").then_some(()));
}

/// The same with a scratch: the guest has changed all of the image before the target has taken a quarter of it.
#[test]
fn a_scratch_frees_the_guest_from_a_slow_target() {
    const CLUSTER: u64 = 64 << 10;
    const LARGE: u64 = 64 << 20;
    let Some(place) = Place::new() else { return };
    std::fs::write(place.path("disk.img"), vec![1; LARGE as usize]).expect("an image");
    let scratch = place.path("healthy");
    let _daemon = place.serve_with(&place.target.path(), &[Path::new("--scratch"), &scratch]);
    let mut client = place.client();
    let mut guest = place.guest();
    place.target.slow_down(256 << 10);
    let copy = place.copy(&mut client, &place.target.path().join("copy.img"));
    for cluster in 0..LARGE / CLUSTER {
        assert_eq!(guest.one(0, |guest, id| guest.write(0, cluster * CLUSTER, 0, 4096, id)), 0);
    }
    let seen = status(&mut client, &copy);
    let figure = |name: &str| seen[name].as_u64().expect("a number");
    assert!(figure("stored-bytes") < LARGE / 4 && figure("scratch-bytes") > LARGE / 8, "{seen}");
    place.target.slow_down(0);
    soon("the copy", || (status(&mut client, &copy)["state"] == "completed").then_some(()));
    assert!(std::fs::read(place.target.path().join("copy.img")).expect("the copy") == vec![1; LARGE as usize]);
    assert_eq!(std::fs::read_dir(&scratch).expect("the directory").count(), 0, "the scratch has no name");
}
