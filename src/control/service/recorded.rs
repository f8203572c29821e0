//! The JSON that clients parse, compared byte for byte with `recorded.jsonl`: replies and events for one fixed state.
//! With `RECORD=1` in its environment the test writes the file anew, for a change of the protocol that is wanted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{ClientInfo, CommandLine, DaemonInfo, Recipient, Service, ServiceSetup};
use crate::backend::QuiesceRequest;
use crate::control::access::Access;
use crate::control::creds::Credentials;
use crate::control::image_notices::{ImageNotice, ImageNotices, PendingNotices};
use crate::control::protocol::return_types::TookOver;
use crate::disk::{
    ChangedWrite, Copies, CopyError, CopyOptions, CopyStatus, Disk, DiskStatus, Event, EventBatch, ExportStatus,
    FailedRequest, HoldFigures, ImageStatus, LastError, LatencyByKind, LatencyHistogram, LatencyStatus,
    RbdQuiesceStatus, RbdStatus, RingStatus, StableWritesStatus, StoppedStatus, ThrottleStatus, UnsyncedStatus,
};
use crate::engine::{Errno, Kind};

fn batch(events: Vec<Event>) -> EventBatch {
    EventBatch { events, dropped: 0 }
}

/// A disk whose every figure is fixed and none is zero.
struct FixedDisk;

impl Disk for FixedDisk {
    fn close_gate(&self, _: u64) {}

    fn open_gate(&self) {}

    fn status(&self) -> DiskStatus {
        let ring = |index, size| RingStatus {
            index,
            size,
            untracked: true,
            in_flight: 3,
            stalled: 2,
            oldest_stalled_ms: 10_500,
            held: true,
            limited: true,
            kept: 1,
            reads: 11,
            read_bytes: 11 << 12,
            writes: 12,
            written_bytes: 12 << 12,
            flushes: 13,
            syncs: 14,
            discards: 15,
            write_zeroes: 16,
            errors: 17,
            unsupported: 18,
            interrupts: 19,
            polled: 20,
        };
        DiskStatus {
            image: "file: /images/vda.img".into(),
            image_path: Some("/images/vda.img".into()),
            image_path_b64: Some("L2ltYWdlcy92ZGEuaW1n".into()),
            size: 1 << 30,
            logical_block_size: 512,
            read_only: true,
            cache_mode: "writeback".into(),
            write_acknowledged: "when stored".into(),
            guest_flush: "synced".into(),
            guest_sees: "write back".into(),
            connected: true,
            driver_ready: true,
            acked_features: 0x1_7000_1240,
            rings: vec![ring(0, 128), ring(1, 256)],
            total: ring(0, 0),
            stopped: Some(StoppedStatus::new(&failed(), 4)),
            on_error: "enospc".into(),
            throttle: Some(ThrottleStatus([("total-iops-sec".to_owned(), 500)].into())),
            last_errors: vec![LastError { what: "write failed".into(), when: 1_700_000_000, times: 2 }],
            sync_failed: true,
            copies_ending: 1,
            detected_format: None,
            image_status: image_status(),
        }
    }

    fn latency(&self) -> LatencyStatus {
        let one = |bin| LatencyHistogram { sum_ns: bin * 1250, boundaries: vec![1000, 1250], bins: vec![0, bin, 0] };
        let kinds = |first| LatencyByKind {
            read: one(first),
            write: one(first + 1),
            flush: one(first + 2),
            discard: one(first + 3),
            write_zeroes: one(first + 4),
        };
        LatencyStatus { request: kinds(1), backend: kinds(6), held: one(11), limited: one(12) }
    }

    fn unsynced(&self) -> UnsyncedStatus {
        UnsyncedStatus { unsynced_bytes: 49_152, last_sync_ms: Some(250) }
    }

    fn continue_io(&self) -> u64 {
        2
    }

    fn resize(&self, grow_to: Option<u64>, _: bool) -> Result<u64, String> {
        grow_to.ok_or_else(|| "it cannot be resized".to_owned())
    }

    fn copies(&self) -> Option<&dyn Copies> {
        Some(self)
    }
}

impl Copies for FixedDisk {
    fn prepare(&self, _: &CopyOptions) -> Result<String, CopyError> {
        Ok("copy-1".into())
    }

    fn start(&self, _: &str) -> Result<(), CopyError> {
        Err(CopyError { code: "busy", message: "a write is in flight".into() })
    }

    fn cancel(&self, _: &str) -> Result<(), CopyError> {
        Ok(())
    }

    fn set_bandwidth(&self, _: &str, _: u64) -> Result<(), CopyError> {
        Ok(())
    }

    fn status(&self) -> Vec<CopyStatus> {
        vec![CopyStatus::default(), copy()]
    }
}

