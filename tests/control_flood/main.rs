//! Careless and hostile clients of the real daemon's control socket, all at once, while a guest works: the guest goes on,
//! the daemon stays small and answers whoever asks properly, and what a client held is let go.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kit::control::{Client, WAIT_TIMEOUT};
use kit::driver::{ALL, Driver};
use kit::upgrade::Disk;
use kit::wait::wait_until;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

const MIB: usize = 1 << 20;

/// A daemon that serves a RAM disk.
struct Daemon(Disk);

impl Daemon {
    fn start() -> Daemon {
        Daemon(Disk::serve_in(kit::programs::disk_dir(), &["--backend", "mem:1048576", "--cache", "writeback"]))
    }

    fn log(&self) -> String {
        self.0.log()
    }

    fn connect(&self) -> std::io::Result<UnixStream> {
        UnixStream::connect(self.0.path("control"))
    }

    /// A client that does all properly. Its place may have to be waited for.
    fn client(&self) -> Client {
        let end = Instant::now() + WAIT_TIMEOUT;
        loop {
            assert!(Instant::now() < end, "nobody is let in: {}", self.log());
            if let Some(client) = self.connect().ok().and_then(greeted) {
                return client;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn guest(&self) -> Driver {
        Driver::connect_soon(&self.0.path("vhost"), 1, 64, MIB, ALL)
    }

    /// Descriptors, and kilobytes of memory.
    fn size(&self) -> (usize, u64) {
        let pid = self.0.child.id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let resident = resident.trim().trim_end_matches(" kB").parse().unwrap();
        (fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(), resident)
    }
}

/// Whether the disk is open, quiesced or on the way there.
fn hold_state(client: &mut Client) -> serde_json::Value {
    client.ask("query-status", json!({})).unwrap()["quiesce"]["state"].take()
}

/// `None`: it was turned away.
fn greeted(stream: UnixStream) -> Option<Client> {
    stream.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
    let mut first = [0; 1];
    let mut peeked = stream.try_clone().unwrap();
    // The greeting is an object with QMP in it; a refusal is an error, and the end.
    let mut text = Vec::new();
    while peeked.read(&mut first).ok()? == 1 {
        text.push(first[0]);
        if first[0] == b'\n' {
            break;
        }
    }
    if !String::from_utf8_lossy(&text).contains("QMP") {
        return None;
    }
    let mut client = Client::new(stream);
    client.ask("qmp_capabilities", json!({})).ok()?;
    Some(client)
}

fn works(guest: &mut Driver) {
    assert_eq!(guest.one(0, |guest, id| guest.write(0, 0, 0, 4096, id)), 0);
}

#[test]
fn a_thousand_connections_that_say_nothing() {
    let daemon = Daemon::start();
    let mut guest = daemon.guest();
    works(&mut guest);
    let before = daemon.size();
    let mut silent = Vec::new();
    for at in 0..1000 {
        // The queue of connections may be full for a moment.
        silent.extend(daemon.connect());
        if at % 100 == 0 {
            works(&mut guest);
        }
    }
    works(&mut guest);
    let during = daemon.size();
    assert!(during.0 < before.0 + 100, "descriptors: {before:?}, then {during:?}");
    assert!(during.1 < before.1 + 32 * 1024, "kilobytes: {before:?}, then {during:?}");
    let mut client = daemon.client();
    assert!(client.ask("query-status", json!({})).is_ok(), "whoever speaks is let in");
    drop(silent);
    let token = daemon.client().quiesce(json!({}));
    assert!(!token.is_empty());
    assert!(daemon.log().len() < 200_000, "{} bytes of log", daemon.log().len());
}

/// What somebody who can connect causes is limited in the log, and counted there.
#[test]
fn connection_storms_do_not_fill_the_log() {
    const STORM: usize = 1500;
    let daemon = Daemon::start();
    let start = Instant::now();
    let front_end = || UnixStream::connect(daemon.0.path("vhost"));
    for _ in 0..STORM {
        drop(front_end());
    }
    let silent: Vec<_> = (0..32).map(|_| daemon.connect().unwrap()).collect();
    for _ in 0..STORM {
        // Read to the end: it was accepted, and refused.
        let _ = daemon.connect().and_then(|mut stream| stream.read_to_end(&mut Vec::new()));
    }
    let lines = daemon.log().lines().count();
    // Two kinds of lines: 60 at once and one a second, and the start's own.
    let limit = 2 * (60 + start.elapsed().as_secs() as usize) + 60;
    assert!(lines < limit, "{lines} lines after {:?}:\n{}", start.elapsed(), daemon.log());
    drop(silent);
    let end = Instant::now() + WAIT_TIMEOUT;
    while !["front-end", "control: "]
        .iter()
        .all(|kind| daemon.log().lines().any(|line| line.contains(kind) && line.contains("left out before it: ")))
    {
        assert!(Instant::now() < end, "no count: {}", daemon.log());
        drop(front_end());
        let clients: Vec<_> = (0..40).map(|_| daemon.connect()).collect();
        std::thread::sleep(Duration::from_millis(500));
        drop(clients);
    }
}

#[test]
fn megabytes_of_nonsense_and_answers_that_nobody_reads() {
    let daemon = Daemon::start();
    let mut guest = daemon.guest();
    works(&mut guest);
    let before = daemon.size();
    let texts: [Vec<u8>; 5] = [
        [br#"{"a":""#.to_vec(), vec![b'x'; 8 * MIB]].concat(),
        br#"{"a":"#.repeat(MIB),
        b"[".repeat(4 * MIB),
        br#"{"execute":"query-status"}"#.repeat(MIB / 4),
        vec![0xff; 4 * MIB],
    ];
    for text in texts {
        let mut stream = daemon.connect().unwrap();
        stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        // It is turned away in the middle, or not read any more: nobody reads the answers either.
        let _ = stream.write_all(&text);
        works(&mut guest);
        let during = daemon.size();
        assert!(during.1 < before.1 + 32 * 1024, "kilobytes: {before:?}, then {during:?}");
    }
    assert!(daemon.client().ask("query-status", json!({})).is_ok());
    assert!(daemon.log().len() < 200_000, "{} bytes of log", daemon.log().len());
}

/// A client that holds the disk and stops (SIGSTOP, a debugger, a host that swaps) neither reads nor speaks: its lease
/// ends, and the guest goes on.
#[test]
fn a_client_that_stops_while_it_holds_the_disk() {
    let daemon = Daemon::start();
    let mut guest = daemon.guest();
    works(&mut guest);
    let control = daemon.0.path("control");
    let mut holder = Command::new(env!("CARGO_BIN_EXE_virtioblkctl"))
        .arg("--control")
        .arg(control)
        .args(["quiesce", "--lease", "2s", "--", "sleep", "30"])
        .stdin(Stdio::null())
        // It outlives its parent, and would keep our output open.
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut client = daemon.client();
    wait_until("the disk is held", || hold_state(&mut client) == "quiesced");
    kill_process(Pid::from_child(&holder), Signal::STOP).unwrap();
    // Waits for the end of the lease.
    works(&mut guest);
    let status = client.ask("query-status", json!({})).unwrap();
    assert_eq!(status["quiesce"]["state"], "open", "{status}");
    kill_process(Pid::from_child(&holder), Signal::KILL).unwrap();
    holder.wait().unwrap();
}

/// Connections that end at every moment of a request, over and over.
#[test]
fn connections_that_end_in_the_middle() {
    let daemon = Daemon::start();
    let mut guest = daemon.guest();
    let text =
        br#"{"execute":"qmp_capabilities"}{"execute":"quiesce","arguments":{"who":"me"}}{"execute":"query-status"}"#;
    for cut in 0..=text.len() {
        let mut stream = daemon.connect().unwrap();
        // It may have been turned away: there are many of us.
        let _ = stream.write_all(&text[..cut]);
        if cut % 3 == 0 {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        drop(stream);
        works(&mut guest);
    }
    let mut client = daemon.client();
    wait_until("the hold has ended", || hold_state(&mut client) == "open");
    works(&mut guest);
}
