//! PURE. The words of the quiesce socket: QMP's dialect (QEMU, docs/interop/qmp-spec), so that `qmp-shell`,
//! `qemu.qmp` and `socat` drive it. This is the one place where commands, events and error codes are listed.
//!
//! The server greets; the client sends `{"execute": "qmp_capabilities"}` and then commands
//! `{"execute": NAME, "arguments": {...}, "id": ANYTHING}`. Each is answered in the order received by one line,
//! `{"return": ...}` or `{"error": {"class": ..., "code": ..., "desc": ...}}`, with the `id` if there was one.
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
//! | `query-copies` | | a list: the copies that ended last, and the one prepared or running |
//! | `continue` | | `retried`: how many failed requests are tried again |
//! | `resize` | `size` (what the image has), `force` (false) | `size`: what the guest sees now |
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
//! `query-command-line`, `hand-over`, `quit` and `resize` with `force` are for root and the daemon's user (SO_PEERCRED).
//! Other users whom the socket's mode lets in may use all others, or with `--control-access read-only` the queries.
//!
//! A quiesce ends by `resume`, when its lease runs out, and, unless `detached`, with the connection that asked for it
//! (also when the client closes only its sending side). The disk goes on when the last holder is gone.
//!
//! A request that failed for want of space (or, by `--on-error`, otherwise) is kept from the guest, and its ring stands
//! still: `query-status` has `stopped` then, and `IO_STOPPED` told of it. `continue` tries again what is kept. No quiesce
//! succeeds while a change is kept, for part of it may be in the image (`stopped`).
//!
//! `resize` makes the daemon look at the size of its image, which somebody changed, and tell the guest. With `size` it
//! grows the image first, where it can; it never cuts one. A smaller image is refused without `force`: the guest loses
//! what lies behind the new end.
//!
//! `image-snapshot` has the store of the image (Ceph RBD; `query-status` has `image-snapshots`: true) make a snapshot
//! while the hold of `token` is granted. It is removed again when the connection that asked for it ends before it said
//! `image-snapshot-keep`, so that nothing is left of several disks' snapshot that failed on one of them.
//!
//! A snapshot that somebody elsewhere takes of an image that allows it (Ceph RBD) is a holder, too: its `who` is
//! `rbd snapshot`, and it has neither `pid` nor `uid` (null).
//!
//! Before the disk is held for that, its *attendant* is asked, if one has registered: `PREPARE` to its connection, and
//! the gate waits for `prepared`, for `timeout-ms` (and two thirds of the store's own deadline) at most. Meanwhile the
//! guest's disks still take writes, so this is where it is frozen. `RELEASED` follows each `PREPARE`, once the gate is
//! open: thaw. If the attendant answers with `error`, late or not at all, the snapshot is refused if it is `required`
//! and goes on without it if not. A `required` attendant whose connection ends without `unattend` is missed: snapshots
//! are refused until one is back (with `--rbd-quiesce attended` whenever there is none). There is one at a time; the
//! operator's own `quiesce` does not ask it.
//!
//! A copy is prepared before anything is held still: its file, `target` with `.partial` added, is created, and
//! everything that can fail has failed. `copy-start` fixes the instant while the hold of `token` is granted, and takes
//! no time; the disk may be resumed at once, while the image of that instant is copied in the background, reading no
//! more than `bandwidth` bytes a second (0: no limit). Complete and durable it gets its name `target`, replacing
//! nothing, and with `digest` its SHA-256. A prepared copy ends with the connection that asked for it; so does a running
//! one unless `detached`. Its status has `copy`, `target`, `state` (`prepared`, `running`, `syncing`, `completed`,
//! `failed`, `cancelled`), `total-bytes`, `done-bytes`, `saved-before-write-bytes`, `stored-bytes`,
//! `scratch-bytes` (old data in the daemon's --scratch, on its way to the target), `instant`, `seconds`,
//! `slowed-seconds` (a change of the guest's waited for old data to be saved), `sha256`, `error` and `ending` (it is over, and
//! its thread still waits for the target). `query-status` has the number of these in `copies-ending`.
//!
//! | event | data |
//! | --- | --- |
//! | `QUIESCED` | a holder got the disk: `token`, `who`, `pid`, `uid`, `detached`, `lease-ms`, `holders` and the figures |
//! | `RESUMED` | a holder left: `token`, `who`, `reason` (`resume`, `lease-expired`, `connection-closed`, `shutdown`), `held-ms`, `holders` (0: the disk goes on) |
//! | `LEASE_EXPIRED` | `token`, `who`; its `RESUMED` follows |
//! | `QUIESCE_FAILED` | a quiesce that did not succeed: `who`, `pid`, `uid`, `code` |
//! | `QUIESCE_EXPIRED` | the store of the image let the disk go by itself, `held-ms` after it was still: a snapshot of several images may not be of one instant; its `RESUMED` follows |
//! | `PREPARE` | to the attendant alone: `id`, `timeout-ms`, `who` |
//! | `RELEASED` | to the attendant alone: `id`; the snapshot is over and the disk goes on |
//! | `PREPARED` | the attendant consented: `level` |
//! | `PREPARE_FAILED` | it did not: `message`, `required` (then a `QUIESCE_FAILED` follows) |
//! | `FRONTEND_CONNECTED` | nothing |
//! | `FRONTEND_DISCONNECTED` | `reason` |
//! | `IO_ERROR` | `operation`, `ring`, `offset`, `length`, `errno`, `message`, `suppressed` |
//! | `IO_STOPPED` | a request failed and is kept; its ring stands still: `operation`, `ring`, `offset`, `length`, `errno`, `message` |
//! | `IO_CONTINUED` | what the ring kept is tried again: `ring` |
//! | `IO_STALLED` | requests are in flight for 10 s and more: `ring`, `requests`, `oldest-ms` |
//! | `IO_RESUMED` | the ring's stalled requests are answered: `ring` |
//! | `SYNC_ERROR` | `errno`, `message`, `suppressed` |
//! | `COPY_COMPLETED`, `COPY_FAILED`, `COPY_CANCELLED` | a copy ended: its status |
//! | `BUFFER_CHANGED` | with `--stable-writes detect`: the guest changed the buffer of a write under way: `offset`, `length`, `suppressed` |
//! | `IMAGE_STATE` | `trouble`, `trouble-detail`: the image can no longer be used as it should, or can again |
//! | `PROTOCOL_ERROR` | `message`, `suppressed` |
//! | `UPGRADE` | another process begins to take the disk over; if it succeeds, `SHUTDOWN` follows: connect again |
//! | `SHUTDOWN` | nothing; the daemon ends |
//!
//! `suppressed` counts the errors that were not told since the last one that was: a guest can provoke any number.
//!
//! | `code` | meaning |
//! | --- | --- |
//! | `parse-error` | the bytes are no JSON object, or too long or too deep |
//! | `bad-request` | an object, but no request: `execute` missing, unknown member, ... |
//! | `not-negotiated` | a command came before `qmp_capabilities` (class `CommandNotFound`, as in QEMU) |
//! | `already-negotiated` | `qmp_capabilities` came twice (class `CommandNotFound`) |
//! | `unknown-command` | class `CommandNotFound` |
//! | `bad-argument` | an argument is missing, unknown, of the wrong type or out of range |
//! | `timeout` | the writes in flight and the sync did not end in `timeout-ms`; the disk goes on |
//! | `sync-failed` | the sync failed, so nothing is promised; the disk goes on |
//! | `not-ours` | another process uses the image: it is written elsewhere |
//! | `stopped` | a request that changes the disk failed and is kept until `continue`: the disk cannot be held |
//! | `cancelled` | `resume {all: true}` came while the quiesce was under way |
//! | `not-prepared` | (of `QUIESCE_FAILED`) the attendant did not consent, or is lost |
//! | `attended` | another connection attends already |
//! | `not-attending` | this connection does not attend |
//! | `not-asked` | no `PREPARE` of this id waits for an answer |
//! | `not-quiesced` | nobody holds the disk, and the token is unknown |
//! | `unknown-token` | others hold the disk, not this token |
//! | `lease-expired` | the token's lease ran out: writes may have gone through since |
//! | `not-held` | the token's hold ended otherwise: resumed, connection closed; of `copy-start`: it is not granted now |
//! | `too-many-holders` | as many holders as this server keeps |
//! | `max-hold` | the disk was held for as long as `--max-hold` allows: it takes writes first |
//! | `busy` | there is another copy (or `image-snapshot`), or this one's state does not allow that, or (`copy-start`) a write is in flight |
//! | `no-such-copy` | no copy that is prepared or running has this name |
//! | `target` | the copy's file cannot be created |
//! | `resources` | no thread or descriptor for a copy or a snapshot |
//! | `resize` | the image's size cannot be taken, or was refused |
//! | `no-copies` | this daemon makes no copies |
//! | `no-image-snapshots` | the image's store makes no snapshots |
//! | `exists`, `store` | the store made none: there is one of this name; or why |
//! | `no-such-snapshot` | this connection made none of this name |
//! | `not-now` | of `hand-over`: what must end first |
//! | `upgrading` | another process is taking the disk over: connect again |
//! | `no-upgrade` | this daemon cannot be taken over, or not by that one |
//! | `shutting-down` | the daemon ends |
//! | `too-many-clients` | as many connections as this server keeps; it then closes this one |
//! | `internal` | a defect of this server |
//! | `not-allowed` | the peer's user may not use this command; or not this socket, which then closes the connection |

