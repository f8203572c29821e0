//! The subcommand `watch`: prints the daemon's events, across upgrades and restarts of the daemon.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::text::{clean, clean_json};
use virtioblkd::internal::control::client::{Client, Failure, Message, REPLY_TIMEOUT};

use crate::chosen::Disks;
use crate::{OUTPUT, print, show};

/// How long to wait for another daemon on the same socket. After an upgrade it serves at once; after a restart it opens the
/// image first.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// The time between two attempts to connect.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(100);

/// How events are printed.
#[derive(Clone, Debug)]
struct Format {
    json: bool,
    /// The disk's name, where events of several disks are printed.
    disk: Option<String>,
}

impl Format {
    /// Returns the line for an event.
    fn line(&self, mut event: serde_json::Value) -> String {
        match (&self.disk, self.json) {
            (None, true) => clean_json(&event.to_string()),
            (None, false) => show::event(&event),
            (Some(disk), true) => {
                event["disk"] = disk.as_str().into();
                clean_json(&event.to_string())
            }
            (Some(disk), false) => format!("{}: {}", clean(disk), show::event(&event)),
        }
    }

    /// Prints a message on standard error: standard output carries events only.
    fn message(&self, text: &str) {
        match &self.disk {
            None => logging::message(text),
            Some(disk) => logging::message(format_args!("{disk}: {text}")),
        }
    }
}

/// Prints events as long as a daemon serves the socket. Fails when none does any more.
pub fn run(path: &Path, client: Client, json: bool) -> Result<u8, Failure> {
    Err(follow(path, client, &Format { json, disk: None }))
}

/// Prints the events of several disks, each line with the disk's name, as long as a daemon serves one of them. Returns the
/// exit status: none does any more, and why was reported for each.
pub fn run_several(disks: &Disks, json: bool) -> Result<u8, Failure> {
    let (sender, ended) = mpsc::channel();
    for (name, control) in &disks.disks {
        let (name, control, sender): (String, PathBuf, _) = (name.clone(), control.clone(), sender.clone());
        let format = Format { json, disk: Some(name.clone()) };
        let spawned = thread::Builder::new().spawn(move || {
            let failure = match Client::connect(&control) {
                Ok(client) => follow(&control, client, &format),
                Err(failure) => failure,
            };
            // The main thread waits for all of them.
            let _ = sender.send((format, failure));
        });
        spawned.map_err(|error| Failure::new("internal", format!("no thread for the events of {name}: {error}")))?;
    }
    drop(sender);
    for (format, failure) in ended {
        // Where one disk's events cannot be printed, no others' can. The threads end with this process.
        if failure.code == OUTPUT {
            return Err(failure);
        }
        format.message(&failure.to_string());
    }
    Ok(1)
}

/// Prints one disk's events. Returns why there are no more.
fn follow(path: &Path, mut client: Client, format: &Format) -> Failure {
    loop {
        let next = watch(client, format).and_then(|end| Ok((end, reconnect(path)?)));
        let end = match next {
            Ok((end, connected)) => {
                client = connected;
                end
            }
            Err(failure) => return failure,
        };
        format.message(match end {
            End::Upgraded => "another process has taken the disk over",
            End::TurnedAway => {
                "the daemon closed this connection, because all places are taken; connected again, events meanwhile are lost"
            }
            End::Disconnected => "connected to another daemon; events between the two connections are lost",
        });
    }
}

/// Why a connection ended.
enum End {
    /// The daemon handed its disk over to another process.
    Upgraded,
    /// The daemon needed the place for another client (`too-many-clients`).
    TurnedAway,
    /// The daemon ended, or the connection broke.
    Disconnected,
}

fn watch(mut client: Client, format: &Format) -> Result<End, Failure> {
    let mut end = End::Disconnected;
    loop {
        let event = match client.next(None) {
            Ok(Message::Event(event)) => event,
            Ok(Message::Reply(Err(failure))) if failure.code == "too-many-clients" => return Ok(End::TurnedAway),
            Ok(Message::Reply(_)) => continue,
            Err(failure) if failure.code == "not-virtioblkd" => return Err(failure),
            Err(_) => return Ok(end),
        };
        let name = event["event"].as_str().unwrap_or_default().to_owned();
        print(&format!("{}\n", format.line(event)))?;
        match name.as_str() {
            // The hand-over may still fail. Then another event follows, and this daemon serves on.
            "UPGRADE" => end = End::Upgraded,
            "SHUTDOWN" => return Ok(end),
            _ => end = End::Disconnected,
        }
    }
}

/// Connects to the next daemon on this socket, within [`RECONNECT_TIMEOUT`].
pub(crate) fn reconnect(path: &Path) -> Result<Client, Failure> {
    let deadline = Instant::now() + RECONNECT_TIMEOUT;
    loop {
        match Client::connect_within(path, REPLY_TIMEOUT) {
            Ok(client) => return Ok(client),
            Err(failure) if Instant::now() >= deadline && failure.code == "too-many-clients" => return Err(failure),
            Err(failure) if Instant::now() >= deadline => {
                let message = format!("the daemon has ended, and no other one was started: {}", failure.message);
                return Err(Failure::new(&failure.code, message));
            }
            Err(_) => thread::sleep(RECONNECT_INTERVAL),
        }
    }
}
