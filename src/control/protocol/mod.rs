//! PURE. The protocol of the control socket: a dialect of QMP (QEMU, docs/interop/qmp-spec), so that clients such as
//! `qmp-shell`, `qemu.qmp` and `socat` work. docs/control-protocol.md explains it; `schema` lists all commands,
//! arguments, replies, events and error codes, and tests compare both with the code.
//!
//! The daemon sends a greeting; the client sends `{"execute": "qmp_capabilities"}` and then commands
//! `{"execute": NAME, "arguments": {...}, "id": ANYTHING}`. The daemon replies to each, in the order received, with one
//! line, `{"return": ...}` or `{"error": {"class": ..., "code": ..., "desc": ...}}`, with the `id` if there was one.
//!
//! `commands` lists which client may use which command, by its user (SO_PEERCRED).

mod args;
mod attend;
mod commands;
mod copy;
mod error;
mod export;
mod image_snapshot;
pub mod json_stream;
pub mod return_types;
mod schema;
mod throttle;

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::access::Access;
use crate::base::version::VERSION;

pub(super) use args::Args;
pub use args::MAX_WHO;
use args::shown;
pub use attend::AttendCommand;
use commands::COMMANDS;
pub use commands::{Command, DEFAULT_LEASE, DEFAULT_TIMEOUT, MAX_TIMEOUT, QuiesceArgs, command_list};
pub use copy::CopyCommand;
pub use error::{Class, Error};
pub use export::{DEFAULT_IDLE, ExportCommand};
pub use image_snapshot::ImageSnapshotCommand;
pub use schema::schema;

/// A request that was read: its `id`, and its command or the error in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The client's `id`, of any type. The reply repeats it.
    pub id: Option<Value>,
    /// Its command, or the error to reply with.
    pub command: Result<Command, Error>,
}

/// Reads one JSON value as a request. `negotiated`: this connection has negotiated with `qmp_capabilities`; `access`: the
/// commands that its client may use.
pub fn parse(value: Value, negotiated: bool, access: Access) -> Request {
    let Value::Object(mut members) = value else {
        let error = Error::new("bad-request", "a request is a JSON object");
        return Request { id: None, command: Err(error) };
    };
    let id = members.remove("id");
    Request { id, command: parse_members(members, negotiated, access) }
}

fn parse_members(mut members: Map<String, Value>, negotiated: bool, access: Access) -> Result<Command, Error> {
    let bad = |desc: String| Error::new("bad-request", desc);
    let name = match members.remove("execute") {
        Some(Value::String(name)) => name,
        Some(_) => return Err(bad("'execute' must be a string: the name of a command".into())),
        None => return Err(bad("the request has no member 'execute'".into())),
    };
    let arguments = match members.remove("arguments") {
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err(bad("'arguments' must be an object".into())),
        None => Map::new(),
    };
    if let Some(other) = members.keys().next() {
        let desc = format!("unknown member '{}': a request has 'execute', 'arguments' and 'id'", shown(other));
        return Err(bad(desc));
    }
    let known = COMMANDS.iter().find(|(known, ..)| *known == name);
    match (negotiated, name == "qmp_capabilities") {
        (false, false) => {
            let desc = "send {\"execute\": \"qmp_capabilities\"} first; other commands are accepted after it";
            return Err(Error::command("not-negotiated", desc));
        }
        (true, true) => {
            return Err(Error::command(
                "already-negotiated",
                "qmp_capabilities was answered on this connection already",
            ));
        }
        _ => {}
    }
    let Some((_, needed, parse)) = known else {
        let desc = format!("there is no command '{}'; query-commands names them", shown(&name));
        return Err(Error::command("unknown-command", desc));
    };
    permit(&name, *needed, access)?;
    let mut args = Args { command: &name, given: arguments };
    let command = parse(&mut args)?;
    args.finish()?;
    if matches!(command, Command::Resize { force: true, .. }) {
        permit("resize with 'force'", Access::All, access)?;
    }
    Ok(command)
}

fn permit(command: &str, needed: Access, access: Access) -> Result<(), Error> {
    if access >= needed {
        return Ok(());
    }
    let desc = match needed {
        Access::All => format!(
            "{command} is for root and the daemon's user, since it ends the daemon, takes its guest over, shrinks its \
             disk or changes its limits: run it as one of them (sudo)"
        ),
        _ => format!(
            "{command} is not a query, and the daemon allows this user only queries: run it as root or as the daemon's user, or \
             start virtioblkd with --control-access operate"
        ),
    };
    Err(Error::new("not-allowed", desc))
}

/// The line that a client reads first.
pub fn greeting() -> Vec<u8> {
    line(&json!({"QMP": {"version": version(), "capabilities": []}}))
}

/// The version of virtioblkd, in the member where QEMU's clients expect QEMU's.
pub fn version() -> Value {
    let part = |text: &str| text.parse::<u32>().unwrap_or(0);
    json!({
        "qemu": {
            "major": part(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": part(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": part(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": format!("virtioblkd {VERSION}"),
    })
}

/// One reply, as a line.
pub fn reply(id: Option<&Value>, result: Result<Value, Error>) -> Vec<u8> {
    let mut message = match result {
        Ok(value) => json!({"return": value}),
        Err(error) => {
            let class = match error.class {
                Class::GenericError => "GenericError",
                Class::CommandNotFound => "CommandNotFound",
            };
            json!({"error": {"class": class, "code": error.code, "desc": error.desc}})
        }
    };
    if let Some(id) = id {
        message["id"] = id.clone();
    }
    line(&message)
}

/// One event, as a line.
pub fn event(name: &str, data: Value, when: SystemTime) -> Vec<u8> {
    // A clock before 1970 gives 0, because an event must not be lost for that.
    let since = when.duration_since(UNIX_EPOCH).unwrap_or_default();
    line(&json!({
        "event": name,
        "data": data,
        "timestamp": {"seconds": since.as_secs(), "microseconds": since.subsec_micros()},
    }))
}

fn line(message: &Value) -> Vec<u8> {
    let mut text = message.to_string().into_bytes();
    text.extend_from_slice(b"\r\n");
    text
}

#[cfg(test)]
mod tests;