mod args;
mod attend;
mod copy;
mod error;
mod image_snapshot;
pub mod json_stream;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::access::Access;

pub(super) use args::Args;
pub use args::MAX_WHO;
use args::shown;
pub use attend::AttendCommand;
pub use copy::CopyCommand;
pub use error::{Class, Error};
pub use image_snapshot::ImageSnapshotCommand;

/// How long a quiesce may take when `timeout-ms` is not given.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a quiesce lasts when `lease-ms` is not given.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(30);
/// The longest timeout and lease: an hour. A guest that is frozen for longer is a mistake.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(3600);

/// What a client may ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Ends the negotiation.
    QmpCapabilities,
    /// Names the commands.
    QueryCommands,
    /// The greeting's version again.
    QueryVersion,
    /// Holds the disk still.
    Quiesce(QuiesceArgs),
    /// Gives a hold more time.
    RenewLease {
        /// Whose.
        token: String,
        /// From now.
        lease: Duration,
    },
    /// Ends one hold.
    Resume {
        /// Whose.
        token: String,
    },
    /// Ends every hold and every quiesce under way.
    ResumeAll,
    /// Everything about the disk and its holders.
    QueryStatus,
    /// Counters.
    QueryStats,
    /// About point-in-time copies.
    Copy(CopyCommand),
    /// Tries again what failed and is kept.
    Continue,
    /// The image has another size.
    Resize {
        /// Grow it to so many bytes first.
        size: Option<u64>,
        /// Even if it is smaller now.
        force: bool,
    },
    /// About snapshots that the image's store makes.
    ImageSnapshot(ImageSnapshotCommand),
    /// An attendant's.
    Attend(AttendCommand),
    /// How the daemon was started.
    QueryCommandLine,
    /// Another process takes over.
    HandOver {
        /// Of the protocol that it speaks.
        version: u64,
    },
    /// Ends the daemon.
    Quit,
}

