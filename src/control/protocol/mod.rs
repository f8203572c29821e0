//! PURE. The protocol of the control socket: a dialect of QMP (QEMU, docs/interop/qmp-spec), so that clients such as
//! `qmp-shell`, `qemu.qmp` and `socat` work. All commands, events and error codes are listed here, and only here.
//!
//! The daemon sends a greeting; the client sends `{"execute": "qmp_capabilities"}` and then commands
//! `{"execute": NAME, "arguments": {...}, "id": ANYTHING}`. The daemon replies to each, in the order received, with one
//! line, `{"return": ...}` or `{"error": {"class": ..., "code": ..., "desc": ...}}`, with the `id` if there was one.
//!
//! | command | arguments (default) | returns |
//! | --- | --- | --- |
//! | `qmp_capabilities` | `enable` (`[]`) | nothing |
//! | `query-commands` | | the names of the commands that this client may use |
//! | `query-version` | | the greeting's version |
//! | `quiesce` | `timeout-ms` (10000), `lease-ms` (30000), `detached` (false), `who` | `token`, `lease-ms` (as granted), `epoch`, `rings`, `drained`, `drain-us`, `sync-us`, `bytes-synced`, `holders` |
//! | `renew-lease` | `token`, `lease-ms` (30000) | `lease-ms`: how long it lasts from now on |
//! | `resume` | `token`, or `all`: true | `resumed`, `holders` |
//! | `query-status` | | the disk, the daemon and `quiesce`: who holds it and how long |
//! | `query-stats` | | `rings`, `total` and `stable-writes` |
//! | `copy-prepare` | `target`, `bandwidth` (0), `digest` (false), `detached` (false) | `copy`: its name |
//! | `copy-start` | `copy`, `token` | nothing |
//! | `copy-cancel` | `copy` | nothing |
//! | `copy-bandwidth` | `copy`, `bandwidth` | nothing |
//! | `query-copies` | | a list: the copies that ended last, and the one that is prepared or running |
//! | `continue` | | `retried`: how many failed requests are retried |
//! | `resize` | `size` (default: the image's size), `force` (false) | `size`: the size that the guest sees now |
//! | `image-snapshot` | `name`, `token` | `snapshot`: its full name |
//! | `image-snapshot-keep` | `name` | nothing |
//! | `image-snapshot-remove` | `name` | nothing |
//! | `attend` | `required` (true), `timeout-ms` (10000), `who` | nothing; this connection is the attendant |
//! | `prepared` | `id`, and `level` or `error` | nothing |
//! | `unattend` | | nothing |
//! | `query-command-line` | | `program`, `arguments`, `directory`, `notify-socket`: how the daemon was started |
//! | `hand-over` | `version` | nothing; then this connection speaks another protocol (`src/upgrade/mod.rs`) |
//! | `quit` | | nothing; then the daemon ends in order, as by SIGTERM |
//!
//! Only root and the daemon's user (SO_PEERCRED) may use `query-command-line`, `hand-over`, `quit` and `resize` with
//! `force`. Other users that the socket's mode admits may use all other commands, or with `--control-access read-only` the
//! queries.
//!
//! A quiesce ends by `resume`, when its lease runs out, and, unless it is `detached`, with the connection that asked for it
//! (also when the client closes only its sending side). Writes continue when the last holder has ended.
//!
//! A request that failed because no space was left (or, by `--on-error`, for another reason) is retained instead of
//! completed, and its ring takes no further writes: `query-status` has `stopped` then, and the daemon has sent `IO_STOPPED`.
//! `continue` retries the retained requests. No quiesce succeeds while a change is retained, because part of it may be in
//! the image (`stopped`).
//!
//! `resize` makes the daemon read the size of its image, which an operator changed, and report it to the guest. With `size`
//! the daemon grows the image first, if it can; it never shrinks one. A smaller image is refused without `force`, because
//! the guest loses the data beyond the new end.
//!
//! `image-snapshot` makes the store of the image (Ceph RBD; `query-status` has `image-snapshots`: true) take a snapshot
//! while the hold of `token` is granted. The daemon removes the snapshot if the connection that asked for it ends before it
//! sent `image-snapshot-keep`. So if a snapshot of several disks fails on one of them, those of the others are removed.
//!
//! A snapshot that another host takes of an image that allows it (Ceph RBD) is a holder, too: its `who` is
//! `rbd snapshot`, and its `pid` and `uid` are null.
//!
//! Before the disk is held for such a snapshot, its *attendant*, if one has registered, must consent: the daemon sends
//! `PREPARE` to its connection, and the gate waits for `prepared`, for `timeout-ms` (and two thirds of the store's own
//! deadline) at most. Meanwhile the guest's disks still take writes, so the attendant can freeze the guest. After each
//! `PREPARE` the daemon sends `RELEASED`, once the gate is open, and the attendant thaws the guest. If the attendant replies
//! with `error`, late or not at all, the snapshot is refused if the attendant is `required`, and proceeds without its
//! consent if not. After the connection of a `required` attendant has ended without `unattend`, snapshots are refused until
//! one registers (with `--rbd-quiesce attended` whenever none is registered). There is one attendant at a time. The
//! operator's own `quiesce` does not need its consent.
//!
//! A copy is prepared before the disk is held: the daemon creates its file, `target` with `.partial` added, so that early
//! errors do not cost hold time. `copy-start` fixes the instant while the hold of `token` is granted, and takes no time. The
//! disk may be resumed at once, while the image of that instant is copied in the background, reading at most `bandwidth`
//! bytes a second (0: no limit). When the copy is complete and durable, it gets its name `target`, which must not exist, and
//! with `digest` its SHA-256. A prepared copy ends with the connection that asked for it; so does a running one unless it is
//! `detached`. Its status has `copy`, `target`, `state` (`prepared`, `running`, `syncing`, `completed`, `failed`,
//! `cancelled`), `total-bytes`, `done-bytes`, `saved-before-write-bytes`, `stored-bytes`, `scratch-bytes` (old data in the
//! daemon's --scratch that is not in the target yet), `instant`, `seconds`, `slowed-seconds` (during which a change of the
//! guest waited for old data to be saved), `sha256`, `error` and `ending` (the copy is over, and its thread still waits for
//! the target). `query-status` has the number of these in `copies-ending`.
//!
//! `query-status` has `detected-format` (as `qemu-img` calls it) if the image has another format than raw by its header or
//! footer. The image is still served as raw, since a guest can write such a header. With `--format raw` the daemon does not
//! check the format.
//!
//! | event | data |
//! | --- | --- |
//! | `QUIESCED` | a hold was granted: `token`, `who`, `pid`, `uid`, `detached`, `lease-ms`, `holders` and the figures |
//! | `RESUMED` | a hold ended: `token`, `who`, `reason` (`resume`, `lease-expired`, `connection-closed`, `shutdown`), `held-ms`, `holders` (0: the disk goes on) |
//! | `LEASE_EXPIRED` | `token`, `who`; its `RESUMED` follows |
//! | `QUIESCE_FAILED` | a quiesce that did not succeed: `who`, `pid`, `uid`, `code` |
//! | `QUIESCE_EXPIRED` | the store of the image released the disk by itself, `held-ms` after it was quiesced: a snapshot of several images may not be of one instant; its `RESUMED` follows |
//! | `PREPARE` | to the attendant alone: `id`, `timeout-ms`, `who` |
//! | `RELEASED` | to the attendant alone: `id`; the snapshot is over and the disk is resumed |
//! | `PREPARED` | the attendant consented: `level` |
//! | `PREPARE_FAILED` | the attendant did not consent: `message`, `required` (then a `QUIESCE_FAILED` follows) |
//! | `FRONTEND_CONNECTED` | nothing |
//! | `FRONTEND_DISCONNECTED` | `reason` |
//! | `IO_ERROR` | `operation`, `ring`, `offset`, `length`, `errno`, `message`, `suppressed` |
//! | `IO_STOPPED` | a request failed and is retained; its ring takes no further writes: `operation`, `ring`, `offset`, `length`, `errno`, `message` |
//! | `IO_CONTINUED` | the ring's retained requests are retried: `ring` |
//! | `IO_STALLED` | requests are in flight for 10 s and more: `ring`, `requests`, `oldest-ms` |
//! | `IO_RESUMED` | the ring's stalled requests are completed: `ring` |
//! | `SYNC_ERROR` | `errno`, `message`, `suppressed` |
//! | `COPY_COMPLETED`, `COPY_FAILED`, `COPY_CANCELLED` | a copy ended: its status |
//! | `BUFFER_CHANGED` | with `--stable-writes detect`: the guest changed the buffer of a write in flight: `offset`, `length`, `suppressed` |
//! | `IMAGE_STATE` | `trouble`, `trouble-detail`: the image can no longer be used as it should, or can again |
//! | `PROTOCOL_ERROR` | `message`, `suppressed` |
//! | `UPGRADE` | another process begins to take the disk over; if it succeeds, `SHUTDOWN` follows: connect again |
//! | `SHUTDOWN` | nothing; the daemon ends |
//!
//! `suppressed` counts the errors for which no event was sent since the last one: a guest can cause any number.
//!
//! | `code` | meaning |
//! | --- | --- |
//! | `parse-error` | the bytes are not a JSON object, or too long or too deep |
//! | `bad-request` | an object that is not a request: `execute` missing, unknown member, ... |
//! | `not-negotiated` | a command came before `qmp_capabilities` (class `CommandNotFound`, as in QEMU) |
//! | `already-negotiated` | `qmp_capabilities` came twice (class `CommandNotFound`) |
//! | `unknown-command` | class `CommandNotFound` |
//! | `bad-argument` | an argument is missing, unknown, of the wrong type or out of range |
//! | `timeout` | the writes in flight and the sync did not end in `timeout-ms`; writes continue |
//! | `sync-failed` | the sync failed, so nothing is promised; writes continue |
//! | `not-ours` | another process uses the image and may write to it |
//! | `stopped` | a request that changes the disk failed and is retained until `continue`: the disk cannot be held |
//! | `cancelled` | `resume {all: true}` came before the quiesce was granted |
//! | `not-prepared` | (of `QUIESCE_FAILED`) the attendant did not consent, or is lost |
//! | `attended` | another connection attends already |
//! | `not-attending` | this connection does not attend |
//! | `not-asked` | no `PREPARE` of this id waits for a reply |
//! | `not-quiesced` | the disk is not held, and the token is unknown |
//! | `unknown-token` | others hold the disk, not this token |
//! | `lease-expired` | the token's lease ran out: writes may have been made since |
//! | `not-held` | the token's hold ended otherwise: resumed, connection closed; of `copy-start`: it is not granted now |
//! | `too-many-holders` | there are as many holders as this server allows |
//! | `max-hold` | the disk was held for as long as `--max-hold` allows: writes must continue first |
//! | `busy` | there is another copy (or `image-snapshot`), or the copy's state does not allow the command, or (`copy-start`) a write is in flight |
//! | `no-such-copy` | no copy that is prepared or running has this name |
//! | `target` | the copy's file cannot be created |
//! | `resources` | there is no thread or descriptor for a copy or a snapshot |
//! | `resize` | the image's size cannot be read or changed, or is refused |
//! | `no-copies` | this daemon makes no copies |
//! | `no-image-snapshots` | the image's store makes no snapshots |
//! | `exists`, `store` | the store took no snapshot: one of this name exists; or another error, which `desc` describes |
//! | `no-such-snapshot` | this connection took no snapshot of this name |
//! | `not-now` | of `hand-over`: something must end first, which `desc` names |
//! | `upgrading` | another process is taking the disk over: connect again |
//! | `no-upgrade` | this daemon cannot be taken over, or not by that one |
//! | `shutting-down` | the daemon ends |
//! | `too-many-clients` | there are as many connections as this server allows, and it closes this one |
//! | `internal` | a defect of this server |
//! | `not-allowed` | the client's user may not use this command; or not this socket, and the daemon closes the connection |

mod args;
mod attend;
mod commands;
mod copy;
mod error;
mod image_snapshot;
pub mod json_stream;
pub mod return_types;

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::access::Access;

pub(super) use args::Args;
pub use args::MAX_WHO;
use args::shown;
pub use attend::AttendCommand;
use commands::COMMANDS;
pub use commands::{Command, DEFAULT_LEASE, DEFAULT_TIMEOUT, MAX_TIMEOUT, QuiesceArgs, command_list};
pub use copy::CopyCommand;
pub use error::{Class, Error};
pub use image_snapshot::ImageSnapshotCommand;

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
            "{command} is for root and the daemon's user, since it ends the daemon, takes its guest over or shrinks its \
             disk: run it as one of them (sudo)"
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
        "package": concat!("virtioblkd ", env!("CARGO_PKG_VERSION")),
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
