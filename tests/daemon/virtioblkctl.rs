//! The operator's command, as a process, against a served fake disk.

use std::io::{BufRead, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kit::control::{Served, WAIT_TIMEOUT};
use kit::upgrade;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use virtioblkd::disk::{Event, ImageStatus};

pub(crate) fn ctl(path: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkctl"));
    command.arg("--control").arg(path).stdin(Stdio::null());
    command
}

pub(crate) fn run(served: &Served, arguments: &[&str]) -> Output {
    ctl(&served.path).args(arguments).output().unwrap()
}

pub(crate) fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

pub(crate) fn ok(served: &Served, arguments: &[&str]) -> String {
    let output = run(served, arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    out(&output)
}

/// Starts it with its output in pipes.
pub(crate) fn start(served: &Served, arguments: &[&str]) -> Child {
    ctl(&served.path).args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

pub(crate) fn contains(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "'{word}' is not in:\n{text}");
    }
}

#[test]
fn status_is_a_page_and_stats_a_table() {
    let served = Served::new();
    let page = ok(&served, &["status"]);
    let words = [
        "raw file '/images/a.raw'",
        "10 GiB, 512-byte blocks",
        "none",
        "acknowledged when the host's device has it",
        "flush is synced",
        "sees a write back cache",
        "connected, driver ready (/run/vhost.sock)",
        "2 running, 6 in flight, 0 with a blocked write",
        "quiesced      no",
        "write at 4096: Input/output error",
        "virtioblkd 0.1.0",
    ];
    contains(&page, &words);
    let mut client = served.client();
    client.quiesce(json!({"who": "nightly", "lease-ms": 3_600_000}));
    contains(
        &ok(&served, &["status"]),
        &["1 with a blocked write", "1 holder", "by nightly (pid", "lease", " min left"],
    );
    let table = ok(&served, &["stats"]);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 4, "{table}");
    contains(lines[0], &["queue", "in-flight", "written", "syncs"]);
    contains(lines[2], &["1", "2000", "2.0 MiB", "yes"]);
    contains(lines[3], &["total", "3000"]);
    let status: Value = serde_json::from_str(&ok(&served, &["--json", "status"])).unwrap();
    assert_eq!(status["quiesce"]["holders"][0]["who"], "nightly");
    let stats: Value = serde_json::from_str(&ok(&served, &["stats", "--json"])).unwrap();
    assert_eq!(stats["total"]["reads"], 3000);
}

#[test]
fn a_check_has_an_exit_status_for_monitoring() {
    let served = Served::new();
    let well = run(&served, &["status", "--check"]);
    assert_eq!(well.status.code(), Some(0), "{well:?}");
    contains(&out(&well), &["OK: ", ": nothing is wrong\n"]);
    served.disk.set_image_status(ImageStatus {
        trouble: Some("fenced".into()),
        trouble_detail: Some("by another client".into()),
        ..ImageStatus::default()
    });
    let fenced = run(&served, &["status", "--check"]);
    assert_eq!(fenced.status.code(), Some(2), "{fenced:?}");
    contains(&out(&fenced), &["CRITICAL: ", "fenced: by another client"]);
    let json: Value = serde_json::from_str(&out(&run(&served, &["status", "--check", "--json"]))).unwrap();
    let only = json.as_object().unwrap().values().next().unwrap();
    assert_eq!(only["state"], "critical");
    let gone = ctl(Path::new("/nowhere/vda.ctl")).args(["status", "--check"]).output().unwrap();
    assert_eq!(gone.status.code(), Some(2), "{gone:?}");
    contains(&out(&gone), &["CRITICAL: /nowhere/vda.ctl: there is no socket"]);
    let unknown = ctl(Path::new("nothing")).args(["status", "--check"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(2), "{unknown:?}");
}

#[test]
fn an_interval_shows_rates_and_goes_on_with_the_next_daemon() {
    let mut served = Served::new();
    let lines = ok(&served, &["stats", "50ms", "3"]);
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines.len(), 4, "{lines:?}");
    contains(lines[0], &["UTC", "r/s", "w-p99", "state"]);
    let json = ok(&served, &["--json", "stats", "50ms", "1"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["read"]["requests-per-second"], &json["stopped"]), (&json!(0.0), &json!(false)));
    let mut running = start(&served, &["stats", "20ms"]);
    let mut lines = BufReader::new(running.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("UTC"));
    served.stop();
    served.restart();
    let mut errors = BufReader::new(running.stderr.take().unwrap()).lines();
    contains(&errors.next().unwrap().unwrap(), &["connected to another daemon"]);
    assert!(lines.next().unwrap().unwrap().contains(':'));
    running.kill().unwrap();
    running.wait().unwrap();
    let wrong = run(&served, &["stats", "often"]);
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");
}

