//! Daemons as units of systemd, on a host where systemd runs: it starts a daemon again that died under its guest, and it
//! keeps their logs and limits. Asks systemd through its own commands, each bounded in time.
//!
//! A unit is transient (systemd-run(1)): it needs no installed file, has the hook's own program, and a crash of the host
//! leaves none. A drop-in in `/etc/systemd/system/virtioblkd-hook-.service.d` changes all of them (systemd.unit(5)).

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::logs;
use super::places::DiskPlaces;
use crate::snapshot::child::{CommandEnd, output};

/// How long systemd may take to answer a question.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an upgrade may take, which begins with opening the image a second time.
const RELOAD_TIMEOUT: Duration = Duration::from_secs(120);
/// How long systemd may take to unload a unit that has ended.
const UNLOAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the unit's state is asked for while it ends.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// What qemu-configs/systemd/virtioblkd@.service has, but for its user and directories: the daemon starts as root and becomes
/// the user of its disk, and images, copies and Ceph's files may be anywhere.
const PROPERTIES: [&str; 13] = [
    // The domain's shutdown ends the daemons. Where the host shuts down first, its guests are saved before them.
    "Before=libvirtd.service virtqemud.service libvirt-guests.service",
    "Restart=on-failure",
    // As long as the guest runs: it waits for its disk, whatever keeps the daemon from starting.
    "RestartSec=1",
    "StartLimitIntervalSec=0",
    "TimeoutStartSec=infinity",
    // A stop drains and syncs, for which a slow device needs time.
    "TimeoutStopSec=120",
    "LimitNOFILE=65536",
    "LimitMEMLOCK=infinity",
    "NoNewPrivileges=yes",
    "ProtectControlGroups=yes",
    "RestrictRealtime=yes",
    "LockPersonality=yes",
    "SystemCallArchitectures=native",
];

/// Whether systemd runs this host (sd_booted(3)).
pub(super) fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// The unit of a disk's daemon.
pub(super) fn name(disk: &DiskPlaces) -> String {
    format!("virtioblkd-hook-{}.service", disk.name)
}

/// Whether the hook started the disk's daemon as a unit. No unit runs where systemd does not.
pub(super) fn is_unit(disk: &DiskPlaces) -> bool {
    disk.unit.exists() && has_systemd()
}

