//! PURE. The metrics: each with its name, its type, its meaning, and where its samples are in a disk's figures.

use std::collections::{HashMap, HashSet};

use virtioblkd::disk::{CopyStatus, DiskStatus, RingStatus};
use virtioblkd::internal::control::protocol::return_types::{Stats, Status};
use virtioblkd::internal::host::listing::Listed;
use virtioblkd::internal::host::measure::Measured;

use super::text::{Format, Kind, Page, escaped};
use Kind::{Counter, Gauge, Histogram, Info};

/// What a daemon reported.
struct Figures<'a> {
    status: &'a Status,
    disk: &'a DiskStatus,
    stats: &'a Stats,
    total: &'a RingStatus,
    copies: &'a [CopyStatus],
}

/// A metric: its name without a suffix, its type, its meaning, and what adds a disk's samples.
type Family = (&'static str, Kind, &'static str, fn(&Figures, &mut Page));

const FAMILIES: &[Family] = &[
    ("virtioblkd_daemon", Info, "The daemon and how it serves the disk.", |of, page| {
        let daemon = &of.status.daemon;
        let labels = [
            ("version", daemon.version.as_str()),
            ("revision", daemon.revision.as_deref().unwrap_or("")),
            ("cache_mode", &of.disk.cache_mode),
            ("image", &of.disk.image),
            ("write_acknowledged", &of.disk.write_acknowledged),
            ("guest_flush", &of.disk.guest_flush),
            ("on_error", &of.disk.on_error),
            ("read_only", if of.disk.read_only { "true" } else { "false" }),
        ];
        page.sample(&labels, 1);
    }),
    ("virtioblkd_uptime_seconds", Gauge, "How long the daemon has run.", |of, page| {
        page.sample(&[], of.status.daemon.uptime_seconds);
    }),
    ("virtioblkd_size_bytes", Gauge, "The size of the disk.", |of, page| page.sample(&[], of.disk.size)),
    ("virtioblkd_connected", Gauge, "A front-end is connected (1) or not (0).", |of, page| {
        page.sample(&[], u8::from(of.disk.connected));
    }),
    ("virtioblkd_requests", Counter, "Requests completed, by kind.", |of, page| {
        let RingStatus { reads, writes, flushes, discards, write_zeroes, .. } = of.total;
        let counts = [reads, writes, flushes, discards, write_zeroes];
        for ((kind, _), count) in of.stats.latency.request.each().iter().zip(counts) {
            page.sample(&[("kind", kind)], count);
        }
    }),
    ("virtioblkd_read_bytes", Counter, "Bytes that the guest read.", |of, page| page.sample(&[], of.total.read_bytes)),
    ("virtioblkd_written_bytes", Counter, "Bytes that the guest wrote.", |of, page| {
        page.sample(&[], of.total.written_bytes);
    }),
    ("virtioblkd_syncs", Counter, "Syncs given to the image.", |of, page| page.sample(&[], of.total.syncs)),
    ("virtioblkd_request_errors", Counter, "Requests that failed, and the guest got the error.", |of, page| {
        page.sample(&[], of.total.errors);
    }),
    ("virtioblkd_unsupported_requests", Counter, "Requests of a kind that the disk does not offer.", |of, page| {
        page.sample(&[], of.total.unsupported);
    }),
    ("virtioblkd_interrupts", Counter, "Interrupts sent to the guest.", |of, page| {
        page.sample(&[], of.total.interrupts);
    }),
    ("virtioblkd_polled_sleeps", Counter, "Sleeps that busy polling saved.", |of, page| {
        page.sample(&[], of.total.polled);
    }),
    ("virtioblkd_queues", Gauge, "Virtqueues that are running.", |of, page| page.sample(&[], of.stats.rings.len())),
    ("virtioblkd_requests_in_flight", Gauge, "Requests taken and not completed: the queue depth.", |of, page| {
        page.sample(&[], of.total.in_flight);
    }),
    ("virtioblkd_requests_stalled", Gauge, "Requests in flight for more than 10 s.", |of, page| {
        page.sample(&[], of.total.stalled);
    }),
    ("virtioblkd_oldest_stalled_seconds", Gauge, "Age of the oldest stalled request; 0: none.", |of, page| {
        page.milliseconds(&[], of.total.oldest_stalled_ms);
    }),
    ("virtioblkd_queues_blocked", Gauge, "Virtqueues in which a write waits at the closed gate.", |of, page| {
        page.sample(&[], of.stats.rings.iter().filter(|ring| ring.held).count());
    }),
    ("virtioblkd_queues_limited", Gauge, "Virtqueues in which a request waits because of --throttle.", |of, page| {
        page.sample(&[], of.stats.rings.iter().filter(|ring| ring.limited).count());
    }),
    ("virtioblkd_stopped", Gauge, "The disk is stopped: failed requests are retained until 'continue'.", |of, page| {
        page.sample(&[], u8::from(of.disk.stopped.is_some()));
    }),
    ("virtioblkd_requests_retained", Gauge, "Failed requests that are retained until 'continue'.", |of, page| {
        page.sample(&[], of.total.kept);
    }),
    ("virtioblkd_sync_failed", Gauge, "A sync failed for good: writes are no longer made durable.", |of, page| {
        page.sample(&[], u8::from(of.disk.sync_failed));
    }),
    ("virtioblkd_image_trouble", Gauge, "The image cannot be used as it should (fenced, ...).", |of, page| {
        let trouble = of.disk.image_status.trouble.as_deref();
        page.sample(&[("trouble", trouble.unwrap_or(""))], u8::from(trouble.is_some()));
    }),
    ("virtioblkd_last_error_timestamp_seconds", Gauge, "When the newest error happened.", |of, page| {
        if let Some(newest) = of.disk.last_errors.iter().map(|error| error.when).max() {
            page.sample(&[], newest);
        }
    }),
    ("virtioblkd_unsynced_bytes", Gauge, "Acknowledged bytes that no sync has covered since.", |of, page| {
        page.sample(&[], of.stats.unsynced.unsynced_bytes);
    }),
    ("virtioblkd_last_sync_age_seconds", Gauge, "Time since the begin of the last sync that succeeded.", |of, page| {
        if let Some(age) = of.stats.unsynced.last_sync_ms {
            page.milliseconds(&[], age);
        }
    }),
    ("virtioblkd_request_duration_seconds", Histogram, "From the pop of a request to its completion.", |of, page| {
        histograms(&of.stats.latency.request, page);
    }),
    ("virtioblkd_backend_duration_seconds", Histogram, "The image's share of it; flush has the syncs.", |of, page| {
        histograms(&of.stats.latency.backend, page);
    }),
    ("virtioblkd_held_duration_seconds", Histogram, "How long writes waited at the closed gate.", |of, page| {
        page.histogram(&[], &of.stats.latency.held);
    }),
    (
        "virtioblkd_limited_duration_seconds",
        Histogram,
        "How long the foremost requests waited for --throttle.",
        |of, page| {
            page.histogram(&[], &of.stats.latency.limited);
        },
    ),
    ("virtioblkd_quiesced", Gauge, "The disk is held still (1), or the gate is open or settling (0).", |of, page| {
        page.sample(&[], u8::from(of.status.quiesce.state == "quiesced"));
    }),
    ("virtioblkd_holders", Gauge, "Granted holds.", |of, page| page.sample(&[], of.status.quiesce.holders.len())),
    ("virtioblkd_gate_closed_seconds", Gauge, "For how long writes have been blocked; 0: not.", |of, page| {
        page.milliseconds(&[], of.status.quiesce.closed_ms.unwrap_or(0));
    }),
    ("virtioblkd_copies", Gauge, "Point-in-time copies that 'copies' lists, by state.", |of, page| {
        for state in ["prepared", "running", "syncing", "completed", "failed", "cancelled"] {
            page.sample(&[("state", state)], of.copies().filter(|copy| copy.state == state).count());
        }
    }),
    ("virtioblkd_copy_remaining_bytes", Gauge, "What the running copy has not done yet.", |of, page| {
        let running = of.copies().filter(|copy| ["prepared", "running", "syncing"].contains(&copy.state.as_str()));
        let left = |copy: &CopyStatus| copy.total_bytes.saturating_sub(copy.done_bytes);
        page.sample(&[], running.map(left).fold(0, u64::saturating_add));
    }),
    ("virtioblkd_copies_ending", Gauge, "Copies that are over and wait for storage.", |of, page| {
        page.sample(&[], of.disk.copies_ending);
    }),
    ("virtioblkd_exports", Gauge, "Exports to NBD clients that are running.", |of, page| {
        page.sample(&[], of.running_exports().count());
    }),
    ("virtioblkd_export_clients", Gauge, "NBD clients of these exports.", |of, page| {
        let clients = of.running_exports().filter_map(|copy| copy.export.as_ref()).map(|export| export.clients);
        page.sample(&[], clients.fold(0, u64::saturating_add));
    }),
    ("virtioblkd_buffer_changes", Counter, "Writes whose buffer the guest changed in flight.", |of, page| {
        if let Some(stable) = &of.stats.stable_writes {
            page.sample(&[], stable.changed_writes);
        }
    }),
];