fn failed() -> FailedRequest {
    FailedRequest { kind: Kind::Write, ring: 1, offset: 4096, len: 512, errno: Errno(libc::ENOSPC) }
}

fn copy() -> CopyStatus {
    CopyStatus {
        copy: "copy-1".into(),
        target: "/backup/vda.img".into(),
        state: "completed".into(),
        total_bytes: 1 << 30,
        done_bytes: 1 << 29,
        saved_before_write_bytes: 1 << 20,
        stored_bytes: 1 << 28,
        scratch_bytes: 1 << 16,
        instant: Some(1_700_000_000.5),
        seconds: 12.25,
        slowed_seconds: 1.5,
        sha256: Some("00ff".into()),
        error: Some("it failed".into()),
        ending: true,
        export: Some(ExportStatus { name: "vda".into(), clients: 2, read_bytes: 4096 }),
    }
}

fn image_status() -> ImageStatus {
    ImageStatus {
        trouble: Some("fenced".into()),
        trouble_detail: Some("another client has the lock".into()),
        stable_writes: Some(StableWritesStatus {
            asked: "auto".into(),
            in_effect: "detect".into(),
            why: "the medium reads a buffer twice".into(),
            copied_writes: 1,
            copied_bytes: 2,
            waited_writes: 3,
            memory_bytes: 4,
            most_memory_bytes: 5,
            shared_memory_limit: 6,
            checked_writes: 7,
            changed_writes: 8,
            last_changed: vec![ChangedWrite { offset: 4096, length: 512, when: 1_700_000_000 }],
        }),
        rbd: Some(RbdStatus {
            image: "rbd/vda".into(),
            lock: "held".into(),
            quiesce: Some(RbdQuiesceStatus { watching: true, asked: 3, refused: 2, expired: 1 }),
        }),
    }
}

/// Every event of the disk, once.
fn events() -> Vec<Event> {
    let failed = failed();
    vec![
        Event::Connected,
        Event::Disconnected("it left".into()),
        Event::IoError(FailedRequest { kind: Kind::Flush, ring: 1, offset: 0, len: 0, errno: failed.errno }),
        Event::IoStopped(failed),
        Event::IoContinued { ring: 1 },
        Event::IoStalled { ring: 1, requests: 2, oldest: Duration::from_millis(10_500) },
        Event::IoResumed { ring: 1 },
        Event::SyncError(Errno(libc::EIO)),
        Event::CopyEnded(copy()),
        Event::BufferChanged { offset: 4096, len: 512, suppressed: 3 },
        Event::ImageState(image_status()),
        Event::ProtocolError("it broke the protocol".into()),
    ]
}

