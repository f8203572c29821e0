//! An upgrade that was given up is never carried out later: whoever dies at whatever step, the old daemon serves on, under
//! load, in its mode. With the real programs.

use std::fs;
use std::io::{IoSlice, PipeWriter};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Config, Filesystem, INodeNo, MountOption, ReplyEntry, Request};
use kit::driver::load::Load;
use kit::driver::{ALL, Driver};
use kit::upgrade::{Disk, NewDaemon, contains, lives, wait_until};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

/// Nothing here takes this long; what does hangs.
const LATE: Duration = Duration::from_secs(60);

/// `virtioblkctl upgrade` with these arguments; its messages go to the file `said`.
fn start_upgrade(disk: &Disk, arguments: &[&str]) -> Child {
    let said = fs::File::create(disk.path("said")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkctl"));
    command.current_dir(&disk.dir).args(["--control", "control", "upgrade"]).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said).spawn().unwrap()
}

fn ends(child: &mut Child, what: &str) -> ExitStatus {
    let end = Instant::now() + LATE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < end, "{what}: it does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A new program that waits before it becomes virtioblkd, until the file `go` is there; its number is in `started`.
fn slow_program(disk: &Disk) {
    let text = format!(
        "#!/bin/sh\necho $$ > started.new && mv started.new started\nwhile [ ! -e go ]; do sleep 0.02; done\nexec {} \"$@\"\n",
        env!("CARGO_BIN_EXE_virtioblkd")
    );
    kit::programs::make_script(&disk.path("slow"), &text);
}

fn started(disk: &Disk) -> Pid {
    wait_until("the new program is started", || disk.path("started").exists());
    Pid::from_raw(fs::read_to_string(disk.path("started")).unwrap().trim().parse().unwrap()).unwrap()
}

/// The same process serves, in the same mode.
fn is_as_before(disk: &Disk, what: &str) {
    let status = disk.status();
    assert_eq!(status["daemon"]["pid"], json!(disk.child.id()), "{what}");
    assert_eq!(status["cache-mode"], "none", "{what}");
    assert_eq!(disk.pid(), Pid::from_child(&disk.child), "{what}");
}

/// A guest with sixteen writes on the way to `disk`, which is slow.
fn with_writes_in_flight(disk: &Disk) -> Driver {
    let mut guest = Driver::connect_soon(&disk.path("vhost"), 1, 64, 1 << 20, ALL);
    for id in 0..16 {
        guest.write(0, id * 4096, 0, 4096, id);
    }
    guest.kick(0);
    wait_until("requests are in flight", || disk.status()["total"]["in-flight"].as_u64() > Some(0));
    guest
}

#[test]
fn a_tool_that_is_ended_before_the_new_daemon_begins_leaves_the_old_one() {
    let disk = Disk::serve(&["--cache", "none"]);
    let load = Load::start(&disk.path("vhost"));
    load.wait_for(50);
    slow_program(&disk);
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::KILL] {
        let _ = fs::remove_file(disk.path("started"));
        let _ = fs::remove_file(disk.path("go"));
        let mut tool = start_upgrade(&disk, &["--binary", "./slow", "--", "--cache", "unsafe"]);
        let new = started(&disk);
        kill_process(Pid::from_child(&tool), signal).unwrap();
        let status = ends(&mut tool, "the tool");
        let said = fs::read_to_string(disk.path("said")).unwrap();
        if signal == Signal::KILL {
            assert_eq!(status.signal(), Some(signal.as_raw()));
        } else {
            assert_eq!(status.code(), Some(128 + signal.as_raw()), "{said}");
            contains(&said, &["the upgrade is given up", "serves on"]);
        }
        // What is left of the new one, if anything is, goes on now, and must not come to anything.
        fs::write(disk.path("go"), "").unwrap();
        wait_until("the new one is gone", || !lives(new));
        if signal == Signal::KILL {
            contains(&fs::read_to_string(disk.path("said")).unwrap(), &["has ended or given up"]);
        }
        is_as_before(&disk, &format!("{signal:?}"));
        load.wait_for(20);
    }
    // And one that is wanted is carried out.
    disk.upgrade(&[]);
    load.wait_for(20);
    load.stop();
}

/// The tool dies while the old daemon finishes what is in flight, with the new one ready.
#[test]
fn a_tool_that_dies_in_the_middle_leaves_the_old_one() {
    for signal in [Signal::TERM, Signal::KILL] {
        let in_time = (0..20).any(|_| dies_in_the_middle(signal));
        assert!(in_time, "{signal:?}: the tool never dies before the upgrade is over");
    }
}

/// The last write ends after almost five seconds, which is as long as the old daemon waits. On a loaded machine the tool may
/// die only after that: then `false`.
fn dies_in_the_middle(signal: Signal) -> bool {
    let disk = Disk::serve(&["--cache", "none", "--backend", "slow:2400"]);
    let mut guest = with_writes_in_flight(&disk);
    let mut client = disk.client();
    let mut tool = start_upgrade(&disk, &["--", "--cache", "unsafe"]);
    wait_until("the hand-over has begun", || client.line()["event"] == "UPGRADE");
    kill_process(Pid::from_child(&tool), signal).unwrap();
    ends(&mut tool, "the tool");
    let mut done = 0;
    while done < 16 {
        done += guest.wait(0).iter().map(|&(_, result)| assert_eq!(result, 0)).count();
    }
    wait_until("the old one serves on, or the new one serves", || {
        disk.log().contains("serves on") || disk.pid() != Pid::from_child(&disk.child)
    });
    if !disk.log().contains("has ended or given up") {
        return false;
    }
    is_as_before(&disk, &format!("{signal:?}"));
    assert_eq!(guest.one(0, |guest, id| guest.read(0, 0, 8192, 4096, id)), 0);
    true
}

