//! PURE. The protocol as data, in the form of QEMU's `query-qmp-schema` (qapi/introspect.json): a list of commands, events and
//! the types that they use. docs/control-protocol.md explains them. Tests compare the page, this data and the code.
//!
//! A list of members is written `name: type, name?: type`; `?` marks a member that may be absent. A type is `str`, `int`,
//! `number`, `bool`, a name of [`OBJECTS`] or [`ENUMS`], a list `[type]`, or `type|null`.

use serde_json::{Value, json};

/// Each command: its name, its arguments, and the type that it returns.
const COMMANDS: &[(&str, &str, &str)] = &[
    ("qmp_capabilities", "enable?: [str]", "Nothing"),
    ("query-commands", "", "[CommandInfo]"),
    ("query-version", "", "VersionInfo"),
    ("query-qmp-schema", "", "[SchemaInfo]"),
    ("query-status", "", "Status"),
    ("query-stats", "", "Stats"),
    ("quiesce", "timeout-ms?: int, lease-ms?: int, detached?: bool, who?: str", "Quiesced"),
    ("renew-lease", "token: str, lease-ms?: int", "Lease"),
    ("resume", "token?: str, all?: bool", "Resumed"),
    ("copy-prepare", "target: str, bandwidth?: int, digest?: bool, detached?: bool", "CopyName"),
    ("copy-start", "copy: str, token: str", "Nothing"),
    ("copy-cancel", "copy: str", "Nothing"),
    ("copy-bandwidth", "copy: str, bandwidth: int", "Nothing"),
    ("getfd", "fdname: str", "Nothing"),
    ("closefd", "fdname: str", "Nothing"),
    (
        "export-prepare",
        "fdname: str, name: str, scratch-size?: int, bandwidth?: int, idle-ms?: int, detached?: bool",
        "CopyName",
    ),
    ("query-copies", "", "[CopyStatus]"),
    ("continue", "", "Continued"),
    ("resize", "size?: int, force?: bool", "Resized"),
    (
        "block_set_io_throttle",
        "device?: str, id?: str, bps?: int, bps_max?: int, bps_max_length?: int, bps_rd?: int, \
         bps_rd_max?: int, bps_rd_max_length?: int, bps_wr?: int, bps_wr_max?: int, bps_wr_max_length?: int, \
         iops?: int, iops_max?: int, iops_max_length?: int, iops_rd?: int, iops_rd_max?: int, \
         iops_rd_max_length?: int, iops_wr?: int, iops_wr_max?: int, iops_wr_max_length?: int, \
         iops_size?: int",
        "Nothing",
    ),
    ("image-snapshot", "name: str, token: str", "SnapshotName"),
    ("image-snapshot-keep", "name: str", "Nothing"),
    ("image-snapshot-remove", "name: str", "Nothing"),
    ("attend", "required?: bool, timeout-ms?: int, who?: str", "Nothing"),
    ("prepared", "id: int, level?: str, error?: str", "Nothing"),
    ("unattend", "", "Nothing"),
    ("query-command-line", "", "CommandLine"),
    ("hand-over", "version: int", "Nothing"),
    ("quit", "", "Nothing"),
];