/// The arguments of `quiesce`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuiesceArgs {
    /// Until it is answered with an error.
    pub timeout: Duration,
    /// From the answer on.
    pub lease: Duration,
    /// Outlives the connection.
    pub detached: bool,
    /// Who asks, in the operator's words; for status, events and the log.
    pub who: Option<String>,
}

/// A request that was read: its `id`, and what it asks or what is wrong with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Echoed, whatever it is.
    pub id: Option<Value>,
    /// What it asks.
    pub command: Result<Command, Error>,
}

type Parse = fn(&mut Args) -> Result<Command, Error>;

/// Every command with the access that it takes, in the order in which `query-commands` names them.
const COMMANDS: &[(&str, Access, Parse)] = &[
    ("qmp_capabilities", Access::ReadOnly, parse_capabilities),
    ("query-commands", Access::ReadOnly, |_| Ok(Command::QueryCommands)),
    ("query-version", Access::ReadOnly, |_| Ok(Command::QueryVersion)),
    ("query-status", Access::ReadOnly, |_| Ok(Command::QueryStatus)),
    ("query-stats", Access::ReadOnly, |_| Ok(Command::QueryStats)),
    ("quiesce", Access::Operate, parse_quiesce),
    ("renew-lease", Access::Operate, parse_renew),
    ("resume", Access::Operate, parse_resume),
    ("copy-prepare", Access::Operate, copy::parse_prepare),
    ("copy-start", Access::Operate, copy::parse_start),
    ("copy-cancel", Access::Operate, copy::parse_cancel),
    ("copy-bandwidth", Access::Operate, copy::parse_bandwidth),
    ("query-copies", Access::ReadOnly, copy::parse_query),
    ("continue", Access::Operate, |_| Ok(Command::Continue)),
    ("resize", Access::Operate, parse_resize),
    ("image-snapshot", Access::Operate, image_snapshot::parse_create),
    ("image-snapshot-keep", Access::Operate, image_snapshot::parse_keep),
    ("image-snapshot-remove", Access::Operate, image_snapshot::parse_remove),
    ("attend", Access::Operate, attend::parse_attend),
    ("prepared", Access::Operate, attend::parse_prepared),
    ("unattend", Access::Operate, attend::parse_unattend),
    ("query-command-line", Access::All, |_| Ok(Command::QueryCommandLine)),
    ("hand-over", Access::All, parse_hand_over),
    ("quit", Access::All, |_| Ok(Command::Quit)),
];

