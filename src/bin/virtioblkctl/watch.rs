//! The subcommand `watch`: prints what happens, across upgrades and restarts of the daemon.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::text::clean_json;
use virtioblkd::internal::control::client::{Client, Failure, Message, REPLY_TIMEOUT};

use crate::{print, show};

/// How long another daemon is waited for on the same socket: after an upgrade it is there at once, after a restart it
/// opens the image first.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How often it is looked for.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(100);

/// Prints events for as long as there is a daemon. Errors: there is none any more.
pub fn run(path: &Path, mut client: Client, json: bool) -> Result<u8, Failure> {
    loop {
        let ended = watch(client, json)?;
        let upgraded = matches!(ended, End::Upgraded);
        client = reconnect(path)?;
        // Standard output has events alone.
        match upgraded {
            true => logging::message("another process has taken the disk over"),
            false => logging::message("connected to another daemon; what happened meanwhile is not known"),
        }
    }
}

/// Why a connection is over.
enum End {
    /// The daemon gave its disk to another process.
    Upgraded,
    /// It ended, or the connection broke.
    Gone,
}

fn watch(mut client: Client, json: bool) -> Result<End, Failure> {
    let mut end = End::Gone;
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
            // It may still come to nothing; then a later event shows it.
            Some("UPGRADE") => end = End::Upgraded,
            Some("SHUTDOWN") => return Ok(end),
            _ => end = End::Gone,
        }
    }
}

fn reconnect(path: &Path) -> Result<Client, Failure> {
    let deadline = Instant::now() + RECONNECT_TIMEOUT;
    loop {
        match Client::connect_within(path, REPLY_TIMEOUT) {
            Ok(client) => return Ok(client),
            Err(failure) if Instant::now() >= deadline => {
                let message = format!("the daemon has ended, and no other came: {}", failure.message);
                return Err(Failure::new(&failure.code, message));
            }
            Err(_) => thread::sleep(RECONNECT_INTERVAL),
        }
    }
}