/// Each event: its name and its data.
const EVENTS: &[(&str, &str)] = &[
    (
        "QUIESCED",
        "token: str, who: str|null, pid: int|null, uid: int|null, detached: bool, lease-ms: int, epoch: int, rings: int, \
         drained: int, drain-us: int, sync-us: int, bytes-synced: int, holders: int",
    ),
    (
        "RESUMED",
        "token: str, who: str|null, pid: int|null, uid: int|null, reason: ResumeReason, held-ms: int, holders: int",
    ),
    ("LEASE_EXPIRED", "token: str, who: str|null, pid: int|null, uid: int|null"),
    ("QUIESCE_FAILED", "who: str|null, pid: int|null, uid: int|null, code: ErrorCode"),
    ("QUIESCE_EXPIRED", "who: str, held-ms: int"),
    ("PREPARE", "id: int, timeout-ms: int, who: str"),
    ("RELEASED", "id: int"),
    ("PREPARED", "level: str|null"),
    ("PREPARE_FAILED", "message: str, required: bool"),
    ("FRONTEND_CONNECTED", ""),
    ("FRONTEND_DISCONNECTED", "reason: str"),
    ("IO_ERROR", "operation: str, ring: int, offset: int, length: int, errno: int, message: str, suppressed: int"),
    ("IO_STOPPED", "operation: str, ring: int, offset: int, length: int, errno: int, message: str"),
    ("IO_CONTINUED", "ring: int"),
    ("IO_STALLED", "ring: int, requests: int, oldest-ms: int"),
    ("IO_RESUMED", "ring: int"),
    ("SYNC_ERROR", "errno: int, message: str, suppressed: int"),
    ("COPY_COMPLETED", COPY_STATUS),
    ("COPY_FAILED", COPY_STATUS),
    ("COPY_CANCELLED", COPY_STATUS),
    ("BUFFER_CHANGED", "offset: int, length: int, suppressed: int"),
    ("IMAGE_STATE", IMAGE_STATUS),
    ("PROTOCOL_ERROR", "message: str, suppressed: int"),
    ("UPGRADE", ""),
    ("SHUTDOWN", ""),
];

const COPY_STATUS: &str = "copy: str, target: str, state: CopyState, total-bytes: int, done-bytes: int, \
    saved-before-write-bytes: int, stored-bytes: int, scratch-bytes: int, instant: number|null, seconds: number, \
    slowed-seconds: number, sha256: str|null, error: str|null, ending: bool, export?: ExportStatus";

const IMAGE_STATUS: &str =
    "trouble: str|null, trouble-detail: str|null, stable-writes?: StableWritesStatus, rbd?: RbdStatus";

