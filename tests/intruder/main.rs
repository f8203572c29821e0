//! An intruder: code of another (`intruder/intruder.c`) that runs inside the real daemon after it has entered its sandbox,
//! as an exploit's would, and tries to reach files, sockets, processes and the kernel, by calls and by rings. Each try is
//! refused but those that are named here, and what stands outside is as it was.
//!
//! A try that once worked stays in the list.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kit::control::WAIT_TIMEOUT;
use kit::rbd_stub;
use rustix::process::{Pid, Signal, kill_process};

const NOBODY: u32 = 65534;

/// What the daemon needs itself.
const NEEDED: &[&str] = &["open the image", "a pair of stream sockets", "ring: take a prepared one", "ring: read"];

/// What the client of a storage cluster needs: a network, libraries that are loaded when they are first used, and to read
/// about its own process.
const NEEDED_BY_RBD: &[&str] = &[
    "a pair of stream sockets",
    "socket inet stream",
    "socket inet datagram",
    "socket inet6 stream",
    "socket netlink route",
    "socket of family 2, type 1",
    "socket of family 2, type 2",
    "socket of family 10, type 1",
    "socket of family 10, type 2",
    "socket of family 16, type 2",
    "socket of family 16, type 3",
    "memory to run",
    "memory made runnable",
    "memory made runnable and writable",
    "a file of memory to run",
    "list the host's sockets",
    "open /dev/null",
];

/// The library, compiled once. `None`: there is no C compiler.
fn library() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    BUILT
        .get_or_init(|| {
            let made = Path::new(env!("CARGO_TARGET_TMPDIR")).join("intruder.so");
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/intruder/intruder.c");
            let mut cc = Command::new("cc");
            cc.args(["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", "-o"]);
            match cc.arg(&made).arg(source).arg("-ldl").status() {
                Ok(status) => assert!(status.success(), "the intruder was not built"),
                Err(error) => {
                    eprintln!("SKIPPED: no C compiler (cc: {error}): install the package gcc");
                    return None;
                }
            }
            Some(made)
        })
        .as_deref()
}

/// The version of Landlock that this kernel has, as the daemon's log names it.
fn landlock(log: &str) -> u32 {
    let version = log.split_once("Landlock V").map(|(_, rest)| rest.chars().take_while(char::is_ascii_digit).collect());
    version.map_or(0, |digits: String| digits.parse().unwrap())
}

/// What an intruder wants, and what would notice.
struct RingContext {
    dir: tempfile::TempDir,
    service: UnixListener,
    datagrams: UnixDatagram,
    abstract_name: String,
    abstract_datagrams: UnixDatagram,
    /// A process of the daemon's user.
    other: Child,
}

