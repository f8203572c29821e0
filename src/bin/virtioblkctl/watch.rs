//! The subcommand `watch`: prints the daemon's events, across upgrades and restarts of the daemon.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::text::clean_json;
use virtioblkd::internal::control::client::{Client, Failure, Message, REPLY_TIMEOUT};

use crate::{print, show};

/// How long to wait for another daemon on the same socket. After an upgrade it serves at once; after a restart it opens the
/// image first.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// The time between two attempts to connect.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(100);

/// Prints events as long as a daemon serves the socket. Fails when none does any more.
pub fn run(path: &Path, mut client: Client, json: bool) -> Result<u8, Failure> {
    loop {
        let ended = watch(client, json)?;
        let upgraded = matches!(ended, End::Upgraded);
        client = reconnect(path)?;
        // Standard output carries events only.
        match upgraded {
            true => logging::message("another process has taken the disk over"),
            false => logging::message("connected to another daemon; events between the two connections are lost"),
        }
    }
}

/// Why a connection ended.
enum End {
    /// The daemon handed its disk over to another process.
    Upgraded,
    /// The daemon ended, or the connection broke.
    Disconnected,
}

fn watch(mut client: Client, json: bool) -> Result<End, Failure> {
    let mut end = End::Disconnected;
    loop {
        let event = match client.next(None) {
            Ok(Message::Event(event)) => event,
            Ok(Message::Reply(_)) => continue,
            Err(failure) if failure.code == "not-virtioblkd" => return Err(failure),
            Err(_) => return Ok(end),
        };
        let line = if json { clean_json(&event.to_string()) } else { show::event(&event) };
        print(&format!("{line}\n"))?;
        match event["event"].as_str() {
            // The hand-over may still fail. Then another event follows, and this daemon serves on.
            Some("UPGRADE") => end = End::Upgraded,
            Some("SHUTDOWN") => return Ok(end),
            _ => end = End::Disconnected,
        }
    }
}

fn reconnect(path: &Path) -> Result<Client, Failure> {
    let deadline = Instant::now() + RECONNECT_TIMEOUT;
    loop {
        match Client::connect_within(path, REPLY_TIMEOUT) {
            Ok(client) => return Ok(client),
            Err(failure) if Instant::now() >= deadline => {
                let message = format!("the daemon has ended, and no other one was started: {}", failure.message);
                return Err(Failure::new(&failure.code, message));
            }
            Err(_) => thread::sleep(RECONNECT_INTERVAL),
        }
    }
}
