//! Whatever a daemon or a guest's agent says, `virtioblkctl` prints nothing that a terminal obeys and no line that they
//! chose: neither on standard output nor on standard error, as text or as JSON.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use kit::snapshot::{Daemon, ctl};
use serde_json::{Value, json};

/// Escape sequences of both kinds (ESC and C1), DEL, controls of direction, separators of lines, and a forged line.
const EVIL: &str = "\u{1b}]0;x\u{7}\u{9b}2J\u{7f}\u{202e}\u{2066}\u{2028}\u{85}\r\nforged: all is well\n";

/// Whether a terminal would show these bytes as they are, and nothing in them begins a line.
fn is_harmless(output: &Output) {
    for bytes in [&output.stdout, &output.stderr] {
        let text = std::str::from_utf8(bytes).expect("text");
        for line in text.lines() {
            assert!(!line.starts_with("forged"), "{text:?}");
            let obeyed = |c: char| c.is_control() || ('\u{2028}'..='\u{202e}').contains(&c) || c == '\u{2066}';
            assert!(!line.contains(obeyed), "{text:?}");
        }
    }
}

/// The same value with everything in it hostile that says something: each text, number and name.
fn poisoned(value: &Value) -> Value {
    match value {
        Value::Array(list) => list.iter().map(poisoned).collect(),
        Value::Object(members) => {
            let evil = members.iter().map(|(name, value)| (name.clone(), poisoned(value)));
            evil.chain([(EVIL.to_owned(), json!(EVIL))]).collect()
        }
        Value::Bool(_) => value.clone(),
        _ => json!(EVIL),
    }
}

/// What a page is made of, beside what a daemon at rest says.
fn shapes() -> Value {
    json!({
        "image": "", "size": 1, "logical-block-size": 1, "trouble": "", "trouble-detail": "", "cache-mode": "",
        "write-acknowledged": "", "guest-flush": "", "guest-sees": "", "sync-failed": true,
        "stopped": {"operation": "", "message": "", "length": 1, "offset": 1, "ring": 1, "requests": 1},
        "stable-writes": {"in-effect": "", "asked": "", "why": "", "last-changed": [{"length": 1, "offset": 1}]},
        "rings": [{"index": 0, "size": 1, "reads": 1}], "total": {"reads": 1},
        "quiesce": {"state": "", "waiting": 1, "holders": [{"token": "", "who": "", "pid": 1, "uid": 1}]},
        "rbd": {"lock": "", "quiesce": {"watching": true}},
        "attendant": {"who": "", "pid": 1, "uid": 1, "present": true},
        "last-errors": [{"what": "", "when": 1}],
        "daemon": {"version": "", "pid": 1, "vhost-socket": "", "took-over": {"from-pid": 1}},
        "token": "", "drained": 1, "rings-held": 1, "holders": 1, "resumed": 1, "retried": 1, "copy": "", "state": "",
        "target": "", "error": "",
    })
}

/// How a daemon that is hostile answers.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Greeting,
    Replies,
    Errors,
    Events,
}

struct Hostile {
    dir: tempfile::TempDir,
}

impl Hostile {
    fn start(way: Way) -> Hostile {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("control")).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                // The client goes when it likes.
                std::thread::spawn(move || answer(stream, way));
            }
        });
        Hostile { dir }
    }

    fn control(&self) -> PathBuf {
        self.dir.path().join("control")
    }
}

fn answer(mut stream: UnixStream, way: Way) -> std::io::Result<()> {
    if way == Way::Greeting {
        return writeln!(stream, "{}", json!({EVIL: EVIL}));
    }
    writeln!(stream, "{}", json!({"QMP": {"version": {"qemu": {}}, "capabilities": []}}))?;
    for request in BufReader::new(stream.try_clone()?).lines() {
        let request: Value = serde_json::from_str(&request?)?;
        let is_first = request["execute"] == "qmp_capabilities";
        let reply = match way {
            _ if is_first => json!({"return": {}}),
            Way::Errors => json!({"error": {"class": EVIL, "code": EVIL, "desc": EVIL}}),
            _ if request["execute"] == "query-copies" => json!({"return": [poisoned(&shapes())]}),
            _ => json!({"return": poisoned(&shapes())}),
        };
        writeln!(stream, "{reply}")?;
        if way == Way::Events {
            let event = json!({"event": EVIL, "timestamp": {"seconds": EVIL}, "data": poisoned(&shapes())});
            writeln!(stream, "{event}")?;
        }
    }
    Ok(())
}

#[test]
fn control_characters_in_a_daemons_replies_are_escaped() {
    let commands: [&[&str]; 11] = [
        &["status"],
        &["stats"],
        &["copies"],
        &["copies", "cancel", "x"],
        &["quiesce"],
        &["quiesce", "--timeout", "1s", "--", "true"],
        &["resume", "--all"],
        &["continue"],
        &["resize", "--force"],
        &["quit"],
        &["snapshot", "--level", "crash", "--to", "copy:/nowhere/x"],
    ];
    for way in [Way::Greeting, Way::Replies, Way::Errors] {
        let hostile = Hostile::start(way);
        // One whose copy never ends is waited for until a signal comes.
        for arguments in commands.into_iter().filter(|it| it[0] != "snapshot" || way != Way::Replies) {
            for json in [&[][..], &["--json"]] {
                let output = ctl().arg("--control").arg(hostile.control()).args(json).args(arguments).output().unwrap();
                let said = [&output.stdout[..], &output.stderr].concat();
                assert!(!said.is_empty() || arguments.len() > 1, "{arguments:?} says nothing: {output:?}");
                is_harmless(&output);
            }
        }
    }
}

