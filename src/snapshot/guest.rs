//! Freezes and thaws a guest's filesystems through its agent, and determines which filesystems were really frozen.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::agent::{AgentChannel, AgentError, AgentSocket};
use super::libvirt::Domain;
use super::plan::AgentAddress;
use super::wait::{CancelFd, pause};
use crate::base::figures;

/// How long any command except freeze and thaw may take.
const AGENT_TIMEOUT: Duration = Duration::from_secs(5);
/// The time between two attempts to thaw a guest that does not answer.
const THAW_RETRY_INTERVAL: Duration = Duration::from_millis(200);
/// The filesystems that Linux mounts from a disk and cannot freeze (they have no `freeze_fs`), so that the agent skips
/// them.
const NEVER_FREEZE: [&str; 12] =
    ["vfat", "msdos", "fat", "exfat", "iso9660", "udf", "squashfs", "erofs", "cramfs", "ntfs", "ntfs3", "fuseblk"];
/// Windows' filesystems of CDs and DVDs, which the agent never freezes. It freezes all volumes of fixed drives, and no
/// others (qga/vss-win32/requester.cpp, `requester_freeze`).
const WINDOWS_NEVER_FREEZES: [&str; 2] = ["cdfs", "udf"];
/// Windows' filesystems that may be on a fixed drive (an EFI partition) or on a removable one. The agent does not
/// report which.
const WINDOWS_MAY_FREEZE: [&str; 3] = ["fat", "fat32", "exfat"];
/// The start of a volume's name that Windows' agent reports (qga/commands-win32.c, `build_guest_fsinfo`).
const WINDOWS_VOLUME: &str = r"\\?\Volume{";
/// How long VSS holds writes after a freeze. The agent still reports `frozen` after that, until it gets a thaw; only
/// that thaw fails (`requester_thaw`, VSS_E_HOLD_WRITES_TIMEOUT).
pub const VSS_HOLD_TIMEOUT: Duration = Duration::from_secs(10);
/// The default path of qemu-ga's hook.
const DEFAULT_HOOK: &str = "/etc/qemu/fsfreeze-hook";
/// The default path of qemu-ga's settings.
const DEFAULT_CONFIG: &str = "/etc/qemu/qemu-ga.conf";

/// What the guest's agent reports before a freeze.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct GuestReport {
    /// The number of filesystems that a freeze should freeze. `None`: the agent does not list them.
    pub freezable: Option<u64>,
    /// The mounted filesystems that cannot be frozen, with their types.
    pub never: Vec<String>,
    /// The mounted filesystems that perhaps cannot be frozen, with their types.
    pub unsure: Vec<String>,
    /// The guest is Windows, whose freeze ends by itself after [`VSS_HOLD_TIMEOUT`].
    pub windows: bool,
    /// The hook that the agent runs, if its settings name one.
    pub hook: Option<String>,
    /// Why it is not known whether the agent runs a hook.
    pub hook_unknown: Option<String>,
}

/// The result of a thaw.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ThawResult {
    /// The guest was frozen until the thaw.
    pub was_frozen: bool,
    /// The number of filesystems that were thawed, as the agent counts them.
    pub count: u64,
    /// The filesystems are thawed, but the agent reported this error: its hook failed, or the freeze was lost
    /// ([`ThawResult::lost`]).
    pub agent_error: Option<String>,
}

impl ThawResult {
    /// Returns why the guest was not frozen all the time. `None`: nothing shows that it was not. `frozen`: the number
    /// of filesystems that the agent froze; `since`: how long ago. The agent's status alone proves nothing, because it
    /// is only a flag of the agent.
    pub fn lost(&self, frozen: u64, since: Duration, windows: bool) -> Option<String> {
        let limit = VSS_HOLD_TIMEOUT.as_secs();
        match &self.agent_error {
            _ if !self.was_frozen => Some("the filesystems were thawed by another program".into()),
            Some(why) if windows || why.contains("hold writes") => {
                Some(format!("Windows (VSS) gave up the freeze, for it holds writes for {limit} s at most: {why}"))
            }
            _ if windows && since > VSS_HOLD_TIMEOUT => {
                let seconds = since.as_secs_f64();
                Some(format!("{seconds:.1} s passed, and Windows (VSS) holds writes for {limit} s at most"))
            }
            None if self.count < frozen => {
                Some(format!("of {frozen} filesystems that were frozen, {} still were: others thawed them", self.count))
            }
            _ => None,
        }
    }
}