impl Figures<'_> {
    fn copies(&self) -> impl Iterator<Item = &CopyStatus> {
        self.copies.iter().filter(|copy| copy.export.is_none())
    }

    fn running_exports(&self) -> impl Iterator<Item = &CopyStatus> {
        self.copies.iter().filter(|copy| copy.export.is_some() && copy.state == "running")
    }
}

/// A histogram for each kind. A guest that never discards needs none for that.
fn histograms(by_kind: &virtioblkd::disk::LatencyByKind, page: &mut Page) {
    for (kind, histogram) in by_kind.each() {
        if histogram.count() > 0 || ["read", "write", "flush"].contains(&kind) {
            page.histogram(&[("kind", kind)], histogram);
        }
    }
}

/// The page of all metrics of these disks.
pub(super) fn page(disks: &[(Listed, Measured)], format: Format) -> String {
    let mut page = Page::new(format);
    page.metric("virtioblkctl", Info, "The program that collected these metrics.");
    page.sample(&[("version", env!("CARGO_PKG_VERSION"))], 1);
    page.metric("virtioblkd_disks", Gauge, "Disks that were found on this host.");
    page.sample(&[], disks.len());
    page.metric("virtioblkd_up", Gauge, "The disk's daemon answered (1) or not (0).");
    let names = names(disks);
    let named = || names.iter().zip(disks).map(|(name, (listed, measured))| (name, domain(listed), measured));
    for (name, domain, measured) in named() {
        page.disk(&[("disk", name), ("domain", domain)]);
        page.sample(&[], u8::from(measured.stats.is_some()));
    }
    page.metric("virtioblkd_state", Gauge, "1 for the state that 'virtioblkctl list' shows.");
    for (name, domain, measured) in named() {
        page.disk(&[("disk", name), ("domain", domain)]);
        page.sample(&[("state", measured.state.word)], 1);
    }
    for (name, kind, help, samples) in FAMILIES {
        page.metric(name, *kind, help);
        for (disk_name, domain, measured) in named() {
            let (Some(status), Some(stats)) = (&measured.state.status, &measured.stats) else { continue };
            let disk = &status.disk;
            page.disk(&[("disk", disk_name), ("domain", domain), ("mode", &disk.cache_mode)]);
            samples(&Figures { status, disk, stats, total: &stats.total, copies: &measured.copies }, &mut page);
        }
    }
    page.finish()
}