#[test]
fn a_hold_is_given_more_time_by_its_token() {
    let served = Served::new();
    let text = ok(&served, &["quiesce", "--lease", "10m"]);
    let token = text.trim_end();
    contains(&ok(&served, &["renew", token, "--lease", "2m"]), &["lasts 2 min"]);
    contains(&ok(&served, &["renew", token, "--json"]), &["\"lease-ms\": 30000"]);
    let wrong = run(&served, &["renew", "0123456789abcdef"]);
    assert_eq!(wrong.status.code(), Some(1), "{wrong:?}");
    contains(&err(&wrong), &["virtioblkctl status"]);
    ok(&served, &["resume", token]);
    assert_eq!(run(&served, &["renew", token]).status.code(), Some(1), "it has ended");
}

#[test]
fn a_lease_that_max_hold_cuts_short_is_said_to_be_shorter() {
    let mut served = Served::new();
    contains(&err(&run(&served, &["quiesce", "--lease", "30s"])), &["the disk is held: "]);
    assert_eq!(ok(&served, &["resume", "--all"]), "1 hold ended: the guest's writes continue\n");
    assert_eq!(ok(&served, &["resume", "--all"]), "the disk was not held\n");
    served.stop();
    served.bound_holds(Duration::from_secs(60));
    served.restart();
    let output = run(&served, &["quiesce", "--lease", "5m"]);
    contains(&err(&output), &["the disk is held for ", " only, not 5 min, because the daemon's --max-hold"]);
    let renewed = ok(&served, &["renew", out(&output).trim_end(), "--lease", "5m"]);
    contains(&renewed, &["the hold lasts for ", " only, not 5 min", "--max-hold"]);
    ok(&served, &["resume", "--all"]);
    let output = run(&served, &["quiesce", "--lease", "5m", "--", "true"]);
    contains(&err(&output), &[" only, not 5 min, because the daemon's --max-hold"]);
}

#[test]
fn the_help_of_a_command_does_not_repeat_the_options_of_every_command() {
    let help = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_virtioblkctl")).args(arguments).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        out(&output)
    };
    contains(&help(&["--help"]), &["--control <DISK>", "--control-dir <DIR>", "VIRTIOBLK_CONTROL"]);
    for command in [&["quiesce", "--help"][..], &["domain", "check", "-h"], &["copies", "limit", "--help"]] {
        let text = help(command);
        assert!(!text.contains("--control <DISK>") && !text.contains("VIRTIOBLK_CONTROL"), "{text}");
        contains(&text, &["Options of every command: --control DISK, ", "virtioblkctl --help"]);
    }
    let served = Served::new();
    let path = served.path.to_str().unwrap();
    let mut after = Command::new(env!("CARGO_BIN_EXE_virtioblkctl"));
    let output = after.args(["status", "--control", path, "--json"]).output().unwrap();
    assert!(output.status.success() && out(&output).starts_with('{'), "{output:?}");
}

#[test]
fn a_disk_that_is_not_stopped_is_not_waited_for() {
    let served = Served::new();
    assert_eq!(ok(&served, &["continue", "--wait"]), "the disk was not stopped\n");
    assert_eq!(ok(&served, &["continue", "--wait=1s"]), "the disk was not stopped\n");
    assert_eq!(served.disk.closings(), 0, "and not held");
}