/// Reads one JSON value as a request. `negotiated`: `qmp_capabilities` was answered on this connection; `access`: what its
/// client may use.
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
            let desc = "send {\"execute\": \"qmp_capabilities\"} first; commands are known after it";
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
            "{command} is for root and the daemon's user, since it ends the daemon, takes its guest over or cuts its \
             disk: be one of them (sudo)"
        ),
        _ => format!(
            "{command} changes something, and the daemon lets this user only ask: be root or the daemon's user, or start \
             virtioblkd with --control-access operate"
        ),
    };
    Err(Error::new("not-allowed", desc))
}

fn parse_capabilities(args: &mut Args) -> Result<Command, Error> {
    match args.given.remove("enable") {
        None => Ok(Command::QmpCapabilities),
        Some(Value::Array(list)) if list.is_empty() => Ok(Command::QmpCapabilities),
        Some(Value::Array(_)) => Err(Error::argument("'enable' must be empty: this server offers no capabilities")),
        Some(_) => Err(Error::argument("'enable' must be a list")),
    }
}

fn parse_quiesce(args: &mut Args) -> Result<Command, Error> {
    Ok(Command::Quiesce(QuiesceArgs {
        timeout: args.milliseconds("timeout-ms")?.unwrap_or(DEFAULT_TIMEOUT),
        lease: args.milliseconds("lease-ms")?.unwrap_or(DEFAULT_LEASE),
        detached: args.boolean("detached")?.unwrap_or(false),
        who: args.text("who", MAX_WHO)?,
    }))
}

fn parse_renew(args: &mut Args) -> Result<Command, Error> {
    let lease = args.milliseconds("lease-ms")?.unwrap_or(DEFAULT_LEASE);
    match args.text("token", MAX_WHO)? {
        Some(token) => Ok(Command::RenewLease { token, lease }),
        None => Err(Error::argument("renew-lease needs 'token', as quiesce returned it")),
    }
}

fn parse_resume(args: &mut Args) -> Result<Command, Error> {
    let all = args.boolean("all")?.unwrap_or(false);
    match (args.text("token", MAX_WHO)?, all) {
        (Some(token), false) => Ok(Command::Resume { token }),
        (None, true) => Ok(Command::ResumeAll),
        (Some(_), true) => Err(Error::argument("resume takes 'token' or 'all', not both")),
        (None, false) => Err(Error::argument("resume needs 'token', as quiesce returned it, or 'all': true")),
    }
}

fn parse_resize(args: &mut Args) -> Result<Command, Error> {
    Ok(Command::Resize { size: args.bytes("size")?, force: args.boolean("force")?.unwrap_or(false) })
}

fn parse_hand_over(args: &mut Args) -> Result<Command, Error> {
    let version = args.number("version")?;
    let version = version.ok_or_else(|| Error::argument("hand-over needs 'version', of what is spoken then"))?;
    Ok(Command::HandOver { version })
}