/// The disks' names for the label `disk`. Where two disks have one name, the path of the control socket stands for it, which
/// `--control` takes, too: Prometheus refuses two samples with the same labels.
fn names(disks: &[(Listed, Measured)]) -> Vec<String> {
    let labels = |name: &str, listed: &Listed| (escaped(name), escaped(domain(listed)));
    let mut count: HashMap<_, usize> = HashMap::new();
    for (listed, _) in disks {
        *count.entry(labels(&listed.name, listed)).or_default() += 1;
    }
    let mut taken = HashSet::new();
    let name = |(listed, _): &(Listed, Measured)| {
        let control = listed.control.as_ref().map(|control| control.display().to_string());
        let name = match (count[&labels(&listed.name, listed)], control) {
            (2.., Some(control)) => control,
            _ => listed.name.clone(),
        };
        // A label is cut when it is long.
        let mut numbered = (1..).map(|number| if number == 1 { name.clone() } else { format!("{number}: {name}") });
        numbered.find(|name| taken.insert(labels(name, listed))).unwrap_or(name)
    };
    disks.iter().map(name).collect()
}

fn domain(listed: &Listed) -> &str {
    listed.domain.as_ref().map_or("", |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{from_value, json};
    use std::io::Write;
    use std::path::PathBuf;
    use std::process::{Command, Stdio};
    use virtioblkd::internal::host::listing::State;

    /// A disk whose daemon answered.
    fn disk(name: &str, domain: Option<(&str, &str)>, control: Option<&str>) -> (Listed, Measured) {
        let listed = Listed {
            name: name.into(),
            domain: domain.map(|(name, uuid)| (name.into(), uuid.into())),
            target: None,
            control: control.map(PathBuf::from),
            socket: None,
        };
        let state = State { word: "idle", status: Some(from_value(json!({})).unwrap()) };
        (listed, Measured { state, stats: Some(from_value(json!({})).unwrap()), copies: Vec::new() })
    }

    #[test]
    fn two_disks_of_one_name_have_different_labels() {
        let disks = [
            disk("vda", None, Some("/elsewhere/vda.ctl")),
            disk("vda", None, Some("/run/virtioblkd/vda.ctl")),
            disk("vm1:vda", Some(("vm1", "U1")), Some("/run/virtioblkd/U1-vda.ctl")),
            disk("vm1:vda", Some(("vm1", "U2")), Some("/run/virtioblkd/U2-vda.ctl")),
            disk("vm1:vda", None, Some("/run/virtioblkd/vm1:vda.ctl")),
            disk("vdb", None, None),
            disk("vdb", None, Some("/run/virtioblkd/vdb.ctl")),
            disk("vdc", None, Some("/same.ctl")),
            disk("vdc", None, Some("/same.ctl")),
        ];
        let names = names(&disks);
        let expected = [
            "/elsewhere/vda.ctl",
            "/run/virtioblkd/vda.ctl",
            "/run/virtioblkd/U1-vda.ctl",
            "/run/virtioblkd/U2-vda.ctl",
            "vm1:vda",
            "vdb",
            "/run/virtioblkd/vdb.ctl",
            "/same.ctl",
            "2: /same.ctl",
        ];
        assert_eq!(names, expected);
        for format in [Format::Prometheus, Format::OpenMetrics] {
            let text = page(&disks, format);
            let mut series = HashSet::new();
            for line in text.lines().filter(|line| !line.starts_with('#')) {
                assert!(series.insert(line.rsplit_once(' ').unwrap().0), "{line}");
            }
            assert!(series.len() > 9 * 30, "{text}");
            let checker = Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).spawn();
            if let (Format::Prometheus, Ok(mut checker)) = (format, checker) {
                checker.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
                assert!(checker.wait().unwrap().success(), "{text}");
            }
        }
    }
}
