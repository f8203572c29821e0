//! UNSAFE. The sandbox: what the daemon has given up, that what it gave up is refused or ends it, and that it can still
//! do all that it is for. (All other tests of the real daemon run in the sandbox too: it is on by default.)
//!
//! What must end a process is tried by this test's own program, started again as `child`, which enters the same sandbox.
//! The unsafe calls are the intruder's: system calls by their numbers.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kit::control::{Client, WAIT_TIMEOUT};
use kit::driver::{ALL, Driver};
use kit::unread::Unread;
use kit::wait::wait_until;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use virtioblkd::internal::config::{Config, Invocation};
use virtioblkd::internal::sandbox::Sandbox;
use virtioblkd::internal::server::permissions;

const MIB: usize = 1 << 20;
const NOBODY: u32 = 65534;

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: only root can become somebody else");
    }
    root
}

/// Whether this kernel has rules on paths (landlock_create_ruleset(2), LANDLOCK_CREATE_RULESET_VERSION).
fn has_landlock() -> bool {
    let version = call(libc::SYS_landlock_create_ruleset, [0, 0, 1, 0, 0, 0]);
    if let Err(error) = &version {
        eprintln!("SKIPPED: no Landlock: {error}");
    }
    version.is_ok()
}

/// The directories of a daemon, each for one purpose.
struct Place {
    root: PathBuf,
    /// Removed with it; `None`: somebody else's.
    dir: Option<tempfile::TempDir>,
}

impl Place {
    fn new() -> Place {
        Place::in_directory(tempfile::tempdir().unwrap())
    }