/// The old daemon dies while the new one waits for the guest: that one ends, and nobody claims that the disk is served.
#[test]
fn a_new_daemon_ends_with_an_old_one_that_dies() {
    let mut disk = Disk::serve(&["--cache", "none", "--backend", "slow:8000"]);
    let _guest = with_writes_in_flight(&disk);
    let mut client = disk.client();
    let mut tool = start_upgrade(&disk, &[]);
    wait_until("the hand-over has begun", || client.line()["event"] == "UPGRADE");
    disk.child.kill().unwrap();
    disk.child.wait().unwrap();
    let status = ends(&mut tool, "the tool");
    assert_eq!(status.code(), Some(1));
    let said = fs::read_to_string(disk.path("said")).unwrap();
    contains(&said, &["did not take over", "the running daemon does not reply"]);
    assert!(!said.contains("serves on"), "{said}");
}

/// A new daemon that has begun, with a starter whose end of the pipe is ours.
fn begin(disk: &Disk) -> (NewDaemon, PipeWriter) {
    let mut new = NewDaemon::connect(disk);
    let (reader, writer) = std::io::pipe().unwrap();
    new.say(&json!("Begin"), 1);
    let descriptors = [reader.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    sendmsg(&new.stream, &[IoSlice::new(b"+")], &mut ancillary, SendFlags::empty()).unwrap();
    (new, writer)
}

fn is_refused(new: &mut NewDaemon, what: &str) {
    let heard = new.hear();
    let why = heard["Refused"].as_str().unwrap_or_else(|| panic!("{what}: {heard}"));
    contains(why, &["has ended or given up"]);
}

/// The old daemon looks at the starter in every wait, and right before it would commit, whatever the new one says.
#[test]
fn the_old_daemon_never_commits_for_a_starter_that_is_gone() {
    let disk = Disk::serve(&["--cache", "none"]);
    let load = Load::start(&disk.path("vhost"));
    load.wait_for(50);
    let ready = json!({"Ready": {"front": true, "control": true, "pid_file": true}});
    for step in 0..3 {
        let failures = disk.log().matches("serves on").count();
        let (mut new, starter) = begin(&disk);
        assert!(new.hear()["Hello"].is_object());
        match step {
            0 => drop(starter),
            1 => {
                drop(starter);
                // It may have noticed already, and closed.
                let _ = new.try_say(&ready, 0);
            }
            _ => {
                new.say(&ready, 0);
                assert!(new.hear()["State"]["front_end"].is_array());
                // A new one that does not look at it itself.
                drop(starter);
                let _ = new.try_say(&json!("Prepared"), 0);
            }
        }
        is_refused(&mut new, &format!("step {step}"));
        wait_until("the old one says so", || disk.log().matches("serves on").count() > failures);
        is_as_before(&disk, &format!("step {step}"));
        load.wait_for(20);
    }
    load.stop();
}

/// A filesystem that answers nothing: who looks a name up in it waits in a call that no signal ends.
struct Mute;

impl Filesystem for Mute {
    fn lookup(&self, _: &Request, _: INodeNo, _: &std::ffi::OsStr, reply: ReplyEntry) {
        // Dropped, it would be answered.
        std::mem::forget(reply);
    }
}

struct Mounted {
    dir: tempfile::TempDir,
    session: Option<BackgroundSession>,
}

impl Mounted {
    fn new() -> Option<Mounted> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: only root may mount a filesystem");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("mute".into())];
        match fuser::spawn_mount(Mute, dir.path(), &config) {
            Ok(session) => Some(Mounted { dir, session: Some(session) }),
            Err(error) => {
                eprintln!("SKIPPED: this machine mounts no FUSE filesystem ({error})");
                None
            }
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // MNT_FORCE has the kernel end every call that waits.
        let _ = Command::new("umount").args(["-f", "-l"]).arg(self.dir.path()).status();
        drop(self.session.take());
    }
}

#[test]
fn a_new_process_that_no_signal_ends_is_not_waited_for() {
    let Some(mute) = Mounted::new() else { return };
    let disk = Disk::serve(&["--cache", "none"]);
    let image = mute.dir.path().join("disk.img");
    let program = mute.dir.path().join("virtioblkd");
    let (image, program) = (image.to_str().unwrap(), program.to_str().unwrap());
    // It hangs in looking at the image; and the program itself cannot be loaded.
    for arguments in [&["--", "--blk-file", image][..], &["--binary", program]] {
        let mut tool = start_upgrade(&disk, &[&["--timeout", "500ms"], arguments].concat());
        let status = ends(&mut tool, "the tool");
        let said = fs::read_to_string(disk.path("said")).unwrap();
        assert_eq!(status.code(), Some(1), "{said}");
        contains(&said, &["--timeout", "call of the kernel", "can no longer take over", "serves on"]);
        is_as_before(&disk, &format!("{arguments:?}"));
    }
    // When the storage answers again they go on, and take nothing over.
    drop(mute);
    disk.upgrade(&[]);
}
