//! The daemon's manners, with the real program: what it binds, refuses, writes, removes, and how it ends.
//!
//! The image is `--backend null` wherever the image does not matter.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, kill_process};

/// How long anything may take on a loaded machine before the test gives up.
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

struct Daemon {
    child: Child,
    log: Receiver<String>,
    seen: Vec<String>,
}

impl Daemon {
    /// Starts the program; it may fail.
    fn start(args: &[&str]) -> Self {
        Self::spawn(Command::new(env!("CARGO_BIN_EXE_virtioblkd")).args(args))
    }

    /// Starts the program and waits until it serves.
    fn serving(args: &[&str]) -> Self {
        let mut daemon = Self::start(args);
        daemon.wait_for("serving on");
        daemon
    }

    fn spawn(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("the program starts");
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        let (sender, log) = channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Daemon { child, log, seen: Vec::new() }
    }

    /// Reads the log up to a line with this text.
    fn wait_for(&mut self, text: &str) -> String {
        loop {
            match self.log.recv_timeout(WAIT_TIMEOUT) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no '{text}' came in the log: {:#?}", self.seen),
                Err(RecvTimeoutError::Disconnected) => panic!("it ended before '{text}': {:#?}", self.seen),
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    /// Waits for the end; the status and the whole log.
    fn ended(mut self) -> (ExitStatus, String) {
        loop {
            match self.log.recv_timeout(WAIT_TIMEOUT) {
                Ok(line) => self.seen.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("it does not end: {:#?}", self.seen),
            }
        }
        (self.child.wait().expect("a child of ours"), self.seen.join("\n"))
    }

    fn ends_well(self) -> String {
        let (status, log) = self.ended();
        assert_eq!(status.code(), Some(0), "{log}");
        log
    }

    /// Ends with status 1 and says all of this.
    fn fails(self, parts: &[&str]) {
        let (status, log) = self.ended();
        assert_eq!(status.code(), Some(1), "{log}");
        for part in parts {
            assert!(log.contains(part), "'{part}' is missing in: {log}");
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

/// A directory of the test's own.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Place(tempfile::tempdir().expect("a temporary directory"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `--option=PATH` of this name.
    fn arg(&self, option: &str, name: &str) -> String {
        format!("--{option}={}", self.path(name).display())
    }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("somebody listens");
    stream.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a timeout");
    stream
}

/// Waits for the other side's end.
fn closed_by_peer(mut stream: &UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(length) => length == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

fn still_open(mut stream: &UnixStream) -> bool {
    stream.set_nonblocking(true).expect("ours");
    let open = stream.read(&mut [0]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
    stream.set_nonblocking(false).expect("ours");
    open
}

/// GET_FEATURES; the reply is a header and eight bytes.
fn get_features() -> Vec<u8> {
    [1u32, 1, 0].map(u32::to_ne_bytes).concat()
}

fn asks_for_features(mut front_end: &UnixStream) -> std::io::Result<()> {
    front_end.write_all(&get_features())?;
    front_end.read_exact(&mut [0; 20])
}

/// A front-end that has spoken. On a loaded machine it may take longer than the two seconds in which it must say
/// something while another is there; then it comes again.
fn speaking_front_end(path: &Path) -> UnixStream {
    let end = Instant::now() + WAIT_TIMEOUT;
    loop {
        let front_end = connect(path);
        if asks_for_features(&front_end).is_ok() {
            return front_end;
        }
        assert!(Instant::now() < end, "no front-end is served");
    }
}

const NULL: &str = "--backend=null";

#[test]
fn each_ending_signal_removes_what_was_made_and_ends_well() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let place = Place::new();
        let args = [
            place.arg("socket-path", "s"),
            place.arg("control-path", "c"),
            place.arg("pid-file", "pid"),
            NULL.to_string(),
        ];
        let mut daemon = Daemon::serving(&args.each_ref().map(String::as_str));
        assert!(place.path("s").metadata().unwrap().file_type().is_socket());
        assert!(place.path("c").metadata().unwrap().file_type().is_socket());
        assert_eq!(std::fs::read_to_string(place.path("pid")).unwrap(), format!("{}\n", daemon.child.id()));

        let front_end = connect(&place.path("s"));
        daemon.wait_for("front-end connected");
        daemon.signal(signal);
        assert!(closed_by_peer(&front_end));
        let log = daemon.ends_well();
        assert!(log.contains("drained and synced"), "{log}");
        assert_eq!(std::fs::read_dir(place.0.path()).unwrap().count(), 0, "something was left behind");
    }
}

#[test]
fn an_ignored_sighup_stays_ignored() {
    let place = Place::new();
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_virtioblkd"), NULL]);
    let mut daemon = Daemon::spawn(command.arg(place.arg("socket-path", "s")));
    daemon.wait_for("serving on");
    daemon.signal(Signal::HUP);
    // A signal is looked at before a connection is.
    let _front_end = connect(&place.path("s"));
    daemon.wait_for("front-end connected");
    daemon.signal(Signal::TERM);
    daemon.ends_well();
}

#[test]
fn quit_on_the_control_socket_ends_the_daemon() {
    let place = Place::new();
    let mut daemon = Daemon::serving(&[NULL, &place.arg("socket-path", "s"), &place.arg("control-path", "c")]);
    let mut control = connect(&place.path("c"));
    control.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n").unwrap();
    daemon.wait_for("sent quit");
    daemon.ends_well();
    assert!(!place.path("s").exists() && !place.path("c").exists());
}

#[test]
fn a_second_front_end_is_turned_away_and_the_next_served() {
    let place = Place::new();
    let mut daemon = Daemon::serving(&[NULL, &place.arg("socket-path", "s")]);
    let first = connect(&place.path("s"));
    daemon.wait_for("front-end connected");
    let second = connect(&place.path("s"));
    assert!(closed_by_peer(&second));
    let line = daemon.wait_for("turned away");
    assert!(line.contains(&format!("pid {}", std::process::id())), "{line}");
    assert!(still_open(&first));
    drop(first);
    // Another test's child may hold the first connection open between its fork and its exec.
    daemon.wait_for("front-end disconnected");
    let third = connect(&place.path("s"));
    daemon.wait_for("front-end connected");
    assert!(still_open(&third));
    daemon.signal(Signal::TERM);
    daemon.ends_well();
}

/// Somebody who connects and says nothing, or not what a front-end says, does not keep a front-end out.
#[test]
fn a_silent_connection_gives_way_to_a_front_end() {
    let place = Place::new();
    let mut daemon = Daemon::serving(&[NULL, &place.arg("socket-path", "s")]);
    let silent = connect(&place.path("s"));
    daemon.wait_for("front-end connected");
    // A babbler that is too slow counts as silent: then another comes.
    while {
        let mut babbler = connect(&place.path("s"));
        let _ = babbler.write_all(b"{\"execute\":\"qmp_capabilities\"}\r\n");
        assert!(closed_by_peer(&babbler));
        let line = daemon.wait_for("turned away");
        assert!(line.contains("does not speak vhost-user") || line.contains("sent nothing for two seconds"), "{line}");
        !line.contains("does not speak vhost-user")
    } {}
    assert!(still_open(&silent));
    let front_end = speaking_front_end(&place.path("s"));
    daemon.wait_for("replaces it");
    daemon.wait_for("front-end connected");
    assert!(closed_by_peer(&silent));
    // One that has spoken stays, whatever comes.
    let mut late = connect(&place.path("s"));
    // It may be closed already.
    let _ = late.write_all(&get_features());
    assert!(closed_by_peer(&late));
    asks_for_features(&front_end).unwrap();
    daemon.signal(Signal::TERM);
    daemon.ends_well();
}

/// Nobody else wants the disk, but somebody should know why the guest has none.
#[test]
fn a_front_end_that_sends_nothing_is_logged_once() {
    let place = Place::new();
    let mut daemon = Daemon::serving(&[NULL, &place.arg("socket-path", "s")]);
    let silent = connect(&place.path("s"));
    let line = daemon.wait_for("has sent no message");
    assert!(line.contains(&format!("pid {}", std::process::id())) && line.contains("unplug"), "{line}");
    assert!(still_open(&silent));
    // One that sent something is not silent.
    drop(silent);
    daemon.wait_for("front-end disconnected");
    let _front_end = speaking_front_end(&place.path("s"));
    std::thread::sleep(std::time::Duration::from_secs(11));
    daemon.signal(Signal::TERM);
    let (status, log) = daemon.ended();
    assert!(status.success() && log.matches("has sent no message").count() == 1, "{status}: {log}");
}

/// Silent connections are bounded in number and in time, and cost no descriptors that a front-end needs.
#[test]
fn silent_connections_are_bounded_in_number_and_time() {
    let place = Place::new();
    let daemon = Daemon::serving(&[NULL, &place.arg("socket-path", "s")]);
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", daemon.child.id())).unwrap().count();
    let before = descriptors();
    let silent: Vec<_> = (0..100).map(|_| connect(&place.path("s"))).collect();
    // All but the first, which nobody challenges.
    assert!(silent[1..].iter().all(closed_by_peer));
    assert!(still_open(&silent[0]));
    assert!(descriptors() < before + 20, "{before}, then {}", descriptors());
    let _front_end = speaking_front_end(&place.path("s"));
    daemon.signal(Signal::TERM);
    daemon.ends_well();
}

#[test]
fn a_dead_servers_socket_and_pid_file_are_taken_over() {
    let place = Place::new();
    let args = [NULL, &place.arg("socket-path", "s"), &place.arg("pid-file", "pid")];
    let mut killed = Daemon::serving(&args);
    killed.child.kill().unwrap();
    killed.child.wait().unwrap();
    assert!(place.path("s").exists() && place.path("pid").exists());
    let mut daemon = Daemon::serving(&args);
    assert_eq!(std::fs::read_to_string(place.path("pid")).unwrap(), format!("{}\n", daemon.child.id()));
    let _front_end = connect(&place.path("s"));
    daemon.wait_for("front-end connected");
    daemon.signal(Signal::TERM);
    daemon.ends_well();
    assert!(!place.path("s").exists() && !place.path("pid").exists());
}

#[test]
fn a_living_servers_socket_and_pid_file_are_left_alone() {
    let place = Place::new();
    let socket = place.arg("socket-path", "s");
    let pid_file = place.arg("pid-file", "pid");
    let control = place.arg("control-path", "c");
    let mut daemon = Daemon::serving(&[NULL, &socket, &pid_file, &control]);
    let path = place.path("s");
    Daemon::start(&[NULL, &socket]).fails(&["--socket-path", path.to_str().unwrap(), "already"]);
    let path = place.path("c");
    Daemon::start(&[NULL, &place.arg("socket-path", "s2"), &control]).fails(&[
        "--control-path",
        path.to_str().unwrap(),
        "already",
    ]);
    let path = place.path("pid");
    let pid = format!("pid {}", daemon.child.id());
    Daemon::start(&[NULL, &place.arg("socket-path", "s2"), &pid_file]).fails(&[path.to_str().unwrap(), &pid, "held"]);
    assert!(!place.path("s2").exists(), "a failed start leaves nothing");
    assert_eq!(std::fs::read_to_string(place.path("pid")).unwrap(), format!("{}\n", daemon.child.id()));

    // The first served all the while; the attempts above may have been its front-ends for a moment.
    drop(connect(&place.path("c")));
    daemon.signal(Signal::TERM);
    let log = daemon.ends_well();
    assert!(!log.contains("left alone"), "{log}");
    daemon = Daemon::serving(&[NULL, &socket]);
    daemon.signal(Signal::TERM);
    daemon.ends_well();
}

#[test]
fn files_that_replaced_our_sockets_are_not_removed() {
    let place = Place::new();
    let mut daemon = Daemon::serving(&[NULL, &place.arg("socket-path", "s"), &place.arg("pid-file", "pid")]);
    for name in ["s", "pid"] {
        std::fs::rename(place.path(name), place.path(&format!("{name}.old"))).unwrap();
        std::fs::write(place.path(name), "another's").unwrap();
    }
    daemon.signal(Signal::TERM);
    daemon.wait_for("no longer ours");
    daemon.ends_well();
    for name in ["s", "pid"] {
        assert_eq!(std::fs::read_to_string(place.path(name)).unwrap(), "another's");
    }
}

#[test]
fn a_path_that_cannot_be_a_socket_is_named_with_the_reason() {
    let place = Place::new();
    std::fs::write(place.path("file"), "precious").unwrap();
    let file = place.path("file");
    Daemon::start(&[NULL, &place.arg("socket-path", "file")]).fails(&[file.to_str().unwrap(), "not a socket"]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    let long = "x".repeat(200);
    Daemon::start(&[NULL, &place.arg("socket-path", &long)]).fails(&["--socket-path", &long, "107"]);
    let nowhere = place.path("none/s");
    Daemon::start(&[NULL, &place.arg("socket-path", "none/s")]).fails(&[nowhere.to_str().unwrap(), "directory"]);
    Daemon::start(&[NULL, &place.arg("socket-path", "s"), &place.arg("control-path", "file")]).fails(&[
        "--control-path",
        file.to_str().unwrap(),
        "not a socket",
    ]);
    let link = place.path("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    Daemon::start(&[NULL, &place.arg("socket-path", "s"), &place.arg("pid-file", "link")])
        .fails(&["pid file", link.to_str().unwrap()]);
    assert!(!place.path("s").exists(), "a failed start leaves nothing");
}

#[test]
fn the_image_is_opened_before_anything_listens() {
    let place = Place::new();
    let image = place.path("none.img");
    let daemon = Daemon::start(&[
        &place.arg("socket-path", "none/s"),
        &place.arg("control-path", "none/c"),
        &place.arg("blk-file", "none.img"),
    ]);
    // Were a socket bound first, its missing directory would be the complaint.
    daemon.fails(&[image.to_str().unwrap(), "such file"]);
}

#[test]
fn the_socket_is_its_owners_unless_told_otherwise() {
    let place = Place::new();
    let ours = std::fs::metadata(place.0.path()).unwrap().gid();
    let group = format!("--socket-group={ours}");
    for (more, mode) in [
        (vec![], 0o600),
        (vec!["--socket-mode=0666"], 0o666),
        (vec![group.as_str()], 0o660),
        (vec![group.as_str(), "--socket-mode=0620"], 0o620),
    ] {
        let socket = place.arg("socket-path", "s");
        let daemon = Daemon::serving(&[&[NULL, &socket], &more[..]].concat());
        let metadata = place.path("s").metadata().unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, mode, "{more:?}");
        assert_eq!(metadata.gid(), ours);
        daemon.signal(Signal::TERM);
        daemon.ends_well();
    }
    Daemon::start(&[NULL, &place.arg("socket-path", "s"), "--socket-group=no-such-group"]).fails(&[
        "--socket-group",
        "'no-such-group'",
        "getent",
    ]);
}

/// A number that a child inherits, as long as the value lives.
fn inheritable<T: std::os::fd::AsFd + AsRawFd>(fd: &T) -> String {
    fcntl_setfd(fd, FdFlags::empty()).expect("ours");
    format!("--fd={}", fd.as_raw_fd())
}

#[test]
fn an_inherited_socket_is_served_and_left_where_it_is() {
    let place = Place::new();
    let listener = UnixListener::bind(place.path("s")).unwrap();
    let mut daemon = Daemon::serving(&[NULL, &inheritable(&listener)]);
    let front_end = connect(&place.path("s"));
    daemon.wait_for("front-end connected");
    daemon.signal(Signal::TERM);
    assert!(closed_by_peer(&front_end));
    daemon.ends_well();
    assert!(place.path("s").exists());
}

#[test]
fn an_inherited_descriptor_of_another_kind_is_refused() {
    let place = Place::new();
    let mend = "listen(2)";
    Daemon::start(&[NULL, "--fd=987"]).fails(&["--fd 987", "inherited", "Bad file descriptor", mend]);
    let file = std::fs::File::create(place.path("file")).unwrap();
    Daemon::start(&[NULL, &inheritable(&file)]).fails(&["not a socket", mend]);
    let (connected, _other) = UnixStream::pair().unwrap();
    Daemon::start(&[NULL, &inheritable(&connected)]).fails(&["does not listen", mend]);
    let datagram = UnixDatagram::bind(place.path("d")).unwrap();
    Daemon::start(&[NULL, &inheritable(&datagram)]).fails(&["not a Unix stream socket", mend]);
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    Daemon::start(&[NULL, &inheritable(&tcp)]).fails(&["not a Unix stream socket", mend]);
}

#[test]
fn the_configuration_file_says_what_is_served_and_the_command_line_wins() {
    let place = Place::new();
    let text = format!(
        "socket-path = \"{}\"\nbackend = \"null\"\ncache = \"unsafe\"\npid-file = \"{}\"\n",
        place.path("file.sock").display(),
        place.path("pid").display()
    );
    std::fs::write(place.path("disk.toml"), text).unwrap();
    let mut daemon = Daemon::start(&[&place.arg("config", "disk.toml"), &place.arg("socket-path", "argument.sock")]);
    let line = daemon.wait_for("serving on");
    assert!(line.contains("cache mode unsafe"), "{line}");
    assert!(place.path("argument.sock").exists() && !place.path("file.sock").exists());
    assert!(place.path("pid").exists());
    daemon.signal(Signal::TERM);
    daemon.ends_well();
}

#[test]
fn systemd_is_notified_of_start_and_end() {
    let place = Place::new();
    let systemd = UnixDatagram::bind(place.path("notify")).unwrap();
    systemd.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
    command.args([NULL, &place.arg("socket-path", "s")]).env("NOTIFY_SOCKET", place.path("notify"));
    let daemon = Daemon::spawn(&mut command);
    let told = || {
        let mut text = [0; 64];
        let length = systemd.recv(&mut text).expect("it tells");
        String::from_utf8(text[..length].to_vec()).expect("text")
    };
    assert_eq!(told(), "READY=1");
    assert!(place.path("s").exists(), "ready means that it listens");
    daemon.signal(Signal::TERM);
    assert_eq!(told(), "STOPPING=1");
    daemon.ends_well();
}

#[test]
fn the_limit_of_open_files_is_raised_to_the_hard_one() {
    let place = Place::new();
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -Sn 64; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_virtioblkd"), NULL]);
    let mut daemon = Daemon::spawn(command.arg(place.arg("socket-path", "s")));
    daemon.wait_for("serving on");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.child.id())).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let limits: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(limits[0], limits[1]);
    assert_ne!(limits[0], "64");
    daemon.signal(Signal::TERM);
    daemon.ends_well();
}

#[test]
fn log_lines_below_the_level_are_left_out() {
    let place = Place::new();
    let daemon = Daemon::start(&[NULL, "--log-level=error", &place.arg("socket-path", "none/s")]);
    let (status, log) = daemon.ended();
    assert_eq!(status.code(), Some(1));
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains(" error: --socket-path: "), "{log}");
}

#[test]
fn the_journal_gets_priorities_instead_of_times() {
    let place = Place::new();
    let file = std::fs::File::create(place.path("journal")).unwrap();
    let stream = file.metadata().map(|stat| format!("{}:{}", stat.dev(), stat.ino())).unwrap();
    let status = Command::new(env!("CARGO_BIN_EXE_virtioblkd"))
        .args([NULL, &place.arg("socket-path", "none/s")])
        .env("JOURNAL_STREAM", stream)
        .stderr(file)
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(1));
    let log = std::fs::read_to_string(place.path("journal")).unwrap();
    assert!(log.starts_with("<3>--socket-path: "), "{log}");
}
