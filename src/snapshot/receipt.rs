//! The receipt of a snapshot: what it really reached, for programs and for people.

use std::fmt::Write;

use serde::Serialize;
use serde_json::Value;

use crate::base::figures::count;
use crate::base::text::clean;

/// The receipt of a snapshot.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Receipt {
    /// The level that was reached: `crash`, `filesystem` or `application`.
    pub level: &'static str,
    /// The level that was requested.
    pub requested_level: &'static str,
    /// When all disks were still, in seconds since the epoch.
    pub instant: f64,
    /// The longest time for which writes were held on a disk, in microseconds.
    pub held_us: u64,
    /// The disks, in the order of the command line.
    pub disks: Vec<DiskReceipt>,
    /// The number of frozen filesystems, as the agent counted them; 0 at level crash.
    pub filesystems_frozen: u64,
    /// The time from the request for the freeze until the thaw was confirmed, in microseconds.
    pub frozen_us: u64,
    /// The hooks that were called and succeeded.
    pub hooks: Vec<String>,
    /// What was checked.
    pub verified: Vec<String>,
    /// What the level relies on and cannot be checked from here.
    pub trusted: Vec<String>,
    /// What the operator must know.
    pub warnings: Vec<String>,
    /// Copies continue in the background; the snapshot is complete when they are.
    pub detached: bool,
}

/// One disk of a receipt.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskReceipt {
    /// The disk's control socket.
    pub control: String,
    /// The bytes of `control` in base64, if they are not UTF-8; `control` is then altered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control_b64: Option<String>,
    /// The file or device, or the daemon's description of it.
    pub image: String,
    /// The bytes of `image` in base64, if they are not UTF-8; `image` is then altered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_b64: Option<String>,
    /// The time from the request to close the gate until it was open again, in microseconds. Writes were held at most
    /// this long.
    pub held_us: u64,
    /// The number of requests that were in flight when the gate closed.
    pub drained: u64,
    /// How long these requests took to finish, in microseconds.
    pub drain_us: u64,
    /// How long the sync after that took, in microseconds.
    pub sync_us: u64,
    /// The most bytes that the sync wrote back.
    pub bytes_synced: u64,
    /// The method: `reflink`, `copy`, `nbd`, `rbd` or `exec`.
    pub way: &'static str,
    /// The path of the snapshot; for `nbd` the socket; for `rbd` its name, POOL/IMAGE@NAME; for `exec` the command.
    pub target: String,
    /// The bytes of `target` in base64, if they are not UTF-8; `target` is then altered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_b64: Option<String>,
    /// The SHA-256 of the snapshot in hexadecimal, if it was requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The daemon's `CopyStatus`, for `copy` and `nbd`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copy: Option<Value>,
}

impl Receipt {
    /// Formats one line for people, about a freeze by `attend`.
    pub fn line(&self) -> String {
        let when = crate::base::logging::utc(std::time::Duration::try_from_secs_f64(self.instant).unwrap_or_default());
        let frozen = format!("{} frozen for {}", count(self.filesystems_frozen, "filesystem"), time(self.frozen_us));
        let mut line = format!("{when} level {} of {}: {frozen}", self.level, self.requested_level);
        for warning in &self.warnings {
            line += &format!("; WARNING: {warning}");
        }
        clean(&line)
    }

    /// Formats the receipt as a page for people.
    pub fn page(&self) -> String {
        let mut page = String::new();
        let mut line = |name: &str, text: String| {
            // Writing to a String cannot fail.
            let _ = writeln!(page, "{name:<11}{}", clean(&text));
        };
        let asked = if self.level == self.requested_level {
            String::new()
        } else {
            format!(", ASKED FOR {}", self.requested_level)
        };
        line("snapshot", format!("{} consistent{asked}", self.level));
        line(
            "instant",
            crate::base::logging::utc(std::time::Duration::try_from_secs_f64(self.instant).unwrap_or_default()),
        );
        line("held", format!("writes waited at most {}", time(self.held_us)));
        if self.filesystems_frozen > 0 {
            line("frozen", format!("{} for {}", count(self.filesystems_frozen, "filesystem"), time(self.frozen_us)));
        }
        for disk in &self.disks {
            line("disk", format!("{} ({})", disk.image, disk.control));
            let (held, drain, sync) = (time(disk.held_us), time(disk.drain_us), time(disk.sync_us));
            line("", format!("held {held}: {} drained in {drain}, synced in {sync}", count(disk.drained, "request")));
            let name = disk.copy.as_ref().and_then(|copy| copy["copy"].as_str()).unwrap_or("the copy");
            let going_on = match (self.detached, disk.way) {
                (true, "nbd") => format!(" ({name}, served in the background)"),
                (true, "copy") => format!(" ({name}, being copied in the background)"),
                _ => String::new(),
            };
            line("", format!("{}: {}{going_on}", disk.way, disk.target));
            if let Some(digest) = &disk.sha256 {
                line("", format!("sha256 {digest}"));
            }
        }
        let lists = [
            ("hook", &self.hooks),
            ("verified", &self.verified),
            ("on trust", &self.trusted),
            ("WARNING", &self.warnings),
        ];
        for (name, list) in lists {
            list.iter().for_each(|text| line(name, text.clone()));
        }
        page
    }
}