/// A guest, reached through its agent.
pub struct Guest {
    channel: Box<dyn AgentChannel>,
    /// How long any command except freeze and thaw may take.
    timeout: Duration,
}

impl Guest {
    /// Creates a guest, to which the first command connects. `timeout`: how long any command except freeze and thaw may
    /// take.
    pub fn new(at: &AgentAddress, timeout: Duration) -> Self {
        let channel: Box<dyn AgentChannel> = match at {
            AgentAddress::Socket(path) => Box::new(AgentSocket::new(path)),
            AgentAddress::Domain(name) => Box::new(Domain::new(name)),
        };
        Guest { channel, timeout: timeout.min(AGENT_TIMEOUT) }
    }

    /// Determines whether the guest can be frozen, and what to expect of a freeze. Changes nothing. `hooks`: also
    /// determine whether the agent runs a hook. All commands that the agent accepts only while it is not frozen are
    /// sent here.
    pub fn check(&mut self, hooks: bool, cancel: CancelFd<'_>) -> Result<GuestReport, AgentError> {
        let status = self.execute("guest-fsfreeze-status", Value::Null, self.timeout, cancel)?;
        if status != "thawed" {
            return Err(AgentError::Refused(format!(
                "the guest's filesystems are {} already, by another program, which may thaw them at any time: wait for its \
                 end, thaw them (guest-fsfreeze-thaw, virsh domfsthaw), or ask for level crash",
                status.as_str().unwrap_or("frozen")
            )));
        }
        let info = self.execute("guest-info", Value::Null, self.timeout, cancel)?;
        let known = info["supported_commands"].as_array().map(Vec::as_slice).unwrap_or_default();
        let freeze = known.iter().find(|command| command["name"] == "guest-fsfreeze-freeze");
        if freeze.is_none_or(|command| command["enabled"] == false) {
            return Err(AgentError::Refused(
                "the guest's agent does not offer guest-fsfreeze-freeze: take it off the agent's block list \
                 (qemu-ga --block-rpcs), or ask for level crash"
                    .into(),
            ));
        }
        let mut checked = GuestReport::default();
        match self.execute("guest-get-osinfo", Value::Null, self.timeout, cancel) {
            Ok(system) => checked.windows = system["id"] == "mswindows",
            // The agent is too old, or the command is blocked. The names of the volumes show Windows, too.
            Err(AgentError::Refused(_)) => {}
            Err(error) => return Err(error),
        }
        match self.execute("guest-get-fsinfo", Value::Null, self.timeout, cancel) {
            Ok(filesystems) => count(&filesystems, &mut checked),
            Err(AgentError::Refused(_)) => {}
            Err(error) => return Err(error),
        }
        if hooks {
            match self.hook(cancel) {
                Ok(hook) => checked.hook = hook,
                Err(AgentError::Refused(why)) => checked.hook_unknown = Some(why),
                Err(error) => return Err(error),
            }
        }
        Ok(checked)
    }

    /// Checks that the agent replies. `Refused`: it replies with an error.
    pub fn ping(&mut self, cancel: CancelFd<'_>) -> Result<(), AgentError> {
        self.execute("guest-ping", Value::Null, self.timeout, cancel).map(|_| ())
    }