/// The command that starts the disk's daemon, and ends when it is ready or has failed. `program`: virtioblkd.
pub(super) fn start_command(disk: &DiskPlaces, program: &Path, domain: &str) -> Command {
    let (control, configuration) = (disk.control.display(), disk.configuration.display());
    let (daemon, tool) = (program.display(), program.with_file_name("virtioblkctl"));
    let mut command = Command::new("systemd-run");
    command.args(["--quiet", "--service-type=notify"]).arg(format!("--unit={}", name(disk)));
    // Specifiers are not for a domain's name.
    let domain = domain.replace('%', "%%");
    command.arg(format!("--description=virtioblkd: disk {} of {domain}", disk.target()));
    command.args(PROPERTIES.map(|property| format!("--property={property}")));
    let reload =
        [tool.display().to_string(), "--control".into(), control.to_string(), "upgrade".into(), "--binary".into()];
    let reload = [&reload[..], &[daemon.to_string(), "--config".into(), configuration.to_string()]].concat();
    command
        .arg(format!("--property=ExecReload={}", reload.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")));
    command.arg(program).arg("--config").arg(&disk.configuration);
    command
}

/// A word of a command in a unit (systemd.syntax(7)).
fn quoted(word: &str) -> String {
    format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Runs systemctl with these arguments, and returns what it printed.
fn systemctl(arguments: &[&str], timeout: Duration) -> Result<String, String> {
    run("systemctl", arguments, timeout)
}

fn run(program: &str, arguments: &[&str], timeout: Duration) -> Result<String, String> {
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C").env("SYSTEMD_COLORS", "0");
    let what = arguments.iter().find(|word| !word.starts_with('-')).unwrap_or(&program);
    match output(command, Instant::now() + timeout, None) {
        Ok((CommandEnd::Status(status), out, _)) if status.success() => Ok(out),
        Ok((CommandEnd::Status(status), _, error)) => {
            let said = error.lines().find(|line| !line.trim().is_empty());
            Err(said.map_or_else(|| format!("{program} {what} failed ({status})"), str::to_owned))
        }
        Ok(_) => Err(format!("{program} {what} did not end within {} s: does systemd answer?", timeout.as_secs())),
        Err(error) => Err(format!("{program} cannot be run: {error}")),
    }
}

/// One of the unit's properties; that of a unit which is not loaded is `inactive`, `0` and the like.
fn property(disk: &DiskPlaces, property: &str) -> Result<String, String> {
    let property = format!("--property={property}");
    systemctl(&["show", &property, "--value", &name(disk)], QUERY_TIMEOUT).map(|text| text.trim().to_owned())
}

/// Whether systemd has the daemon's end or start in hand.
pub(super) fn is_changing(disk: &DiskPlaces) -> bool {
    is_unit(disk)
        && property(disk, "ActiveState").is_ok_and(|state| matches!(state.as_str(), "activating" | "deactivating"))
}

/// Whether the process `pid` is the unit's main process. One that an upgrade by hand started is not.
pub(super) fn has_process(disk: &DiskPlaces, pid: u64) -> bool {
    is_unit(disk) && property(disk, "MainPID").is_ok_and(|main| main == pid.to_string())
}

/// Upgrades the daemon in place to its configuration file. The new process belongs to the unit, as one that is started here
/// would not. The error is the upgrade's own.
pub(super) fn reload(disk: &DiskPlaces) -> Result<(), String> {
    let since = SystemTime::now();
    systemctl(&["reload", &name(disk)], RELOAD_TIMEOUT).map(drop).map_err(|error| {
        let log = journal(disk, since);
        let of_tool =
            || log.lines().filter_map(|line| line.strip_prefix("virtioblkctl: ")).next_back().map(str::to_owned);
        logs::errors(&log).or_else(of_tool).unwrap_or_else(|| format!("{error}; {}", log_place(disk)))
    })
}

/// Lets systemd forget the unit of a daemon that has ended, and not start it again. Returns when it has ended.
pub(super) fn end(disk: &DiskPlaces, deadline: Instant) -> Result<(), String> {
    if !is_unit(disk) {
        return Ok(());
    }
    ask_to_stop(disk);
    loop {
        match property(disk, "ActiveState")?.as_str() {
            "inactive" | "failed" => break,
            _ if Instant::now() >= deadline => {
                return Err(format!("{} has not ended yet: see 'systemctl status {0}'", name(disk)));
            }
            _ => thread::sleep(POLL_INTERVAL),
        }
    }
    // One that has not failed is forgotten already.
    let _ = systemctl(&["reset-failed", &name(disk)], QUERY_TIMEOUT);
    Ok(())
}

/// Waits until systemd has unloaded an earlier unit of the disk, which it does a moment after the unit's end.
pub(super) fn wait_until_unloaded(disk: &DiskPlaces) {
    let deadline = Instant::now() + UNLOAD_TIMEOUT;
    // Of one that is still there, systemd-run says so.
    while Instant::now() < deadline && property(disk, "LoadState").is_ok_and(|state| state != "not-found") {
        let _ = systemctl(&["reset-failed", &name(disk)], QUERY_TIMEOUT);
        thread::sleep(POLL_INTERVAL);
    }
}

/// Does not wait for the job: while the host shuts down, it waits for libvirt's guests, and they for the hook.
fn ask_to_stop(disk: &DiskPlaces) {
    // systemd may have forgotten the unit already; whether it runs is looked at afterwards.
    let _ = systemctl(&["--no-block", "stop", &name(disk)], QUERY_TIMEOUT);
}

/// Kills a daemon that was not ready in time, and lets systemd not start it again.
pub(super) fn kill(disk: &DiskPlaces) {
    ask_to_stop(disk);
    // It may have ended.
    let _ = systemctl(&["kill", "--signal=KILL", &name(disk)], QUERY_TIMEOUT);
}

/// Where the daemon's log is, for messages.
pub(super) fn log_place(disk: &DiskPlaces) -> String {
    match is_unit(disk) {
        true => format!("its log: journalctl -u {}", name(disk)),
        false => format!("its log is {}", disk.log.display()),
    }
}

/// What the unit's processes have logged, without the time, each error in the form that a log file has.
pub(super) fn journal(disk: &DiskPlaces, since: SystemTime) -> String {
    let since = since.duration_since(UNIX_EPOCH).unwrap_or_default();
    let since = format!("--since=@{}.{:06}", since.as_secs(), since.subsec_micros());
    // journald reads what a process has logged when that process may have ended already.
    let _ = run("journalctl", &["--sync"], QUERY_TIMEOUT);
    let unit = format!("_SYSTEMD_UNIT={}", name(disk));
    let lines = |priority: &str| {
        let priority = format!("--priority={priority}");
        let arguments = ["--quiet", "--no-pager", "--output=cat", &since, &priority, &unit];
        run("journalctl", &arguments, QUERY_TIMEOUT).unwrap_or_default()
    };
    // In the journal, a line's level is no part of its text.
    let errors: String = lines("0..3").lines().map(|line| format!("journal error: {line}\n")).collect();
    lines("4..7") + &errors
}

/// Notes that the disk's daemon is a unit, before it is started.
pub(super) fn note(disk: &DiskPlaces) -> std::io::Result<()> {
    fs::write(&disk.unit, name(disk))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_command_are_quoted() {
        assert_eq!(quoted("/usr/bin/a b"), "\"/usr/bin/a b\"");
        assert_eq!(quoted(r#"a"\"#), r#""a\"\\""#);
    }
}