impl RingContext {
    fn new(user: u32) -> RingContext {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["images", "run", "copies", "elsewhere"] {
            fs::create_dir(path(name)).unwrap();
        }
        for name in ["images/disk", "images/another", "elsewhere/secret", "elsewhere/victim"] {
            fs::write(path(name), vec![1; 1 << 20]).unwrap();
            fs::set_permissions(path(name), fs::Permissions::from_mode(0o600)).unwrap();
        }
        // Where the filesystem has attributes.
        let _ = rustix::fs::setxattr(path("elsewhere/secret"), "user.hidden", b"x", rustix::fs::XattrFlags::CREATE);
        // To the rest of the system all of this is the intruder's.
        for name in ["", "images", "run", "copies", "elsewhere", "images/disk", "images/another", "elsewhere/secret"] {
            std::os::unix::fs::chown(path(name), Some(user), Some(user)).unwrap();
        }
        let service = UnixListener::bind(path("elsewhere/service")).unwrap();
        service.set_nonblocking(true).unwrap();
        let datagrams = UnixDatagram::bind(path("elsewhere/datagrams")).unwrap();
        for name in ["elsewhere/service", "elsewhere/datagrams"] {
            fs::set_permissions(path(name), fs::Permissions::from_mode(0o777)).unwrap();
        }
        let abstract_name = dir.path().file_name().unwrap().to_str().unwrap().to_string();
        let abstract_datagrams =
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&abstract_name).unwrap()).unwrap();
        for datagrams in [&datagrams, &abstract_datagrams] {
            datagrams.set_nonblocking(true).unwrap();
        }
        let mut sleep = Command::new("sleep");
        let other = sleep.arg("600").uid(user).gid(user).spawn().unwrap();
        RingContext { dir, service, datagrams, abstract_name, abstract_datagrams, other }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a daemon with the intruder inside. What came of each try, by its name, and the log.
    fn invade(&self, library: &Path, arguments: &[&str], change: impl FnOnce(&mut Command)) -> (Tries, String) {
        let (tries, log) = (self.path("tries"), self.path("log"));
        File::create(&tries).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
        command.arg("--socket-path").arg(self.path("run/vhost")).arg("--control-path").arg(self.path("run/control"));
        command.arg("--copy-dir").arg(self.path("copies")).args(arguments);
        command.env("LD_PRELOAD", library).env("INTRUDER_OUT", &tries).env("INTRUDER_BASE", self.dir.path());
        command.env("INTRUDER_ABSTRACT", format!("@{}", self.abstract_name));
        command.env("INTRUDER_OTHER", self.other.id().to_string());
        command.stdin(Stdio::null()).stderr(File::create(&log).unwrap());
        change(&mut command);
        let mut daemon = command.spawn().unwrap();
        let text = |path: &Path| fs::read_to_string(path).unwrap();
        let end = Instant::now() + WAIT_TIMEOUT;
        while !(text(&tries).ends_with("end\n") && text(&log).contains("serving on")) {
            let ended = daemon.try_wait().unwrap();
            assert!(ended.is_none(), "it ended ({ended:?}): {}\n{}", text(&log), text(&tries));
            assert!(Instant::now() < end, "the intruder hangs: {}\n{}", text(&log), text(&tries));
            std::thread::sleep(Duration::from_millis(5));
        }
        kill_process(Pid::from_child(&daemon), Signal::TERM).unwrap();
        let status = daemon.wait().unwrap();
        assert!(status.success(), "{status}: {}", text(&log));
        (Tries::new(&text(&tries)), text(&log))
    }

    /// Nothing outside has changed or heard anything; `datagrams`: but for those.
    fn are_untouched(&mut self, datagrams: bool) {
        assert!(self.service.accept().is_err(), "the service was called");
        if !datagrams {
            for socket in [&self.datagrams, &self.abstract_datagrams] {
                assert!(socket.recv(&mut [0; 64]).is_err(), "a datagram came");
            }
        }
        for name in ["images/another", "elsewhere/secret", "elsewhere/victim"] {
            let found = fs::metadata(self.path(name)).unwrap();
            assert_eq!((found.len(), found.permissions().mode() & 0o7777), (1 << 20, 0o600), "{name}");
            let mut value = [0; 64];
            let attribute = rustix::fs::getxattr(self.path(name), "user.intruder", &mut value);
            assert!(attribute.is_err(), "{name} has an attribute of the intruder's");
        }
        for name in ["run", "copies"] {
            assert_eq!(fs::read_dir(self.path(name)).unwrap().count(), 0, "{name} is empty");
        }
        assert!(self.other.try_wait().unwrap().is_none(), "the other process lives");
    }
}

impl Drop for RingContext {
    fn drop(&mut self) {
        // It may have been ended by the intruder.
        let _ = self.other.kill();
        let _ = self.other.wait();
    }
}

/// What came of each try: "OK", "stopped" or an error's number.
struct Tries(BTreeMap<String, String>);

impl Tries {
    fn new(text: &str) -> Tries {
        let pair = |line: &str| line.rsplit_once(": ").map(|(name, result)| (name.to_string(), result.to_string()));
        Tries(text.lines().filter_map(pair).collect())
    }

    /// Those that worked are those, and no other.
    #[track_caller]
    fn worked(&self, expected: &[&str]) {
        let mut worked: Vec<_> = self.0.iter().filter(|(_, result)| *result == "OK").map(|(name, _)| &**name).collect();
        let mut expected = expected.to_vec();
        worked.sort_unstable();
        expected.sort_unstable();
        assert_eq!(worked, expected, "{:#?}", self.0);
    }
}

