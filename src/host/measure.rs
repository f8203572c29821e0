//! Asks the daemons of this host's disks for all their figures at once: what `exporter`, `stats --openmetrics` and `top` show.

use serde_json::json;

use super::listing::{Listed, State, each, state_and};
use crate::control::client::parse;
use crate::control::protocol::return_types::Stats;
use crate::disk::CopyStatus;

/// The figures of a disk.
#[derive(Clone, Debug)]
pub struct Measured {
    /// How the disk is.
    pub state: State,
    /// The counters. `None`: there is no status, and `state` says why.
    pub stats: Option<Box<Stats>>,
    /// The copies and exports.
    pub copies: Vec<CopyStatus>,
}

/// Asks the daemons of all these disks at once. A daemon that does not answer within a second is given up.
pub fn measure(disks: &[Listed]) -> Vec<Measured> {
    each(disks, one)
}

fn one(disk: &Listed) -> Measured {
    let (state, figures) = state_and(disk, |client, left| {
        let stats: Stats = parse(client.execute("query-stats", json!({}), left())?)?;
        // Parsed apart: the figures of a daemon whose copies this version does not understand are shown all the same.
        let copies = client.execute("query-copies", json!({}), left())?;
        Ok((stats, parse(copies).unwrap_or_default()))
    });
    match figures {
        Some((stats, copies)) => Measured { state, stats: Some(Box::new(stats)), copies },
        None => Measured { state, stats: None, copies: Vec::new() },
    }
}