    fn in_directory(dir: tempfile::TempDir) -> Place {
        let place = Place { root: dir.path().to_owned(), dir: Some(dir) };
        for name in ["images", "run", "copies", "elsewhere"] {
            fs::create_dir(place.path(name)).unwrap();
        }
        for name in ["disk", "another"] {
            fs::write(place.path(&format!("images/{name}")), vec![1; MIB]).unwrap();
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().unwrap()
    }

    fn arguments(&self) -> Vec<String> {
        [
            ("--blk-file", "images/disk"),
            ("--socket-path", "run/vhost"),
            ("--control-path", "run/control"),
            ("--pid-file", "run/pid"),
            ("--copy-dir", "copies"),
        ]
        .into_iter()
        .flat_map(|(option, name)| [option.to_string(), self.text(name)])
        .collect()
    }

    /// Everything belongs to this user.
    fn give_to(&self, user: u32) {
        let give = |path: &Path| std::os::unix::fs::chown(path, Some(user), Some(user)).unwrap();
        fs::set_permissions(&self.root, fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["images", "images/disk", "run", "copies"] {
            give(&self.path(name));
        }
    }
}

struct Daemon {
    child: Child,
    place: Place,
}

impl Daemon {
    fn start(place: Place, more: &[&str]) -> Daemon {
        // Root has to say that it wants to stay.
        let stays = rustix::process::geteuid().is_root() && !more.contains(&"--user");
        let user: &[&str] = if stays { &["--user", "root"] } else { &[] };
        Daemon::start_as_given(place, &[user, more].concat())
    }

    fn start_as_given(place: Place, more: &[&str]) -> Daemon {
        let log = File::create(place.path("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
        let child = command.args(place.arguments()).args(more).stdin(Stdio::null()).stderr(log).spawn().unwrap();
        let mut daemon = Daemon { child, place };
        let end = Instant::now() + WAIT_TIMEOUT;
        while !daemon.log().contains("serving on") {
            assert!(daemon.child.try_wait().unwrap().is_none(), "it ended: {}", daemon.log());
            assert!(Instant::now() < end, "it does not serve: {}", daemon.log());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        daemon
    }

    fn log(&self) -> String {
        fs::read_to_string(self.place.path("log")).unwrap()
    }

    /// Waits until the log contains all of `parts`, and returns it.
    fn wait_for_log(&self, parts: &[&str]) -> String {
        kit::log::wait_for(|| self.log(), parts)
    }

    /// A line of /proc/PID/task/TID/status, of each thread.
    fn each_thread(&self, key: &str) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let line = |status: String| {
            let found = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            found.unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
        };
        // A thread may have ended since.
        tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok()).map(line).collect()
    }

    fn client(&self) -> Client {
        let stream = UnixStream::connect(self.place.path("run/control")).unwrap();
        Client::negotiated(stream)
    }

    /// A front-end that writes, reads, discards and flushes, a held disk, and a copy of it.
    fn exercise(&self) {
        let mut guest = Driver::connect_soon(&self.place.path("run/vhost"), 2, 64, MIB, ALL);
        guest.fill(0, &[7; 8192]);
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 4096, 0, 8192, id)), 0);
        assert_eq!(guest.one(1, |guest, id| guest.read(1, 4096, 65536, 8192, id)), 0);
        assert_eq!(guest.fetch(65536, 8192), [7; 8192]);
        assert_eq!(guest.one(0, |guest, id| guest.flush(0, id)), 0);
        assert_eq!(guest.one(0, |guest, id| guest.discard(0, 65536, 65536, id)), 0);
        assert_eq!(guest.one(1, |guest, id| guest.write_zeroes(1, 131_072, 65536, true, id)), 0);
        let mut client = self.client();
        let target = self.place.path("copies/copy");
        let copy = client.prepare_copy(json!({"target": target, "digest": true}));
        let token = client.quiesce(json!({}));
        client.ask("copy-start", json!({"copy": copy, "token": token})).unwrap();
        client.ask("resume", json!({"token": token})).unwrap();
        let end = Instant::now() + WAIT_TIMEOUT;
        let completed = |client: &mut Client| {
            let copies = client.ask("query-copies", json!({})).unwrap();
            copies.as_array().unwrap().iter().any(|it| it["copy"] == *copy && it["state"] == "completed")
        };
        while !completed(&mut client) {
            assert!(Instant::now() < end, "{}", self.log());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(fs::read(&target).unwrap(), fs::read(self.place.path("images/disk")).unwrap());
        fs::remove_file(target).unwrap();
        assert!(self.log().lines().all(|line| !line.contains(" warn: ")), "{}", self.log());
    }

    /// Ends it well. Returns its place and what it said.
    fn end(mut self) -> (Place, String) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        let status = self.child.wait().unwrap();
        let log = self.log();
        assert!(status.success(), "{status}: {log}");
        (Place { root: self.place.root.clone(), dir: self.place.dir.take() }, log)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Ended already, in most tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn refused(place: &Place, more: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
    let output = command.args(place.arguments()).args(more).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn contains(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
}

#[test]
fn every_thread_has_given_everything_up_and_every_feature_works() {
    let daemon = Daemon::start(Place::new(), &["--cache", "writeback"]);
    daemon.exercise();
    let _guest = Driver::connect_soon(&daemon.place.path("run/vhost"), 4, 64, MIB, ALL);
    let _client = daemon.client();
    wait_until("main, control, vhost-user and four rings run", || daemon.each_thread("Pid").len() >= 7);
    assert!(daemon.each_thread("NoNewPrivs").iter().all(|it| it == "1"));
    assert!(daemon.each_thread("Seccomp").iter().all(|it| it == "2"));
    // Of root's, the three that reach the files of others: DAC_OVERRIDE, DAC_READ_SEARCH, IPC_LOCK.
    let capabilities = daemon.each_thread("CapPrm");
    assert!(capabilities.iter().all(|it| u64::from_str_radix(it, 16).unwrap() & !0x4006 == 0), "{capabilities:?}");
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.child.id())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().collect::<Vec<_>>()[4..6], ["0", "0"]);
    let log = daemon.wait_for_log(&["sandbox: ", "seccomp"]);
    assert!(log.contains("Landlock V") || !has_landlock(), "{log}");
    let (place, _) = daemon.end();
    assert_eq!(fs::read_dir(place.path("run")).unwrap().count(), 0, "sockets and pid file are removed");
}

#[test]
fn every_cache_mode_works() {
    for cache in ["none", "directsync", "writeback", "writethrough", "unsafe"] {
        // On a filesystem that has O_DIRECT.
        let place = Place::in_directory(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
        let daemon = Daemon::start(place, &["--cache", cache]);
        daemon.exercise();
        daemon.end();
    }
}

/// No io_uring is made in the sandbox: those that were made at the start are used again and again.
#[test]
fn queues_start_again_as_often_as_front_ends_and_copies_come() {
    let daemon = Daemon::start(Place::new(), &["--num-queues", "2"]);
    for count in 1..=25 {
        daemon.exercise();
        // The next one would be turned away while this one is drained.
        wait_until("the front-end is gone", || daemon.log().matches("front-end disconnected").count() >= count);
    }
    // Both queues' threads, the copy's, the control thread's, and main: others are ending.
    wait_until("no threads are left over", || daemon.each_thread("Pid").len() <= 10);
    daemon.end();
}

/// The io_urings that are made at the start have room for fewer commands than a deep queue has requests.
#[test]
fn a_queue_deeper_than_its_io_uring_completes_every_request() {
    const BLOCKS: usize = MIB / 4096;
    let place = Place::in_directory(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    let daemon = Daemon::start(place, &["--cache", "none", "--num-queues", "40"]);
    // One of the first io_urings, and one of those that only many queues use.
    let mut guest = Driver::connect_soon(&daemon.place.path("run/vhost"), 32, 1024, 2 * MIB, ALL);
    for queue in [0, 31] {
        guest.fill(0, &vec![queue as u8 + 3; MIB]);
        for _ in 0..8 {
            for block in 0..BLOCKS {
                guest.write(queue, 4096 * block as u64, 4096 * block, 4096, block as u64);
            }
            for read in 0..80 {
                guest.read(queue, 4096 * read as u64, MIB + 4096 * read, 4096, (BLOCKS + read) as u64);
            }
            guest.kick(queue);
            let (mut completed, end) = (0, Instant::now() + WAIT_TIMEOUT);
            while completed < BLOCKS + 80 {
                assert!(Instant::now() < end, "{completed} of {}: {}", BLOCKS + 80, daemon.log());
                let some = guest.wait(queue);
                assert!(some.iter().all(|(_, status)| *status == 0), "{some:?}");
                completed += some.len();
            }
        }
        assert_eq!(fs::read(daemon.place.path("images/disk")).unwrap(), vec![queue as u8 + 3; MIB]);
    }
    daemon.end();
}

#[test]
fn a_copy_goes_nowhere_but_where_it_was_allowed() {
    if !has_landlock() {
        return;
    }
    let daemon = Daemon::start(Place::new(), &[]);
    let mut client = daemon.client();
    for target in ["elsewhere/copy", "images/copy", "run/copy"] {
        let arguments = json!({"target": daemon.place.path(target)});
        client.send(json!({"execute": "copy-prepare", "arguments": arguments}).to_string());
        contains(&client.reply().to_string(), &["permission denied", "--copy-dir"]);
        assert!(!daemon.place.path(&format!("{target}.partial")).exists());
    }
    fs::create_dir(daemon.place.path("copies/beneath")).unwrap();
    client.prepare_copy(json!({"target": daemon.place.path("copies/beneath/copy")}));
    daemon.end();
}

/// Only the image decides whether the disk is served.
#[test]
fn a_directory_for_copies_that_cannot_be_opened_is_warned_about() {
    let place = Place::new();
    let file = place.text("images/disk");
    let late = place.text("late");
    let more = ["--copy-dir", &file, "--copy-dir", &late, "--scratch", &late].map(str::to_owned);
    let daemon = Daemon::start(place, &more.each_ref().map(String::as_str));
    daemon.wait_for_log(&["--copy-dir", &more[1], "is not a directory", &more[3], "does not exist", "is served"]);
    daemon.wait_for_log(&["--scratch", "copies make do without it"]);
    let mut guest = Driver::connect_soon(&daemon.place.path("run/vhost"), 1, 64, MIB, ALL);
    assert_eq!(guest.one(0, |guest, id| guest.flush(0, id)), 0);
    drop(guest);
    fs::create_dir(&more[3]).unwrap();
    let mut client = daemon.client();
    let arguments = json!({"target": daemon.place.path("late/copy")});
    client.send(json!({"execute": "copy-prepare", "arguments": arguments}).to_string());
    if has_landlock() {
        contains(&client.reply().to_string(), &["does not exist when virtioblkd started", "virtioblkctl upgrade"]);
    }
    drop(client);
    daemon.end();
}

#[test]
fn a_filesystem_mounted_over_a_directory_for_copies_is_named() {
    if !has_landlock() {
        return;
    }
    let place = Place::new();
    let over = place.path("copies");
    let daemon = Daemon::start(place, &[]);
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(&over).status();
    if !mount.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: no tmpfs can be mounted");
        return;
    }
    let mut client = daemon.client();
    client.send(json!({"execute": "copy-prepare", "arguments": {"target": over.join("copy")}}).to_string());
    let reply = client.reply().to_string();
    let unmounted = Command::new("umount").arg(&over).status();
    assert!(unmounted.is_ok_and(|status| status.success()));
    contains(&reply, &["mounted over it", "virtioblkctl upgrade", "a directory above the mount point"]);
    client.prepare_copy(json!({"target": over.join("copy")}));
    drop(client);
    daemon.end();
}

#[test]
fn each_level_of_the_sandbox_gives_up_what_it_says() {
    let daemon = Daemon::start(Place::new(), &["--sandbox", "no-filter"]);
    assert!(daemon.each_thread("Seccomp").iter().all(|it| it == "0"));
    assert!(daemon.each_thread("NoNewPrivs").iter().all(|it| it == "1"));
    daemon.wait_for_log(&["system calls are not filtered"]);
    let prepared = daemon.client().ask("copy-prepare", json!({"target": daemon.place.path("elsewhere/copy")}));
    assert_eq!(prepared.is_err(), has_landlock());
    daemon.end();

    let daemon = Daemon::start(Place::new(), &["--sandbox", "off"]);
    assert!(daemon.each_thread("NoNewPrivs").iter().all(|it| it == "0"));
    daemon.wait_for_log(&["the sandbox is off"]);
    let mut client = daemon.client();
    client.prepare_copy(json!({"target": daemon.place.path("elsewhere/copy")}));
    daemon.end();
}

#[test]
fn root_becomes_the_configured_user() {
    if !is_root() {
        return;
    }
    for sandbox in ["on", "off"] {
        let place = Place::new();
        place.give_to(NOBODY);
        let daemon = Daemon::start(place, &["--user", "nobody", "--sandbox", sandbox]);
        if sandbox == "on" {
            daemon.exercise();
        }
        for key in ["Uid", "Gid"] {
            assert!(daemon.each_thread(key).iter().all(|it| *it == [NOBODY.to_string().as_str(); 4].join(" ")));
        }
        assert!(daemon.each_thread("Groups").iter().all(|it| !it.split(' ').any(|group| group == "0")));
        assert!(daemon.each_thread("CapPrm").iter().all(|it| it.bytes().all(|digit| digit == b'0')));
        let (place, _) = daemon.end();
        assert_eq!(fs::read_dir(place.path("run")).unwrap().count(), 0, "sockets and pid file are removed");
    }
}

/// Root's directory, as /run is: what cannot be removed is left, is nobody's, and is taken over at the next start.
#[test]
fn a_user_that_may_not_remove_the_sockets_leaves_them_to_the_next_start() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    place.give_to(NOBODY);
    std::os::unix::fs::chown(place.path("run"), Some(0), Some(0)).unwrap();
    let (place, log) = Daemon::start(place, &["--user", "nobody"]).end();
    contains(&log, &["pid", "vhost", "cannot be removed"]);
    assert_eq!(fs::read_to_string(place.path("run/pid")).unwrap(), "", "no process is named");
    let daemon = Daemon::start(place, &["--user", "nobody"]);
    Driver::connect_soon(&daemon.place.path("run/vhost"), 1, 64, MIB, ALL);
    daemon.end();
}

#[test]
fn running_as_root_without_user_option_is_warned_of() {
    if !is_root() {
        return;
    }
    let (_, log) = Daemon::start_as_given(Place::new(), &[]).end();
    contains(&log, &[" warn: this daemon stays root", "--user"]);
    let (_, log) = Daemon::start_as_given(Place::new(), &["--user", "root"]).end();
    assert!(!log.contains("stays root"), "{log}");
}

/// A rule holds for all that is beneath a directory.
#[test]
fn nothing_is_removed_where_others_have_directories_beneath() {
    let place = Place::new();
    fs::create_dir_all(place.path("run/others")).unwrap();
    let (place, log) = Daemon::start(place, &[]).end();
    contains(&log, &["--socket-path", "others", "a directory of its own", "cannot be removed"]);
    assert!(place.path("run/vhost").exists());
    Daemon::start(place, &[]).end();
}

#[test]
fn an_unknown_user_or_one_that_may_not_open_the_image_is_refused() {
    let place = Place::new();
    contains(&refused(&place, &["--user", "nobody-at-all"]), &["--user", "nobody-at-all", "getent"]);
    if !is_root() {
        return;
    }
    place.give_to(NOBODY);
    std::os::unix::fs::chown(place.path("images/disk"), Some(0), Some(0)).unwrap();
    fs::set_permissions(place.path("images/disk"), fs::Permissions::from_mode(0o644)).unwrap();
    let log = refused(&place, &["--user", "nobody"]);
    contains(&log, &["--user nobody", &place.text("images/disk"), "read and write it"]);
    Daemon::start(place, &["--user", "nobody", "--read-only"]).end();

    let place = Place::new();
    place.give_to(NOBODY);
    let mut command = Command::new("/proc/self/fd/0");
    // The build's directory may be closed to others.
    command.stdin(File::open(env!("CARGO_BIN_EXE_virtioblkd")).unwrap());
    let output = command.args(place.arguments()).args(["--user", "root"]).uid(NOBODY).gid(NOBODY).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    contains(&String::from_utf8_lossy(&output.stderr), &["--user root", "only root"]);
}

// What an intruder would try.

fn call(number: libc::c_long, arguments: [libc::c_long; 6]) -> std::io::Result<()> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: an intruder's call: it is stopped, or fails, or is one that touches no memory of ours.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

type Attempt = (&'static str, fn(&Place) -> std::io::Result<()>);

/// Each ends the process, and the log names the call.
const DEADLY: &[Attempt] = &[
    ("execve", |_| Err(Command::new("/bin/true").exec())),
    ("clone", |_| call(libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0, 0, 0, 0])),
    ("socket", |_| std::net::TcpStream::connect("127.0.0.1:9").map(drop)),
    ("socket", |_| UnixStream::connect("/run/any").map(drop)),
    ("socketpair", |_| std::os::unix::net::UnixDatagram::pair().map(drop)),
    ("connect", |_| call(libc::SYS_connect, [0; 6])),
    ("sendto", |place| {
        let receiver = place.text("run/receiver");
        call(libc::SYS_sendto, [2, 0, 0, 0, receiver.as_ptr() as libc::c_long, 16])
    }),
    ("io_uring_setup", |_| io_uring::IoUring::new(2).map(drop)),
    ("fcntl", |_| call(libc::SYS_fcntl, [2, libc::F_SETOWN.into(), 1, 0, 0, 0])),
    ("sched_setaffinity", |_| call(libc::SYS_sched_setaffinity, [1, 0, 0, 0, 0, 0])),
    ("kill", |_| call(libc::SYS_kill, [std::os::unix::process::parent_id().into(), 0, 0, 0, 0, 0])),
    ("tgkill", |_| {
        let parent = std::os::unix::process::parent_id().into();
        call(libc::SYS_tgkill, [parent, parent, 0, 0, 0, 0])
    }),
    ("ptrace", |_| call(libc::SYS_ptrace, [16, std::os::unix::process::parent_id().into(), 0, 0, 0, 0])),
    ("process_vm_readv", |_| {
        call(libc::SYS_process_vm_readv, [std::os::unix::process::parent_id().into(), 0, 0, 0, 0, 0])
    }),
    ("unshare", |_| call(libc::SYS_unshare, [libc::CLONE_NEWNS.into(), 0, 0, 0, 0, 0])),
    ("mount", |_| call(libc::SYS_mount, [0; 6])),
    ("setresuid", |_| call(libc::SYS_setresuid, [0; 6])),
    ("bpf", |_| call(libc::SYS_bpf, [0; 6])),
    ("mmap", |_| {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        call(libc::SYS_mmap, [0, 4096, protection.into(), flags.into(), -1, 0])
    }),
    ("ioctl", |_| call(libc::SYS_ioctl, [0, 0x5412, 0, 0, 0, 0])), // TIOCSTI
    ("prctl", |_| call(libc::SYS_prctl, [libc::PR_SET_DUMPABLE.into(), 1, 0, 0, 0, 0])),
    ("prlimit64", |_| call(libc::SYS_prlimit64, [1, 0, 0, 0, 0, 0])),
    ("fchmodat", |_| call(libc::SYS_fchmodat, [0; 6])),
    ("number 99999", |_| call(99999, [0; 6])),
];

/// Each is refused with EACCES, and the process goes on.
const REFUSED: &[Attempt] = &[
    ("another image", |place| File::open(place.path("images/another")).map(drop)),
    ("passwd", |_| File::open("/etc/passwd").map(drop)),
    ("a new file", |place| File::create(place.path("elsewhere/x")).map(drop)),
    ("a new image", |place| File::create(place.path("images/x")).map(drop)),
    ("a file in the sockets' directory", |place| File::create(place.path("run/x")).map(drop)),
    ("another image's removal", |place| fs::remove_file(place.path("images/another"))),
    ("a directory", |place| fs::read_dir(place.path("images")).map(drop)),
    ("a device", |_| File::open("/dev/null").map(drop)),
    ("another process", |_| File::open(format!("/proc/{}/environ", std::os::unix::process::parent_id())).map(drop)),
    ("our own memory", |_| File::options().write(true).open("/proc/self/mem").map(drop)),
];

/// Each works.
const ALLOWED: &[Attempt] = &[
    ("the image", |place| File::options().read(true).write(true).open(place.path("images/disk")).map(drop)),
    ("a copy", |place| {
        let (partial, name) = (place.path("copies/x.partial"), place.path("copies/x"));
        File::options().read(true).write(true).create_new(true).open(&partial)?;
        fs::rename(&partial, &name)?;
        fs::remove_file(name)
    }),
    ("a thread", |_| std::thread::Builder::new().spawn(|| ()).map(|thread| thread.join().unwrap())),
    ("the end of a socket", |place| fs::remove_file(place.path("run/vhost"))),
];

const CHILD: &str = "VIRTIOBLKD_TEST_SANDBOX";

/// Not a test by itself: the intruder. It enters the sandbox of the daemon at that place and prints what came of its
/// attempt.
#[test]
#[ignore = "started by the others"]
fn child() {
    let Ok(attempt) = std::env::var(CHILD) else { return };
    let (root, name) = attempt.split_once(':').unwrap();
    let place = Place { root: root.into(), dir: None };
    let arguments = [vec!["virtioblkd".to_string()], place.arguments()].concat();
    let Ok(Invocation::Run(config)) = Config::from_args(arguments) else { panic!("{attempt}") };
    File::create(place.path("run/vhost")).unwrap();
    // Panics read the program's own file for their backtrace.
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    Sandbox::prepare(permissions::of(&config)).unwrap().enter().unwrap();
    let (_, attempt) = [DEADLY, REFUSED, ALLOWED].into_iter().flatten().find(|(known, _)| *known == name).unwrap();
    match attempt(&place) {
        Ok(()) => println!("RESULT: done"),
        Err(error) => println!("RESULT: {error}"),
    }
}

fn attempt(place: &Place, name: &str) -> Output {
    attempting(place, name).output().unwrap()
}

fn attempting(place: &Place, name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    command.env(CHILD, format!("{}:{name}", place.root.display()));
    command
}

#[test]
fn a_call_that_is_stopped_ends_the_daemon_while_nobody_reads_its_log() {
    let place = Place::new();
    let (name, _) = DEADLY[0];
    for unread in Unread::all() {
        let mut command = attempting(&place, name);
        let mut child = command.stdout(Stdio::null()).stderr(unread.output()).spawn().unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > end => {
                    child.kill().unwrap();
                    panic!("it does not end: {}", unread.name);
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{}", unread.name);
    }
}

#[test]
fn a_call_that_is_not_needed_ends_the_daemon_and_is_named() {
    let place = Place::new();
    for (name, _) in DEADLY {
        let output = attempt(&place, name);
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{name}: {output:?}");
        assert!(!output.status.core_dumped());
        contains(&String::from_utf8_lossy(&output.stderr), &["the sandbox stopped the system call", name]);
    }
}

#[test]
fn a_path_that_is_not_needed_is_refused() {
    if !has_landlock() {
        return;
    }
    let place = Place::new();
    for (name, _) in REFUSED {
        let output = attempt(&place, name);
        assert!(output.status.success(), "{name}: {output:?}");
        contains(&String::from_utf8_lossy(&output.stdout), &["RESULT: Permission denied"]);
    }
    assert!(place.path("images/another").exists());
}

#[test]
fn every_needed_call_and_path_is_allowed() {
    let place = Place::new();
    for (name, _) in ALLOWED {
        let output = attempt(&place, name);
        assert!(output.status.success(), "{name}: {output:?}");
        contains(&String::from_utf8_lossy(&output.stdout), &["RESULT: done"]);
    }
}