#[test]
fn watch_prints_until_no_daemon_is_left() {
    let mut served = Served::new();
    let mut text = start(&served, &["watch"]);
    let mut json = start(&served, &["watch", "--json"]);
    let mut lines = BufReader::new(text.stdout.take().unwrap()).lines();
    let mut json_lines = BufReader::new(json.stdout.take().unwrap()).lines();
    // Nobody says when it has connected, so something happens until it tells of it.
    let connected = AtomicBool::new(false);
    let first = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !connected.load(Ordering::SeqCst) {
                served.disk.events.send(Event::Disconnected("test".into()));
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let first = lines.next();
        json_lines.next().unwrap().unwrap();
        connected.store(true, Ordering::SeqCst);
        first
    });
    contains(&first.unwrap().unwrap(), &["Z FRONTEND_DISCONNECTED the front-end disconnected: test"]);
    served.client().quiesce(json!({"who": "x\u{1b}[2J"}));
    let line = lines.find(|line| line.as_ref().unwrap().contains("QUIESCED")).unwrap().unwrap();
    contains(&line, &["x\\u{1b}[2J (pid ", "holds the disk (", "12 requests drained in 1.5 ms"]);
    served.stop();
    assert!(lines.any(|line| line.unwrap().contains("SHUTDOWN")));
    // Another daemon is watched, too.
    served.restart();
    let connected = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !connected.load(Ordering::SeqCst) {
                served.disk.events.send(Event::Disconnected("again".into()));
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        assert!(lines.any(|line| line.unwrap().contains("again")), "it does not connect again");
        assert!(json_lines.any(|line| line.unwrap().contains("again")), "it does not connect again");
        connected.store(true, Ordering::SeqCst);
    });
    served.stop();
    assert!(lines.any(|line| line.unwrap().contains("SHUTDOWN")));
    let rest: Vec<Value> = json_lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    // Where there is none any more, it says so.
    let [.., last, error] = &rest[..] else { panic!("{rest:?}") };
    assert_eq!((&last["event"], &error["error"]["code"]), (&json!("SHUTDOWN"), &json!("no-daemon")));
    assert_eq!(text.wait().unwrap().code(), Some(1));
    assert_eq!(json.wait().unwrap().code(), Some(1));
}

#[test]
fn watch_that_loses_its_place_says_so_and_connects_again() {
    let served = Served::new();
    let listening: Vec<_> = (0..24).map(|_| served.client()).collect();
    let mut watch = start(&served, &["watch"]);
    let mut events = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut messages = BufReader::new(watch.stderr.take().unwrap()).lines();
    let mut shows_an_event = || {
        let is_shown = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let end = Instant::now() + WAIT_TIMEOUT;
                while !is_shown.load(Ordering::SeqCst) && Instant::now() < end {
                    served.disk.events.send(Event::Disconnected("test".into()));
                    std::thread::sleep(Duration::from_millis(10));
                }
            });
            assert!(events.next().is_some_and(|line| line.unwrap().contains("test")));
            is_shown.store(true, Ordering::SeqCst);
        });
    };
    shows_an_event();
    let mut others: Vec<_> = (0..7).map(|_| served.client()).collect();
    // The newest of 25 that only listen is the watch, and it has sent nothing for 5 s at last.
    let end = Instant::now() + WAIT_TIMEOUT;
    let newest = loop {
        for other in &mut others {
            other.ask("query-version", json!({})).unwrap();
        }
        let mut client = kit::control::Client::new(served.raw());
        if client.line()["QMP"].is_object() {
            break client;
        }
        assert!(Instant::now() < end, "the places stay taken");
        std::thread::sleep(Duration::from_millis(100));
    };
    drop((listening, newest, others));
    contains(&messages.next().unwrap().unwrap(), &["all places are taken", "connected again"]);
    shows_an_event();
    watch.kill().unwrap();
    watch.wait().unwrap();
}

#[test]
fn quit_asks_for_the_end() {
    let served = Served::new();
    contains(&ok(&served, &["quit"]), &["the daemon ends"]);
    // The reply is written before the daemon is told.
    let start = Instant::now();
    while served.quits.load(Ordering::SeqCst) == 0 {
        assert!(start.elapsed() < WAIT_TIMEOUT);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn errors_name_the_socket_the_cause_and_the_fix() {
    let dir = tempfile::tempdir().unwrap();
    let fails = |path: &Path, words: &[&str]| {
        let output = ctl(path).arg("status").output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        contains(&err(&output), words);
        contains(&err(&output), &["virtioblkctl: "]);
    };
    let missing = dir.path().join("missing");
    fails(&missing, &[missing.to_str().unwrap(), "no socket", "--control-path"]);
    let dead = dir.path().join("dead");
    drop(UnixListener::bind(&dead).unwrap());
    // A program that another test starts has a copy of the socket until its exec.
    upgrade::wait_until("nobody listens", || UnixStream::connect(&dead).is_err());
    fails(&dead, &["nobody listens", "start it again"]);
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    fails(&file, &["not a socket"]);
    fails(&dir.path().join("x".repeat(200)), &["107"]);
    let closing = dir.path().join("closing");
    let listener = UnixListener::bind(&closing).unwrap();
    std::thread::spawn(move || drop(listener.accept()));
    fails(&closing, &["closed the connection"]);
    let http = dir.path().join("http");
    let listener = UnixListener::bind(&http).unwrap();
    std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        std::io::Write::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n").unwrap();
        std::thread::sleep(WAIT_TIMEOUT);
    });
    fails(&http, &["does not speak QMP"]);
    let silent = dir.path().join("silent");
    let _listener = UnixListener::bind(&silent).unwrap();
    let start = Instant::now();
    fails(&silent, &["no answer", "--socket-path"]);
    assert!(start.elapsed() < WAIT_TIMEOUT, "it waits for five seconds, not for ever");
}