/// Formats a time: `812 us`, `3.4 ms`, `1.2 s`.
fn time(microseconds: u64) -> String {
    match microseconds {
        0..=999 => format!("{microseconds} us"),
        1_000..=999_999 => format!("{:.1} ms", microseconds as f64 / 1e3),
        _ => format!("{:.1} s", microseconds as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receipt_warns_of_a_weaker_level_and_is_escaped() {
        let disk = DiskReceipt {
            image: "/i/\u{1b}[2J\u{9b}a\u{202e}".into(),
            way: "reflink",
            target: "/s/a".into(),
            ..Default::default()
        };
        let receipt =
            Receipt { level: "crash", requested_level: "filesystem", disks: vec![disk], ..Default::default() };
        let page = receipt.page();
        assert!(page.contains("crash consistent, ASKED FOR filesystem"), "{page}");
        assert!(!page.contains(['\u{1b}', '\u{9b}', '\u{202e}']) && page.contains("reflink: /s/a"), "{page}");
        let (way, copy) = ("copy", Some(serde_json::json!({"copy": "copy-7"})));
        let background = DiskReceipt { way, target: "/s/a".into(), copy, ..Default::default() };
        let page = Receipt { detached: true, disks: vec![background], ..Default::default() }.page();
        assert!(page.contains("copy: /s/a (copy-7, being copied in the background)"), "{page}");
        let json = serde_json::to_value(&receipt).unwrap();
        assert_eq!(json["requested-level"], "filesystem");
        assert_eq!(json["disks"][0].get("sha256"), None);
    }

    #[test]
    fn the_json_of_a_receipt_is_what_was_recorded() {
        let disk = DiskReceipt {
            control: "/run/vda.ctl".into(),
            control_b64: Some("AA==".into()),
            image: "/i/a".into(),
            image_b64: Some("AQ==".into()),
            held_us: 1,
            drained: 2,
            drain_us: 3,
            sync_us: 4,
            bytes_synced: 5,
            way: "copy",
            target: "/s/a".into(),
            target_b64: Some("Ag==".into()),
            sha256: Some("00ff".into()),
            copy: Some(Value::Null),
        };
        let receipt = Receipt {
            level: "filesystem",
            requested_level: "application",
            instant: 1.5,
            held_us: 6,
            disks: vec![disk],
            filesystems_frozen: 7,
            frozen_us: 8,
            hooks: vec!["a".into()],
            verified: vec!["b".into()],
            trusted: vec!["c".into()],
            warnings: vec!["d".into()],
            detached: true,
        };
        let recorded = concat!(
            r#"{"level":"filesystem","requested-level":"application","instant":1.5,"held-us":6,"disks":[{"control":"#,
            r#""/run/vda.ctl","control-b64":"AA==","image":"/i/a","image-b64":"AQ==","held-us":1,"drained":2,"#,
            r#""drain-us":3,"sync-us":4,"bytes-synced":5,"way":"copy","target":"/s/a","target-b64":"Ag==","#,
            r#""sha256":"00ff","copy":null}],"filesystems-frozen":7,"frozen-us":8,"#,
            r#""hooks":["a"],"verified":["b"],"trusted":["c"],"warnings":["d"],"detached":true}"#,
        );
        assert_eq!(serde_json::to_string(&receipt).unwrap(), recorded);
    }
}