/// The line that a client reads first.
pub fn greeting() -> Vec<u8> {
    line(&json!({"QMP": {"version": version(), "capabilities": []}}))
}

/// Our version where QEMU's clients look for QEMU's.
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

/// The answer of `query-commands`: those that a client with `access` may use.
pub fn command_list(access: Access) -> Value {
    COMMANDS.iter().filter(|(_, needed, _)| access >= *needed).map(|(name, ..)| json!({"name": name})).collect()
}

/// One reply, a line.
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

/// One event, a line.
pub fn event(name: &str, data: Value, when: SystemTime) -> Vec<u8> {
    // A clock before 1970 is not worth an error in the middle of an event.
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
mod tests {
    use super::*;

    fn ask(text: &str) -> Result<Command, Error> {
        parse(serde_json::from_str(text).unwrap(), true, Access::All).command
    }

    fn refused(text: &str, code: &str, words: &[&str]) {
        let error = ask(text).unwrap_err();
        assert_eq!(error.code, code, "{text}: {error:?}");
        for word in words {
            assert!(error.desc.contains(word), "{text}: '{word}' is not in '{}'", error.desc);
        }
    }

    #[test]
    fn commands_wait_for_the_negotiation() {
        for name in ["query-status", "no-such-command", "quit"] {
            let error = parse(json!({"execute": name}), false, Access::All).command.unwrap_err();
            assert_eq!((error.class, error.code), (Class::CommandNotFound, "not-negotiated"));
        }
        assert_eq!(
            parse(json!({"execute": "qmp_capabilities"}), false, Access::All).command,
            Ok(Command::QmpCapabilities)
        );
        assert_eq!(ask(r#"{"execute":"qmp_capabilities"}"#).unwrap_err().code, "already-negotiated");
        let enable = json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}});
        assert_eq!(parse(enable, false, Access::All).command.unwrap_err().code, "bad-argument");
        let enable = json!({"execute": "qmp_capabilities", "arguments": {"enable": []}});
        assert_eq!(parse(enable, false, Access::All).command, Ok(Command::QmpCapabilities));
    }

    #[test]
    fn quiesce_has_defaults() {
        let defaults = QuiesceArgs {
            timeout: Duration::from_secs(10),
            lease: Duration::from_secs(30),
            detached: false,
            who: None,
        };
        assert_eq!(ask(r#"{"execute":"quiesce"}"#), Ok(Command::Quiesce(defaults)));
        let given = ask(
            r#"{"execute":"quiesce","arguments":{"timeout-ms":1,"lease-ms":3600000,"detached":true,"who":"backup"}}"#,
        );
        let wanted = QuiesceArgs {
            timeout: Duration::from_millis(1),
            lease: Duration::from_secs(3600),
            detached: true,
            who: Some("backup".into()),
        };
        assert_eq!(given, Ok(Command::Quiesce(wanted)));
    }

    #[test]
    fn wrong_requests_say_what_is_wrong() {
        refused(r#"{}"#, "bad-request", &["execute"]);
        refused(r#"{"execute":3}"#, "bad-request", &["execute", "string"]);
        refused(r#"{"execute":"quit","arguments":[]}"#, "bad-request", &["arguments", "object"]);
        refused(r#"{"execute":"quit","argument":{}}"#, "bad-request", &["'argument'"]);
        refused(r#"{"execute":"quitt"}"#, "unknown-command", &["quitt", "query-commands"]);
        refused(r#"{"execute":"quit","arguments":{"now":true}}"#, "bad-argument", &["quit", "now"]);
        refused(r#"{"execute":"quiesce","arguments":{"timeout":5}}"#, "bad-argument", &["quiesce", "'timeout'"]);
        refused(r#"{"execute":"quiesce","arguments":{"timeout-ms":"5"}}"#, "bad-argument", &["timeout-ms", "a string"]);
        for wrong in ["0", "-1", "1.5", "3600001", "1e300", "18446744073709551616"] {
            let text = format!(r#"{{"execute":"quiesce","arguments":{{"lease-ms":{wrong}}}}}"#);
            refused(&text, "bad-argument", &["lease-ms", "3600000"]);
        }
        refused(r#"{"execute":"quiesce","arguments":{"detached":1}}"#, "bad-argument", &["detached", "a number"]);
        refused(r#"{"execute":"resume"}"#, "bad-argument", &["token", "all"]);
        refused(r#"{"execute":"resume","arguments":{"all":true,"token":"x"}}"#, "bad-argument", &["not both"]);
        refused(r#"{"execute":"resume","arguments":{"token":7}}"#, "bad-argument", &["token", "a number"]);
        refused(r#"{"execute":"renew-lease"}"#, "bad-argument", &["token"]);
        let long = json!({"execute": "quiesce", "arguments": {"who": "x".repeat(257)}}).to_string();
        refused(&long, "bad-argument", &["who", "256"]);
        let long = json!({"execute": "\u{e9}".repeat(5000)}).to_string();
        assert!(ask(&long).unwrap_err().desc.len() < 300, "a long name is cut");
        assert_eq!(parse(json!([1]), true, Access::All).command.unwrap_err().code, "bad-request");
    }

    #[test]
    fn the_id_is_echoed_whatever_it_is() {
        for id in [json!(1), json!("a"), json!(null), json!({"b": [1, 2]})] {
            let request = parse(json!({"execute": "nonsense", "id": id}), true, Access::All);
            assert_eq!(request.id.as_ref(), Some(&id));
            let text = reply(request.id.as_ref(), Err(request.command.unwrap_err()));
            let value: Value = serde_json::from_slice(&text).unwrap();
            assert_eq!(value["id"], id);
            assert_eq!(value["error"]["class"], "CommandNotFound");
            assert_eq!(value["error"]["code"], "unknown-command");
        }
        assert_eq!(reply(None, Ok(json!({}))), b"{\"return\":{}}\r\n");
    }

    #[test]
    fn every_command_is_documented_and_listed() {
        let source = include_str!("mod.rs");
        for (name, ..) in COMMANDS {
            assert!(source.contains(&format!("//! | `{name}` |")), "{name} is missing in the table");
        }
        assert_eq!(command_list(Access::All).as_array().unwrap().len(), COMMANDS.len());
    }

    /// The commands that each access adds, by name: a new command must be put here on purpose.
    #[test]
    fn each_access_has_its_commands() {
        let names = |access| -> Vec<String> {
            let list = command_list(access);
            list.as_array().unwrap().iter().map(|command| command["name"].as_str().unwrap().to_owned()).collect()
        };
        let (asks, operates, all) = (names(Access::ReadOnly), names(Access::Operate), names(Access::All));
        let queries = ["qmp_capabilities", "query-commands", "query-version", "query-status", "query-stats"];
        assert_eq!(asks, [&queries[..], &["query-copies"]].concat());
        let added: Vec<&String> = all.iter().filter(|name| !operates.contains(name)).collect();
        assert_eq!(added, ["query-command-line", "hand-over", "quit"]);
        for name in &all {
            for (access, allowed) in [(Access::ReadOnly, &asks), (Access::Operate, &operates), (Access::All, &all)] {
                let negotiated = name != "qmp_capabilities";
                let refused = parse(json!({"execute": name}), negotiated, access).command;
                let refused = refused.is_err_and(|error| error.code == "not-allowed");
                assert_eq!(refused, !allowed.contains(name), "{name} with {access}");
            }
        }
        let resize = |force| json!({"execute": "resize", "arguments": {"force": force}});
        assert!(parse(resize(false), true, Access::Operate).command.is_ok());
        let error = parse(resize(true), true, Access::Operate).command.unwrap_err();
        assert_eq!(error.code, "not-allowed");
        assert!(error.desc.contains("force") && error.desc.contains("root"), "{}", error.desc);
        assert!(parse(resize(true), true, Access::All).command.is_ok());
    }

    #[test]
    fn a_message_is_one_line() {
        let text = event("IO_ERROR", json!({"message": "two\nlines"}), UNIX_EPOCH + Duration::from_micros(1_500_000));
        let text = String::from_utf8(text).unwrap();
        assert_eq!(text.matches('\n').count(), 1);
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["timestamp"], json!({"seconds": 1, "microseconds": 500_000}));
        let greeting: Value = serde_json::from_slice(&greeting()).unwrap();
        assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64());
        assert_eq!(greeting["QMP"]["capabilities"], json!([]));
    }
}