/// Drives one service through a hold of a client and a snapshot of the store, and returns its lines.
fn conversation() -> Vec<String> {
    let info = DaemonInfo {
        vhost_socket: "/run/vda.sock".into(),
        command_line: Some(CommandLine {
            program: "/usr/bin/virtioblkd".into(),
            arguments: vec!["--blk-file=/images/vda.img".into()],
            directory: "/".into(),
            notify_socket: Some("/run/notify".into()),
        }),
    };
    let notices = ImageNotices::new().unwrap();
    let start = Instant::now();
    let mut service = Service::new(ServiceSetup {
        disk: Arc::new(FixedDisk),
        info,
        inbox: notices.inbox(),
        store_timeout: Duration::from_secs(9),
        attended: true,
        max_hold: Some(Duration::from_secs(60)),
        resized: Box::new(|_| {}),
        upgrade: None,
    });
    service.took_over(TookOver { from_pid: 7, pause_us: 1500, drained_us: None }, false);
    let mut lines = Vec::new();
    let mut negotiated = true;
    let mut token = String::new();
    let at = |milliseconds| start + Duration::from_millis(milliseconds);
    let client = ClientInfo { peer: 1, credentials: Credentials { pid: 41, uid: 42 }, access: Access::All };
    let mut ask = |service: &mut Service, command: &str, arguments: Value, now: Instant| {
        let request = json!({"execute": command, "arguments": arguments, "id": command});
        service.request(client, &mut negotiated, Ok(request), now);
    };
    let mut collect = |service: &mut Service, token: &mut String| {
        for (to, line) in service.outgoing() {
            let value: Value = serde_json::from_slice(&line).unwrap();
            if let Some(given) = value["return"]["token"].as_str().or(value["data"]["token"].as_str()) {
                *token = given.to_owned();
            }
            let mut text = String::from_utf8(line).unwrap();
            text = text.trim_end().to_owned();
            if value["timestamp"].is_object() {
                text = text.replace(&value["timestamp"].to_string(), "TIMESTAMP");
            }
            if !token.is_empty() {
                text = text.replace(token.as_str(), "TOKEN");
            }
            let (pid, version) = (format!("\"pid\":{}", std::process::id()), env!("CARGO_PKG_VERSION"));
            // The recorded words stay, whatever the code calls its recipients.
            let to = match to {
                Recipient::Requester(peer) => format!("Reply({peer})"),
                Recipient::One(peer) => format!("Only({peer})"),
                Recipient::All => "Everyone".to_owned(),
            };
            lines.push(format!("{to} {}", text.replace(&pid, "\"pid\":PID").replace(version, "VERSION")));
        }
    };
    let query = |service: &mut Service, ask: &mut dyn FnMut(&mut Service, &str, Value, Instant), now| {
        for command in ["query-version", "query-commands", "query-status", "query-stats", "query-copies"] {
            ask(service, command, json!({}), now);
        }
        ask(service, "query-command-line", json!({}), now);
    };
    query(&mut service, &mut ask, at(0));
    ask(&mut service, "continue", json!({}), at(0));
    ask(&mut service, "resize", json!({"size": 4096}), at(0));
    ask(&mut service, "resize", json!({}), at(0));
    ask(&mut service, "copy-prepare", json!({"target": "/backup/vda.img"}), at(0));
    ask(&mut service, "copy-start", json!({"copy": "copy-1", "token": "none"}), at(0));
    ask(&mut service, "resume", json!({"token": "none"}), at(0));
    ask(&mut service, "image-snapshot-keep", json!({"name": "s"}), at(0));
    ask(&mut service, "hand-over", json!({"version": 1}), at(0));
    service.disk_events(EventBatch { events: events(), dropped: 5 }, at(0));
    collect(&mut service, &mut token);

    let figures = HoldFigures {
        rings: 2,
        drained: 3,
        drain: Duration::from_micros(4),
        sync: Duration::from_micros(5),
        bytes_synced: 6,
    };
    ask(&mut service, "quiesce", json!({"who": "backup", "detached": true}), at(0));
    service.disk_events(batch(vec![Event::HoldSettled { epoch: 1, result: Ok(figures) }]), at(20));
    collect(&mut service, &mut token);
    ask(&mut service, "query-status", json!({}), at(1020));
    ask(&mut service, "renew-lease", json!({"token": token.as_str(), "lease-ms": 1000}), at(1020));
    service.tick(at(3000));
    ask(&mut service, "resume", json!({"token": token.as_str()}), at(3000));
    ask(&mut service, "resume", json!({"all": true}), at(3000));
    ask(&mut service, "quiesce", json!({}), at(3000));
    service.disk_events(batch(vec![Event::HoldSettled { epoch: 2, result: Err(Errno(libc::EIO)) }]), at(3001));
    ask(&mut service, "quiesce", json!({}), at(3002));
    service.disk_events(batch(vec![Event::HoldRefused { epoch: 3 }]), at(3003));
    collect(&mut service, &mut token);

    let note = |service: &mut Service, note: ImageNotice, now: Instant| {
        service.handle_image_notices(
            PendingNotices { queue: [note].into(), state_changed: true, ..PendingNotices::default() },
            now,
        );
    };
    note(&mut service, ImageNotice::Quiesce(QuiesceRequest::new(|_| {}), at(4000)), at(4000));
    ask(&mut service, "attend", json!({"who": "guest"}), at(4000));
    note(&mut service, ImageNotice::Quiesce(QuiesceRequest::new(|_| {}), at(4001)), at(4001));
    ask(&mut service, "query-status", json!({}), at(4001));
    ask(&mut service, "prepared", json!({"id": 1, "level": "filesystem"}), at(4002));
    service.disk_events(batch(vec![Event::HoldSettled { epoch: 4, result: Ok(figures) }]), at(4003));
    note(&mut service, ImageNotice::Unquiesce(at(14_003)), at(14_003));
    note(&mut service, ImageNotice::Quiesce(QuiesceRequest::new(|_| {}), at(15_000)), at(15_000));
    ask(&mut service, "prepared", json!({"id": 2, "error": "no agent"}), at(15_001));
    ask(&mut service, "unattend", json!({}), at(15_002));
    ask(&mut service, "quit", json!({}), at(15_003));
    service.shutdown(at(15_004));
    collect(&mut service, &mut token);
    lines
}

#[test]
fn the_json_is_what_was_recorded() {
    let lines = conversation().join("\n") + "\n";
    if std::env::var_os("RECORD").is_some() {
        std::fs::write("src/control/service/recorded.jsonl", &lines).unwrap();
    }
    let recorded = include_str!("recorded.jsonl");
    for (number, (now, then)) in lines.lines().zip(recorded.lines()).enumerate() {
        assert_eq!(now, then, "line {}", number + 1);
    }
    assert_eq!(lines, recorded);
}