/// The vhost-user socket of a real daemon, free and with a front-end: it says at once that it is the wrong one.
#[test]
fn a_vhost_user_socket_given_as_control_socket_is_named_at_once() {
    let disk = upgrade::Disk::serve(&["--cache", "none"]);
    let says = || {
        let output = ctl(&disk.path("vhost")).arg("status").output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        contains(&err(&output), &["without a greeting", "--control-path", "--socket-path"]);
    };
    says();
    upgrade::wait_until("the place is free again", || disk.status()["connected"] == false);
    let _front_end = UnixStream::connect(disk.path("vhost")).unwrap();
    says();
    says();
}

#[test]
fn the_error_of_too_many_clients_names_the_limit() {
    let served = Served::new();
    let _others: Vec<_> = (0..32).map(|_| served.greeted()).collect();
    let output = run(&served, &["status"]);
    assert_eq!(output.status.code(), Some(1));
    contains(&err(&output), &["32 clients", "try again"]);
}

#[test]
fn another_user_is_let_in_only_if_the_mode_says_so() {
    if !kit::can_become_another_user() {
        return;
    }
    for (mode, allowed) in [(0o600, false), (0o666, true)] {
        let served = Served::with_mode(mode);
        let directory = served.path.parent().unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(directory, open).unwrap();
        // The binary's own directory may be closed to that user, so it gets a copy.
        let copy = directory.join("ctl");
        kit::programs::copy_program(Path::new(env!("CARGO_BIN_EXE_virtioblkctl")), &copy);
        let mut command = Command::new(&copy);
        std::os::unix::process::CommandExt::uid(&mut command, 65534);
        let output = command.arg("--control").arg(&served.path).arg("status").output().unwrap();
        assert_eq!(output.status.success(), allowed, "{output:?}");
        if !allowed {
            contains(&err(&output), &["permission denied", "widen the socket's mode"]);
        }
    }
}

#[test]
fn wrong_usage_is_explained() {
    let usage = |arguments: &[&str], words: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_virtioblkctl")).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        contains(&err(&output), words);
    };
    usage(&["status"], &["--control DISK", "Usage: virtioblkctl "]);
    let version = Command::new(env!("CARGO_BIN_EXE_virtioblkctl")).arg("--version").output().unwrap();
    contains(&out(&version), &["virtioblkctl ", env!("CARGO_PKG_VERSION")]);
    usage(&["--control", "x", "quiesce", "--lease", "30"], &["500ms", "--lease"]);
    usage(&["--control", "x", "resume"], &["--all"]);
    usage(&["domblkinfo", "vm1"], &["domblkinfo [--human] <DOMAIN> <DEVICE|--all>"]);
    usage(&["list", "--control-dir", "/no/such/place"], &["--control-dir '/no/such/place': No such file"]);
    usage(&["--control-dir", "/dev/null", "--control", "x", "status"], &["/dev/null': it is not a directory"]);
    usage(&["--control", "x", "resume", "t", "--all"], &["cannot be used with"]);
}

#[test]
fn libvirts_hook_gives_up_on_a_description_that_takes_too_long_to_read() {
    let dir = tempfile::tempdir().unwrap();
    // The parser compares each attribute with all others.
    let attributes: String = (0..800_000).map(|n| format!(" a{n}=''")).collect();
    let uuid = "6fd1f7a2-4c0b-4e0f-8a65-1a3c0d2e9b99";
    let xml = format!("<domain><name>a</name><uuid>{uuid}</uuid><metadata><x{attributes}/></metadata></domain>");
    std::fs::write(dir.path().join("xml"), xml).unwrap();
    let mut hook = Command::new(env!("CARGO_BIN_EXE_virtioblkctl"));
    hook.args(["libvirt-hook", "a", "release", "end", "-"]).env("XDG_RUNTIME_DIR", dir.path());
    let hook = hook.stdin(std::fs::File::open(dir.path().join("xml")).unwrap()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = Pid::from_child(&hook);
    let (sender, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(hook.wait_with_output().unwrap()));
    let output = ended.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|_| {
        kill_process(pid, Signal::KILL).unwrap();
        panic!("libvirt would wait for it");
    });
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    contains(&err(&output), &["domain's description takes longer than 10s to read"]);
}