    /// Freezes the guest. Returns the number of filesystems that were frozen. After `Refused` nothing is frozen by us;
    /// after any other error that is not known, and [`Guest::thaw`] must follow.
    pub fn freeze(&mut self, timeout: Duration, cancel: CancelFd<'_>) -> Result<u64, AgentError> {
        match self.execute("guest-fsfreeze-freeze", Value::Null, timeout, cancel) {
            Ok(count) => Ok(count.as_u64().unwrap_or(0)),
            // The agent did nothing: it is in frozen state because another program froze the guest after our check
            // (qga/main.c, `ga_disable_not_allowed_freeze`), or the command was blocked. We must not thaw that freeze.
            Err(AgentError::Refused(why)) if why.contains("has been disabled") => Err(AgentError::Refused(format!(
                "{why}; if the guest was frozen by another program meanwhile it is left as it is: wait for its end, thaw it \
                 (guest-fsfreeze-thaw, virsh domfsthaw), or ask for level crash"
            ))),
            Err(AgentError::Refused(why)) => {
                // The agent undoes what it began, but a hook that failed half way may have left something frozen.
                match self.thaw(Instant::now() + timeout, None) {
                    Ok(ThawResult { agent_error: Some(thaw), .. }) if thaw != why => {
                        Err(AgentError::Refused(format!("{why}; and the thaw after it: {thaw}")))
                    }
                    Ok(_) => Err(AgentError::Refused(why)),
                    Err(error) => Err(AgentError::Silent(format!("{why}; and the thaw after it: {error}"))),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the guest's filesystems are frozen now, according to the agent.
    pub fn is_frozen(&mut self, cancel: CancelFd<'_>) -> Result<bool, AgentError> {
        Ok(self.execute("guest-fsfreeze-status", Value::Null, self.timeout, cancel)? == "frozen")
    }

    /// Thaws the guest, also after a freeze that the agent carries out late: retries until the agent has replied, until
    /// `deadline` at most. The agent carries out commands in order, so after its reply no freeze of ours can follow.
    pub fn thaw(&mut self, deadline: Instant, cancel: CancelFd<'_>) -> Result<ThawResult, AgentError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let error = match self.thaw_once(left.max(Duration::from_millis(1)), cancel) {
                Ok(thawed) => return Ok(thawed),
                Err(error) => error,
            };
            let again = matches!(pause(THAW_RETRY_INTERVAL.min(left), cancel), Ok(true));
            if !again || Instant::now() >= deadline {
                return Err(error);
            }
        }
    }

    fn thaw_once(&mut self, timeout: Duration, cancel: CancelFd<'_>) -> Result<ThawResult, AgentError> {
        let status = self.execute("guest-fsfreeze-status", Value::Null, timeout, cancel)?;
        // Thaw even if the agent reports that nothing is frozen: that is harmless, and an agent that was restarted may
        // not know of the freeze.
        let (count, agent_error) = match self.execute("guest-fsfreeze-thaw", Value::Null, timeout, cancel) {
            Ok(count) => (count.as_u64().unwrap_or(0), None),
            // The agent calls its hook after it has thawed the filesystems, so the status afterwards decides.
            Err(AgentError::Refused(why)) => (0, Some(why)),
            Err(error) => return Err(error),
        };
        let after = self.execute("guest-fsfreeze-status", Value::Null, timeout, cancel)?;
        if after != "thawed" {
            let why = agent_error.map(|why| format!(": {why}")).unwrap_or_default();
            return Err(AgentError::Silent(format!("the guest's filesystems are still frozen after a thaw{why}")));
        }
        Ok(ThawResult { was_frozen: status == "frozen", count, agent_error })
    }

    /// Returns the hook that the agent runs, if any. The agent reads its own command line and its settings file for us.
    fn hook(&mut self, cancel: CancelFd<'_>) -> Result<Option<String>, AgentError> {
        let line = self.read("/proc/self/cmdline", cancel)?;
        let words: Vec<String> = line.split(|byte| *byte == 0).map(|w| String::from_utf8_lossy(w).into()).collect();
        if let Some(hook) = hook_in_words(&words) {
            return Ok(Some(hook));
        }
        match self.read(&config_in_words(&words), cancel) {
            Ok(text) => Ok(hook_in_config(&String::from_utf8_lossy(&text))),
            // There is no settings file, so the command line decides.
            Err(AgentError::Refused(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads a small file of the guest.
    fn read(&mut self, path: &str, cancel: CancelFd<'_>) -> Result<Vec<u8>, AgentError> {
        let handle = self.execute("guest-file-open", json!({"path": path, "mode": "r"}), self.timeout, cancel)?;
        let read = self.execute("guest-file-read", json!({"handle": handle, "count": 65536}), self.timeout, cancel);
        self.execute("guest-file-close", json!({"handle": handle}), self.timeout, cancel)?;
        let read = read?;
        BASE64
            .decode(read["buf-b64"].as_str().unwrap_or(""))
            .map_err(|_| AgentError::Refused(format!("the guest's agent sent '{path}' in something other than base64")))
    }

    fn execute(
        &mut self,
        name: &str,
        arguments: Value,
        timeout: Duration,
        cancel: CancelFd<'_>,
    ) -> Result<Value, AgentError> {
        self.channel.execute(name, arguments, timeout, cancel)
    }
}

/// Counts the filesystems in the reply to `guest-get-fsinfo`, each device once.
fn count(filesystems: &Value, checked: &mut GuestReport) {
    let mut devices = BTreeMap::new();
    for filesystem in filesystems.as_array().map(Vec::as_slice).unwrap_or_default() {
        let (Some(name), Some(kind)) = (filesystem["name"].as_str(), filesystem["type"].as_str()) else { continue };
        devices.insert(name, kind);
    }
    checked.windows |= devices.keys().any(|name| name.starts_with(WINDOWS_VOLUME));
    let (never, unsure): (&[&str], &[&str]) =
        if checked.windows { (&WINDOWS_NEVER_FREEZES, &WINDOWS_MAY_FREEZE) } else { (&NEVER_FREEZE, &[]) };
    let mut freezable = 0;
    for (name, kind) in devices {
        let lower = kind.to_ascii_lowercase();
        let shown = format!("{name} ({kind})");
        match lower.as_str() {
            kind if never.contains(&kind) => checked.never.push(shown),
            kind if unsure.contains(&kind) => checked.unsure.push(shown),
            _ => freezable += 1,
        }
    }
    checked.freezable = Some(freezable);
}

impl GuestReport {
    /// Returns what a freeze of `frozen` filesystems verifies (`None`: the guest does not list its filesystems), and
    /// the filesystems that may not be frozen.
    pub fn verified(&self, frozen: u64) -> (Option<String>, Vec<&str>) {
        let mut open: Vec<&str> = self.never.iter().map(String::as_str).collect();
        let Some(freezable) = self.freezable else { return (None, open) };
        let all = freezable + self.unsure.len() as u64;
        if frozen < all {
            open.extend(self.unsure.iter().map(String::as_str));
        }
        // An agent may freeze more than it lists: Windows' agent does not list a volume that it cannot read.
        let of = if frozen == freezable { freezable } else { all.max(frozen) };
        (Some(format!("{} frozen of {of} that can be", figures::count(frozen, "filesystem"))), open)
    }
}

/// Returns the hook that qemu-ga's arguments name: `-F`, `-FPATH`, `--fsfreeze-hook` or `--fsfreeze-hook=PATH`.
fn hook_in_words(words: &[String]) -> Option<String> {
    words.iter().find_map(|word| {
        let path = word.strip_prefix("--fsfreeze-hook").or(word.strip_prefix("-F"))?;
        let path = path.strip_prefix('=').unwrap_or(path);
        Some(if path.is_empty() { DEFAULT_HOOK.to_owned() } else { path.to_owned() })
    })
}

/// Returns the settings file that qemu-ga's arguments name (`-c PATH`, `--config PATH`), or the default one.
fn config_in_words(words: &[String]) -> String {
    let after = words.iter().position(|word| word == "-c" || word == "--config").and_then(|at| words.get(at + 1));
    let joined = words.iter().find_map(|word| word.strip_prefix("--config="));
    after.map(String::as_str).or(joined).unwrap_or(DEFAULT_CONFIG).to_owned()
}

/// Returns the hook that the agent's settings, an INI file, name: `fsfreeze-hook=PATH`.
fn hook_in_config(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        let value = value.trim();
        (key.trim() == "fsfreeze-hook" && Path::new(value).is_absolute()).then(|| value.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_hook_is_found_in_its_command_line_and_settings() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let found = |text: &str| hook_in_words(&words(text));
        assert_eq!(found("qemu-ga -F"), Some(DEFAULT_HOOK.into()));
        assert_eq!(found("qemu-ga -F/a/hook -d"), Some("/a/hook".into()));
        assert_eq!(found("qemu-ga --fsfreeze-hook=/a/hook"), Some("/a/hook".into()));
        assert_eq!(found("qemu-ga -m virtio-serial"), None);
        assert_eq!(config_in_words(&words("qemu-ga -c /c")), "/c");
        assert_eq!(config_in_words(&words("qemu-ga")), DEFAULT_CONFIG);
        assert_eq!(hook_in_config("[general]\nfsfreeze-hook = /a/hook\n"), Some("/a/hook".into()));
        assert_eq!(hook_in_config("#fsfreeze-hook=\nfsfreeze-hook=\n"), None);
    }

    #[test]
    fn filesystems_are_counted_once_a_device() {
        let mut checked = GuestReport::default();
        let list = json!([
            {"name": "vda1", "mountpoint": "/", "type": "ext4"}, {"name": "vda1", "mountpoint": "/srv", "type": "ext4"},
            {"name": "vda15", "mountpoint": "/boot/efi", "type": "vfat"}, {"name": "vdb", "mountpoint": "/d", "type": "xfs"},
        ]);
        count(&list, &mut checked);
        assert_eq!((checked.freezable, checked.never), (Some(2), vec!["vda15 (vfat)".to_owned()]));
    }

    #[test]
    fn windows_volumes_are_counted_by_their_own_names() {
        let volume = |id: &str, kind: &str| json!({"name": format!("{WINDOWS_VOLUME}{id}}}\\"), "mountpoint": "C:\\", "type": kind});
        let mut checked = GuestReport::default();
        count(
            &json!([volume("a", "NTFS"), volume("b", "FAT32"), volume("c", "CDFS"), volume("d", "UDF")]),
            &mut checked,
        );
        assert!(checked.windows);
        assert_eq!((checked.freezable, checked.never.len(), checked.unsure.len()), (Some(1), 2, 1));
        let said = |frozen| {
            let (verified, open) = checked.verified(frozen);
            (verified.unwrap(), open.len())
        };
        // The EFI partition is frozen or not; and the agent freezes a volume that it does not list.
        assert_eq!(said(1), ("1 filesystem frozen of 1 that can be".into(), 3));
        assert_eq!(said(2), ("2 filesystems frozen of 2 that can be".into(), 2));
        assert_eq!(said(3), ("3 filesystems frozen of 3 that can be".into(), 2));
    }

    #[test]
    fn a_lost_freeze_is_detected_although_the_agent_reports_frozen() {
        let thawed = |was_frozen, count, agent_error: Option<&str>| ThawResult {
            was_frozen,
            count,
            agent_error: agent_error.map(str::to_owned),
        };
        let (soon, late) = (Duration::from_secs(2), VSS_HOLD_TIMEOUT + Duration::from_millis(1));
        let vss = Some("couldn't hold writes: fsfreeze is limited up to 10 seconds: ");
        let hook = Some("thaw hook exited with 4");
        for (thawed, since, windows) in [
            (thawed(true, 2, None), late, false),
            (thawed(true, 3, None), soon, true),
            (thawed(true, 0, hook), late, false),
        ] {
            assert_eq!(thawed.lost(2, since, windows), None, "{thawed:?}");
        }
        for (thawed, since, windows, word) in [
            (thawed(false, 2, None), soon, false, "another program"),
            (thawed(true, 1, None), soon, false, "of 2 filesystems"),
            (thawed(true, 0, None), soon, true, "of 2 filesystems"),
            (thawed(true, 0, vss), soon, false, "10 s at most"),
            (thawed(true, 0, Some("failed to do snapshot set")), soon, true, "failed to do snapshot set"),
            (thawed(true, 2, None), late, true, "10.0 s passed"),
        ] {
            assert!(thawed.lost(2, since, windows).is_some_and(|why| why.contains(word)), "{thawed:?}");
        }
    }
}
