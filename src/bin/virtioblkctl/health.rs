//! `status --check`: one line and an exit status for monitoring, as monitoring plugins (Nagios) print them.

use std::path::Path;

use serde_json::{Map, Value, json};
use virtioblkd::disk::CopyStatus;
use virtioblkd::internal::base::text::clean;
use virtioblkd::internal::control::client::{Client, Failure, REPLY_TIMEOUT};
use virtioblkd::internal::control::protocol::return_types::Status;

use crate::chosen::Disks;
use crate::show::units::{count, time};
use crate::{json_page, parse, print};

/// How well a disk is; the number is the exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Health {
    Ok = 0,
    Warning = 1,
    Critical = 2,
}

impl Health {
    fn word(self) -> &'static str {
        match self {
            Health::Ok => "OK",
            Health::Warning => "WARNING",
            Health::Critical => "CRITICAL",
        }
    }
}

/// Prints how well each disk is. Returns the exit status: that of the worst.
pub(crate) fn run(disks: &Disks, json: bool) -> Result<u8, Failure> {
    let (mut worst, mut by_disk, mut lines) = (Health::Ok, Map::new(), String::new());
    for (name, control) in &disks.disks {
        let (health, reasons) = match ask(control) {
            Ok((status, copies)) => judge(&status, &copies),
            Err(failure) => (Health::Critical, vec![failure.message]),
        };
        worst = worst.max(health);
        by_disk.insert(name.clone(), json!({"state": health.word().to_lowercase(), "reasons": reasons}));
        let reasons = if reasons.is_empty() { "nothing is wrong".to_owned() } else { reasons.join("; ") };
        lines += &format!("{}: {}: {}\n", health.word(), clean(name), clean(&reasons));
    }
    if json {
        print(&json_page(&Value::Object(by_disk)))?
    } else {
        print(&lines)?
    }
    Ok(worst as u8)
}

fn ask(control: &Path) -> Result<(Status, Vec<CopyStatus>), Failure> {
    let mut client = Client::connect(control)?;
    let status = client.query_status(REPLY_TIMEOUT)?;
    Ok((status, parse(client.execute("query-copies", json!({}), REPLY_TIMEOUT)?)?))
}

/// PURE. How well a disk is, and what is wrong.
fn judge(Status { disk, .. }: &Status, copies: &[CopyStatus]) -> (Health, Vec<String>) {
    let mut critical = Vec::new();
    if let Some(stopped) = &disk.stopped {
        critical.push(format!("STOPPED: a {} failed: {}", stopped.operation, stopped.message));
    }
    if disk.sync_failed {
        critical.push("a sync failed for good: writes are no longer made durable".to_owned());
    }
    if let Some(trouble) = &disk.image_status.trouble {
        let detail = disk.image_status.trouble_detail.as_deref().unwrap_or_default();
        critical.push(format!("{trouble}: {detail}"));
    }
    let mut warnings = Vec::new();
    if disk.total.stalled > 0 {
        let oldest = time(disk.total.oldest_stalled_ms);
        warnings.push(format!("{} STALLED, the oldest for {oldest}", count(disk.total.stalled, "request")));
    }
    // A later copy that is complete has made up for a failed one.
    let ended = copies.iter().rev().filter(|copy| copy.export.is_none());
    if let Some(failed) = ended.take_while(|copy| copy.state != "completed").find(|copy| copy.state == "failed") {
        let why = failed.error.as_deref().unwrap_or_default();
        warnings.push(format!("{} to {} failed: {why}", failed.copy, failed.target));
    }
    if disk.copies_ending > 0 {
        warnings.push("a copy is over and waits for storage that does not reply".to_owned());
    }
    let health = match (critical.is_empty(), warnings.is_empty()) {
        (false, _) => Health::Critical,
        (true, false) => Health::Warning,
        (true, true) => Health::Ok,
    };
    critical.append(&mut warnings);
    (health, critical)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(status: Value, copies: Value) -> (Health, String) {
        let (health, reasons) = judge(
            &serde_json::from_value(status).unwrap(),
            &serde_json::from_value::<Vec<CopyStatus>>(copies).unwrap(),
        );
        (health, reasons.join("; "))
    }

    #[test]
    fn a_disk_is_well_or_what_is_wrong_is_named() {
        assert_eq!(judged(json!({}), json!([])), (Health::Ok, String::new()));
        let stalled = json!({"total": {"stalled": 2, "oldest-stalled-ms": 12_000}});
        assert_eq!(judged(stalled, json!([])), (Health::Warning, "2 requests STALLED, the oldest for 12.0 s".into()));
        let failed = json!({"copy": "copy-1", "target": "/b", "state": "failed", "error": "full"});
        let completed = json!({"copy": "copy-2", "target": "/c", "state": "completed"});
        let one = judged(json!({}), json!([completed, failed]));
        assert_eq!(one, (Health::Warning, "copy-1 to /b failed: full".into()));
        assert_eq!(judged(json!({}), json!([failed, completed])).0, Health::Ok);
        for status in [
            json!({"stopped": {"operation": "write", "message": "full"}, "total": {"stalled": 1}}),
            json!({"sync-failed": true}),
            json!({"trouble": "fenced", "trouble-detail": "by another client"}),
        ] {
            let (health, reasons) = judged(status, json!([]));
            assert!(health == Health::Critical && !reasons.is_empty(), "{reasons}");
        }
    }
}