/// The object types. Those of `return_types` and `crate::disk` have the names that they have there.
const OBJECTS: &[(&str, &[&str])] = &[
    ("Nothing", &[]),
    ("CommandInfo", &["name: str"]),
    ("VersionInfo", &["qemu: VersionTriple, package: str"]),
    ("VersionTriple", &["major: int, minor: int, micro: int"]),
    (
        "SchemaInfo",
        &["name: str, meta-type: str, json-type?: str, arg-type?: str, ret-type?: str, element-type?: str, \
           members?: [SchemaMember], values?: [str]"],
    ),
    ("SchemaMember", &["name?: str, type?: str, default?: str|null"]),
    (
        "Status",
        &[
            "image: str, image-path: str|null, image-path-b64?: str, size: int, logical-block-size: int, \
             read-only: bool, cache-mode: CacheMode, write-acknowledged: str, guest-flush: str, guest-sees: str, \
             connected: bool, driver-ready: bool, acked-features: int, rings: [RingStatus], total: RingStatus, \
             stopped: StoppedStatus|null, on-error: OnError, throttle?: ThrottleStatus, last-errors: [LastError], \
             sync-failed: bool, \
             copies-ending: int, detected-format?: str, quiesce: QuiesceStatus, image-snapshots: bool, \
             attendant: AttendantStatus|null, daemon: DaemonStatus",
            IMAGE_STATUS,
        ],
    ),
    (
        "Stats",
        &["rings: [RingStatus], total: RingStatus, stable-writes: StableWritesStatus|null, latency: LatencyStatus, \
           unsynced-bytes: int, last-sync-ms: int|null"],
    ),
    (
        "LatencyStatus",
        &["request: LatencyByKind, backend: LatencyByKind, held: LatencyHistogram, limited: LatencyHistogram"],
    ),
    (
        "LatencyByKind",
        &["read: LatencyHistogram, write: LatencyHistogram, flush: LatencyHistogram, discard: LatencyHistogram, \
           write-zeroes: LatencyHistogram"],
    ),
    ("LatencyHistogram", &["sum-ns: int, boundaries: [int], bins: [int]"]),
    (
        "RingStatus",
        &["index: int, size: int, untracked: bool, in-flight: int, stalled: int, oldest-stalled-ms: int, held: bool, \
           limited: bool, kept: int, reads: int, read-bytes: int, writes: int, written-bytes: int, flushes: int, syncs: int, \
           discards: int, write-zeroes: int, errors: int, unsupported: int, interrupts: int, polled: int"],
    ),
    (
        "StoppedStatus",
        &["operation: str, ring: int, offset: int, length: int, errno: int, message: str, requests: int"],
    ),
    (
        "ThrottleStatus",
        &["total-bytes-sec?: int, total-bytes-sec-max?: int, total-bytes-sec-max-length?: int, \
           read-bytes-sec?: int, read-bytes-sec-max?: int, read-bytes-sec-max-length?: int, \
           write-bytes-sec?: int, write-bytes-sec-max?: int, write-bytes-sec-max-length?: int, \
           total-iops-sec?: int, total-iops-sec-max?: int, total-iops-sec-max-length?: int, \
           read-iops-sec?: int, read-iops-sec-max?: int, read-iops-sec-max-length?: int, write-iops-sec?: int, \
           write-iops-sec-max?: int, write-iops-sec-max-length?: int, size-iops-sec?: int"],
    ),
    ("LastError", &["what: str, when: int, times: int"]),
    (
        "StableWritesStatus",
        &["asked: str, in-effect: str, why: str, copied-writes: int, copied-bytes: int, waited-writes: int, \
           memory-bytes: int, most-memory-bytes: int, shared-memory-limit: int, checked-writes: int, \
           changed-writes: int, last-changed: [ChangedWrite]"],
    ),
    ("ChangedWrite", &["offset: int, length: int, when: int"]),
    ("RbdStatus", &["image: str, lock: str, quiesce: RbdQuiesceStatus|null"]),
    ("RbdQuiesceStatus", &["watching: bool, asked: int, refused: int, expired: int"]),
    (
        "QuiesceStatus",
        &["state: GateState, closed-ms: int|null, held-ms: int, max-hold-ms: int|null, waiting: int, \
           holders: [HolderStatus]"],
    ),
    (
        "HolderStatus",
        &["token: str, who: str|null, pid: int|null, uid: int|null, detached: bool, held-ms: int, lease-left-ms: int"],
    ),
    (
        "AttendantStatus",
        &["who: str|null, pid: int|null, uid: int|null, present: bool, required: bool, preparing: bool"],
    ),
    (
        "DaemonStatus",
        &["version: str, revision?: str, pid: int, uptime-seconds: int, vhost-socket: str, took-over: TookOver|null"],
    ),
    ("TookOver", &["from-pid: int, pause-us: int, drained-us?: int"]),
    (
        "Quiesced",
        &["token: str, lease-ms: int, epoch: int, rings: int, drained: int, drain-us: int, sync-us: int, \
           bytes-synced: int, holders: int"],
    ),
    ("Lease", &["lease-ms: int"]),
    ("Resumed", &["resumed: int, holders: int"]),
    ("CopyName", &["copy: str"]),
    ("CopyStatus", &[COPY_STATUS]),
    ("ExportStatus", &["name: str, clients: int, read-bytes: int"]),
    ("Continued", &["retried: int"]),
    ("Resized", &["size: int"]),
    ("SnapshotName", &["snapshot: str"]),
    ("CommandLine", &["program: str, arguments: [str], directory: str, notify-socket: str|null"]),
];

/// The enumerations.
const ENUMS: &[(&str, &[&str])] = &[
    ("CacheMode", &["none", "directsync", "writeback", "writethrough", "unsafe"]),
    ("OnError", &["enospc", "report", "stop"]),
    ("GateState", &["open", "settling", "quiesced"]),
    ("ResumeReason", &["resume", "lease-expired", "connection-closed", "shutdown"]),
    ("CopyState", &["prepared", "running", "syncing", "completed", "failed", "cancelled"]),
    ("ErrorCode", ERROR_CODES),
];