/// Whether the tests can run: root (for other users), Landlock, and a compiler.
fn prerequisites() -> Option<&'static Path> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can become somebody else");
        return None;
    }
    if fs::read_to_string("/sys/kernel/security/lsm").is_ok_and(|modules| !modules.contains("landlock")) {
        eprintln!("SKIPPED: this kernel has no Landlock");
        return None;
    }
    library()
}

#[test]
fn an_intruder_in_a_daemon_of_a_file_reaches_nothing_but_the_image() {
    let Some(library) = prerequisites() else { return };
    for (name, user) in [("root", 0), ("nobody", NOBODY)] {
        for cache in ["none", "writeback"] {
            let mut around = RingContext::new(user);
            let image = around.path("images/disk");
            let arguments = ["--user", name, "--cache", cache, "--blk-file", image.to_str().unwrap()];
            let (tries, _) = around.invade(library, &arguments, |_| ());
            assert!(tries.0.len() > 900, "{}: {:#?}", tries.0.len(), tries.0);
            tries.worked(NEEDED);
            around.are_untouched(false);
        }
    }
}

/// A datagram socket sends to any other that its user may write to, until the kernel's rules on paths know sockets.
#[test]
fn through_systemds_socket_an_intruder_reaches_no_more_than_the_kernel_lets_it() {
    let Some(library) = prerequisites() else { return };
    let mut around = RingContext::new(NOBODY);
    let (image, notify) = (around.path("images/disk"), around.path("elsewhere/notify"));
    let systemd = UnixDatagram::bind(&notify).unwrap();
    fs::set_permissions(&notify, fs::Permissions::from_mode(0o777)).unwrap();
    let arguments = ["--user", "nobody", "--blk-file", image.to_str().unwrap()];
    let (tries, log) = around.invade(library, &arguments, |command| {
        command.env("NOTIFY_SOCKET", &notify);
    });
    let mut expected = NEEDED.to_vec();
    let gaps =
        [(9, "a datagram through systemd's socket"), (6, "a datagram through systemd's socket to an abstract name")];
    for (version, what) in gaps {
        assert!(tries.0.contains_key(what), "{:#?}", tries.0);
        if landlock(&log) < version {
            expected.push(what);
        }
    }
    tries.worked(&expected);
    assert_eq!(log.contains("warn: this kernel's rules on paths"), expected.len() > NEEDED.len(), "{log}");
    around.are_untouched(true);
    let mut note = [0; 64];
    let mut told =
        || systemd.recv(&mut note).map(|length| String::from_utf8_lossy(&note[..length]).into_owned()).unwrap();
    assert_eq!((told(), told()), ("READY=1".to_string(), "STOPPING=1".to_string()));
}

#[test]
fn an_intruder_in_a_daemon_without_an_image_has_no_rings() {
    let Some(library) = prerequisites() else { return };
    let mut around = RingContext::new(0);
    let (tries, _) = around.invade(library, &["--user", "root", "--backend", "null"], |_| ());
    tries.worked(&["a pair of stream sockets"]);
    around.are_untouched(false);
}

/// It connects to a cluster, so it may connect to anything over the Internet's protocols, and its libraries bring new code.
/// Files, rings, processes, Unix sockets and the modes of files are closed to it all the same.
#[test]
fn an_intruder_in_a_daemon_of_an_rbd_image_has_a_network_and_no_more() {
    let Some(library) = prerequisites() else { return };
    for (name, user) in [("root", 0), ("nobody", NOBODY)] {
        let mut around = RingContext::new(user);
        let ceph = rbd_stub::libraries(false).to_str().unwrap();
        let (tries, _) = around.invade(library, &["--user", name, "--rbd", "p/i", "--ceph-library-path", ceph], |_| ());
        // Its memory is root's file, since nobody may debug it (PR_SET_DUMPABLE).
        let its_own = if user == 0 { vec!["read our memory"] } else { Vec::new() };
        tries.worked(&[NEEDED_BY_RBD.to_vec(), its_own].concat());
        around.are_untouched(false);
    }
}
