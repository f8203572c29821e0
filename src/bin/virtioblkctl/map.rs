//! The subcommand `map`: prints which parts of a running export's instant are holes, in the two formats of `nbdinfo --map`.

use std::path::Path;

use clap::Args;
use serde_json::json;
use virtioblkd::disk::CopyStatus;
use virtioblkd::internal::control::client::{Client, Failure, REPLY_TIMEOUT, parse};
use virtioblkd::internal::export::{BASE_ALLOCATION, client};

#[derive(Args)]
pub(crate) struct Map {
    /// The export's name, as `copies` shows it (copy-1), if it is not the one that runs
    pub(crate) copy: Option<String>,
}

/// The most parts of a map that are kept in memory. The daemon may be an intruder's.
const MAX_EXTENTS: usize = 16 << 20;

/// Some bytes with one status.
struct Extent {
    offset: u64,
    len: u64,
    status: u32,
}

/// Returns the table, or its JSON.
pub(crate) fn run(mut daemon: Client, options: &Map, json: bool) -> Result<String, Failure> {
    let copies: Vec<CopyStatus> = parse(daemon.execute("query-copies", json!({}), REPLY_TIMEOUT)?)?;
    let is_wanted = |copy: &&CopyStatus| match &options.copy {
        Some(name) => copy.copy == *name,
        None => copy.state == "running" && copy.export.is_some(),
    };
    let none = || match &options.copy {
        Some(name) => {
            Failure::new("no-such-copy", format!("there is no export '{name}': 'virtioblkctl copies' shows them"))
        }
        None => Failure::new(
            "no-such-copy",
            "no export runs: begin one with 'virtioblkctl snapshot --to nbd:SOCKET --background'",
        ),
    };
    let copy = copies.iter().find(is_wanted).ok_or_else(none)?;
    let Some(export) = &copy.export else {
        return Err(Failure::new("no-such-copy", format!("{} is a copy, and only exports have a map", copy.copy)));
    };
    let map = read_map(Path::new(&copy.target), &export.name).map_err(|error| {
        let text =
            format!("cannot read the map of {} at '{}': {error}; is it running ('copies')?", copy.copy, copy.target);
        Failure::new("export", text)
    })?;
    Ok(if json { as_json(&map) } else { as_text(&map) })
}

/// Reads all of the map. Neighbours have different statuses.
fn read_map(socket: &Path, export: &str) -> std::io::Result<Vec<Extent>> {
    let mut client = client::Client::connect(socket, export, BASE_ALLOCATION)?;
    let mut map: Vec<Extent> = Vec::new();
    let mut offset = 0;
    while offset < client.size() {
        for (len, status) in client.block_status(offset)? {
            match map.last_mut() {
                Some(last) if last.status == status => last.len += len,
                _ => map.push(Extent { offset, len, status }),
            }
            offset += len;
        }
        if map.len() > MAX_EXTENTS {
            return Err(std::io::Error::other(format!("the map has more than {MAX_EXTENTS} parts")));
        }
    }
    Ok(map)
}

/// nbdinfo's words for a status of base:allocation.
fn description(status: u32) -> &'static str {
    match status {
        0 => "data",
        1 => "hole",
        2 => "zero",
        3 => "hole,zero",
        _ => "unknown",
    }
}

fn as_json(map: &[Extent]) -> String {
    let object = |Extent { offset, len, status }: &Extent| {
        let words = description(*status);
        format!(r#"{{ "offset": {offset}, "length": {len}, "type": {status}, "description": "{words}" }}"#)
    };
    format!("[\n{}\n]\n", map.iter().map(object).collect::<Vec<_>>().join(",\n"))
}

fn as_text(map: &[Extent]) -> String {
    let line = |Extent { offset, len, status }: &Extent| {
        format!("{offset:>10}  {len:>10}  {status:>3}  {}\n", description(*status))
    };
    map.iter().map(line).collect()
}