/// Every `code` of an error reply.
pub(super) const ERROR_CODES: &[&str] = &[
    "parse-error",
    "bad-request",
    "not-negotiated",
    "already-negotiated",
    "unknown-command",
    "bad-argument",
    "timeout",
    "sync-failed",
    "not-ours",
    "stopped",
    "cancelled",
    "not-prepared",
    "attended",
    "not-attending",
    "not-asked",
    "not-quiesced",
    "unknown-token",
    "lease-expired",
    "not-held",
    "too-many-holders",
    "max-hold",
    "busy",
    "no-descriptor",
    "scratch",
    "no-such-copy",
    "target",
    "resources",
    "resize",
    "no-copies",
    "no-image-snapshots",
    "exists",
    "store",
    "no-such-snapshot",
    "not-now",
    "upgrading",
    "no-upgrade",
    "shutting-down",
    "too-many-clients",
    "internal",
    "not-allowed",
];

/// The builtin types, with their types in JSON.
const BUILTINS: &[(&str, &str)] =
    &[("str", "string"), ("int", "int"), ("number", "number"), ("bool", "boolean"), ("null", "null")];

/// The reply to `query-qmp-schema`.
pub fn schema() -> Value {
    let mut entries = Vec::new();
    let mut types = Vec::new();
    for (name, arguments, returns) in COMMANDS {
        let arg_type = argument_type(name, arguments);
        entries.push(json!({"name": name, "meta-type": "command", "arg-type": arg_type, "ret-type": returns}));
        types.push((*returns).to_owned());
    }
    for (name, data) in EVENTS {
        entries.push(json!({"name": name, "meta-type": "event", "arg-type": argument_type(name, data)}));
    }
    let lists = COMMANDS.iter().map(|(name, members, _)| (*name, *members)).chain(EVENTS.iter().copied());
    for (name, members) in lists.filter(|(_, members)| !members.is_empty()) {
        entries.push(object(&argument_type(name, members), &[members], &mut types));
    }
    for (name, members) in OBJECTS {
        entries.push(object(name, members, &mut types));
    }
    for (name, values) in ENUMS {
        let members: Vec<Value> = values.iter().map(|value| json!({"name": value})).collect();
        entries.push(json!({"name": name, "meta-type": "enum", "members": members, "values": values}));
    }
    for (name, json_type) in BUILTINS {
        entries.push(json!({"name": name, "meta-type": "builtin", "json-type": json_type}));
    }
    types.sort();
    types.dedup();
    entries.extend(types.iter().filter_map(|name| derived(name)));
    Value::Array(entries)
}

/// The name of the object type of a command's arguments or an event's data.
fn argument_type(name: &str, members: &str) -> String {
    if members.is_empty() { "Nothing".into() } else { format!("{name}-arg") }
}

/// An object type. Adds the types of its members to `types`.
fn object(name: &str, lists: &[&str], types: &mut Vec<String>) -> Value {
    let mut members = Vec::new();
    for member in lists.iter().flat_map(|list| list.split(", ")) {
        let Some((name, kind)) = member.split_once(": ") else { continue };
        types.push(kind.to_owned());
        // As in QEMU, `default` only marks that the member may be absent.
        members.push(match name.strip_suffix('?') {
            Some(name) => json!({"name": name, "type": kind, "default": null}),
            None => json!({"name": name, "type": kind}),
        });
    }
    json!({"name": name, "meta-type": "object", "members": members})
}

/// The entry of a list or of a type that may be null. `None`: another entry has this type.
fn derived(name: &str) -> Option<Value> {
    if let Some(element) = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        return Some(json!({"name": name, "meta-type": "array", "element-type": element}));
    }
    let other = name.strip_suffix("|null")?;
    Some(json!({"name": name, "meta-type": "alternate", "members": [{"type": other}, {"type": "null"}]}))
}

#[cfg(test)]
mod tests;