#[test]
fn json_of_a_daemon_is_escaped_and_keeps_its_values() {
    let hostile = Hostile::start(Way::Replies);
    let output = ctl().arg("--control").arg(hostile.control()).args(["--json", "status"]).output().unwrap();
    is_harmless(&output);
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap(), poisoned(&shapes()));
}

#[test]
fn an_event_with_control_characters_is_one_escaped_line() {
    for json in [&[][..], &["--json"]] {
        let hostile = Hostile::start(Way::Events);
        let mut command = ctl();
        command.arg("--control").arg(hostile.control()).args(json).arg("watch");
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdout = Vec::new();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        assert!(lines.read_until(b'\n', &mut stdout).unwrap() > 0, "no event");
        child.kill().unwrap();
        lines.read_to_end(&mut stdout).unwrap();
        let ended = child.wait_with_output().unwrap();
        assert_eq!(stdout.iter().filter(|byte| **byte == b'\n').count(), 1, "{:?}", String::from_utf8_lossy(&stdout));
        is_harmless(&Output { stdout, ..ended });
    }
}

/// A guest's agent that answers each command but a sync as `answer` says.
fn agent(path: &Path, answer: fn(&str) -> Value) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut requests = BufReader::new(stream.try_clone().unwrap());
            let mut line = Vec::new();
            while requests.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                let start = line.iter().rposition(|byte| *byte == 0xff).map_or(0, |at| at + 1);
                let request: Value = serde_json::from_slice(&line[start..]).unwrap();
                let command = request["execute"].as_str().unwrap();
                let written = match command {
                    "guest-sync-delimited" => stream
                        .write_all(b"\xff")
                        .and_then(|()| writeln!(stream, "{}", json!({"return": request["arguments"]["id"]}))),
                    _ => writeln!(stream, "{}", answer(command)),
                };
                if written.is_err() {
                    break;
                }
                line.clear();
            }
        }
    });
}

fn refusal() -> Value {
    json!({"error": {"class": EVIL, "desc": EVIL}})
}

/// As an agent that can freeze; its texts are hostile.
fn able(command: &str) -> Value {
    let filesystems = json!([
        {"name": EVIL, "mountpoint": EVIL, "type": EVIL}, {"name": "vda", "mountpoint": EVIL, "type": "ext4"},
    ]);
    let freeze = json!([{"name": "guest-fsfreeze-freeze", "enabled": true, "success-response": true}]);
    json!({"return": match command {
        "guest-fsfreeze-status" => json!("thawed"),
        "guest-info" => json!({"version": EVIL, "supported_commands": freeze}),
        "guest-get-osinfo" => json!({"id": EVIL, "name": EVIL, "pretty-name": EVIL}),
        "guest-get-fsinfo" => filesystems,
        "guest-fsfreeze-freeze" | "guest-fsfreeze-thaw" => json!(1),
        _ => json!(EVIL),
    }})
}

#[test]
fn control_characters_in_an_agents_replies_are_escaped() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let daemon = Daemon::with_image(dir.path(), "disk.img", 1 << 20);
    let agents: [fn(&str) -> Value; 5] = [
        |_| refusal(),
        |_| json!({"return": EVIL}),
        able,
        |command| if command == "guest-fsfreeze-freeze" { refusal() } else { able(command) },
        |command| if command == "guest-fsfreeze-thaw" { refusal() } else { able(command) },
    ];
    let mut shown = 0;
    for (at, answer) in agents.into_iter().enumerate() {
        let sockets = tempfile::tempdir().unwrap();
        let path = sockets.path().join("agent");
        agent(&path, answer);
        for (json, more) in [(&[][..], &[][..]), (&["--json"], &[]), (&[], &["--or-weaker"])] {
            let mut command = ctl();
            command.args(json).args(["snapshot", "--level", "filesystem", "--disk"]).arg(daemon.control());
            command.arg(format!("--to=copy:{}/copy-{at}-{shown}", dir.path().display())).arg("--qga").arg(&path);
            let output = command.args(more).output().unwrap();
            is_harmless(&output);
            let said = [output.stdout, output.stderr].concat();
            shown += usize::from(String::from_utf8_lossy(&said).contains("forged"));
        }
    }
    assert!(shown >= 6, "what the agent says is hardly shown: {shown}");
    // The daemon logged what concerns it.
    let log = Output { status: Default::default(), stdout: daemon.log().into_bytes(), stderr: Vec::new() };
    is_harmless(&log);
}

#[test]
fn what_a_client_says_is_logged_on_its_own_line() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let daemon = Daemon::with_image(dir.path(), "disk.img", 1 << 20);
    let quiesce = ctl().arg("--control").arg(daemon.control()).args(["quiesce", "--who", EVIL]).output().unwrap();
    assert!(quiesce.status.success(), "{quiesce:?}");
    let target = format!("--to=copy:{}/a\nforged: x", dir.path().display());
    let copy =
        ctl().args(["snapshot", "--level", "crash", "--disk"]).arg(daemon.control()).arg(target).output().unwrap();
    for output in [quiesce, copy] {
        is_harmless(&output);
    }
    let log = daemon.wait_for_log(&["forged"]);
    is_harmless(&Output { status: Default::default(), stdout: log.into_bytes(), stderr: Vec::new() });
}
