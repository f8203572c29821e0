//! UNSAFE. What must end a process, or be refused, is tried by this test's own program, started again as `child`, which
//! enters the same sandbox. The unsafe calls are the intruder's: system calls by their numbers.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use kit::unread::Unread;
use virtioblkd::internal::config::{Config, Invocation};
use virtioblkd::internal::sandbox::Sandbox;
use virtioblkd::internal::server::permissions;

use super::place::*;

/// Whether this kernel has rules on paths (landlock_create_ruleset(2), LANDLOCK_CREATE_RULESET_VERSION).
pub(super) fn has_landlock() -> bool {
    let version = call(libc::SYS_landlock_create_ruleset, [0, 0, 1, 0, 0, 0]);
    if let Err(error) = &version {
        eprintln!("SKIPPED: no Landlock: {error}");
    }
    version.is_ok()
}

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
    command.args(["calls::child", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    command.env(CHILD, format!("{}:{name}", place.root.display()));
    command
}

#[test]
fn a_stopped_system_call_ends_the_daemon_while_its_log_is_not_read() {
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
fn a_system_call_that_is_not_needed_ends_the_daemon_and_is_named() {
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
