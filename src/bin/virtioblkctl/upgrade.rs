//! The subcommand `upgrade`: starts another virtioblkd that takes the guest over from the running one.
//!
//! This program may run as root while the daemon does not, and an attacker may control the daemon. So the program to start
//! never comes from the daemon. Its options, directory and environment come only from a daemon that runs as root or as this
//! program's user, because any of them can name files or code (`--blk-file`, `--pid-file`, `--copy-dir`, `--scratch`,
//! `--ceph-library-path`, `--rbd-option`) or leave a protection out (`--user`, `--sandbox`).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use virtioblkd::internal::base::logging;
use virtioblkd::internal::config::with_own_name;
use virtioblkd::internal::control::client::{Client, Failure, REPLY_TIMEOUT};
use virtioblkd::internal::control::is_trusted;
use virtioblkd::internal::control::protocol::return_types::{CommandLine, TookOver};

use crate::successor::{self, Failure as Reason, Outcome};
use crate::upgrade_lists::{self, Added};
use crate::{duration, parse};

#[derive(Args)]
pub struct Upgrade {
    /// The new program [default: the virtioblkd in the directory of this virtioblkctl]
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// Start the new daemon with this configuration file and OPTIONS alone, instead of the running one's options
    ///
    /// Needed if the running one belongs neither to root nor to you: its options are not trusted then.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Give up if the new daemon has not taken over after this time; the running one then serves on
    #[arg(long, value_name = "TIME", default_value = "2min", value_parser = duration)]
    timeout: Duration,
    /// Add a value to an option that may be given several times: copy-dir=DIR or rbd-option=NAME=VALUE. After `--` such an
    /// option replaces all of the running daemon's values
    #[arg(long, value_name = "OPTION=VALUE", value_parser = upgrade_lists::parse, conflicts_with = "config")]
    add: Vec<Added>,
    /// Options of virtioblkd that replace the running one's, such as `--cache writeback`; all others are unchanged
    #[arg(last = true, value_name = "OPTIONS")]
    options: Vec<String>,
}

/// Options that exclude others. A new one of them also replaces the options that it excludes.
const EXCLUDES: [(&str, &[&str]); 5] = [
    ("--rbd", &["--blk-file", "--backend"]),
    ("--blk-file", &["--rbd"]),
    ("--backend", &["--rbd"]),
    ("--socket-path", &["--fd"]),
    ("--fd", &["--socket-path", "--socket-mode", "--socket-group"]),
];

/// The service manager's socket (systemd, sd_notify(3)), which is accepted from any daemon.
const SYSTEMD_NOTIFY: &str = "/run/systemd/notify";

/// The new program's name, in the directory of this one.
const DAEMON: &str = "virtioblkd";

/// The result of an upgrade that did not fail.
pub enum Done {
    /// The new daemon has taken over. The value has its figures.
    Upgraded(Value),
    /// A signal ended the upgrade. The value is this program's exit status.
    Interrupted(u8),
}

/// Starts the new daemon and waits until it has taken over.
pub fn run(options: &Upgrade, control: &Path, mut client: Client) -> Result<Done, Failure> {
    let status = client.query_status(REPLY_TIMEOUT)?;
    let line = match client.execute("query-command-line", json!({}), REPLY_TIMEOUT) {
        // The daemon cannot report arguments that are not UTF-8. With --config they are not needed.
        Err(failure) if failure.code == "no-upgrade" && options.config.is_some() => CommandLine::default(),
        line => parse(line?)?,
    };
    let trusted = client.writer().is_some_and(|uid| is_trusted(uid, rustix::process::geteuid().as_raw()));
    let writer = client.writer();
    drop(client);
    let program = program(options)?;
    let failed = |what: &str, why: &dyn std::fmt::Display| {
        Failure::new("upgrade", format!("{what} '{}': {why}; {}", program.display(), describe_old_daemon(control)))
    };
    let control = &std::path::absolute(control).map_err(|error| failed("cannot start", &error))?;
    let mut command = Command::new(&program);
    command.args(arguments(options, &line, trusted, writer)?).arg("--take-over").arg(control);
    if trusted && !line.directory.is_empty() {
        command.current_dir(&line.directory);
    }
    if let Some(socket) = line.notify_socket.as_deref().filter(|socket| trusted || *socket == SYSTEMD_NOTIFY) {
        command.env("NOTIFY_SOCKET", socket);
    }
    // The new daemon logs to this program's standard error until it continues the old one's log.
    match successor::run(command, control, status.daemon.pid, options.timeout) {
        Outcome::TookOver(figures) => Ok(Done::Upgraded(figures)),
        Outcome::NotTakenOver(Reason::Signal(signal, ended)) => {
            let (hanging, old) = (describe_hanging(ended), describe_old_daemon(control));
            logging::message(format_args!("{signal}: the upgrade is given up{hanging}; {old}"));
            Ok(Done::Interrupted(128 + signal as u8))
        }
        Outcome::NotTakenOver(Reason::NotStarted(error)) => {
            Err(failed("cannot start", &format!("{error}; give virtioblkd's path as --binary")))
        }
        Outcome::NotTakenOver(Reason::Ended(status)) => Err(failed("no upgrade to", &describe_end(status))),
        Outcome::NotTakenOver(Reason::Late(ended)) => {
            let how = if ended { " and was ended".to_owned() } else { describe_hanging(false) };
            Err(failed("no upgrade to", &format!("it did not take over in time (--timeout){how}")))
        }
        Outcome::Unknown => Err(Failure::new(
            "upgrade",
            format!(
                "the upgrade to '{}' was given up, but may have been carried out: no daemon replies on '{}'; see \
                 'virtioblkctl status' later, and the daemons' logs",
                program.display(),
                control.display()
            ),
        )),
    }
}

/// Replaces the daemon behind `control` by the virtioblkd beside us with this configuration file.
pub fn to_configuration(control: &Path, file: &Path) -> Result<(), Failure> {
    let options = Upgrade {
        binary: None,
        config: Some(file.to_owned()),
        timeout: Duration::from_secs(120),
        add: Vec::new(),
        options: Vec::new(),
    };
    match run(&options, control, Client::connect(control)?)? {
        Done::Upgraded(_) => Ok(()),
        Done::Interrupted(_) => {
            Err(Failure::new("upgrade", "a signal ended the upgrade; the running daemon serves on"))
        }
    }
}

/// Describes the running daemon after a failed upgrade. It may have ended for another reason.
fn describe_old_daemon(control: &Path) -> &'static str {
    match Client::connect(control) {
        Ok(_) => "the running daemon serves on",
        Err(_) => "the running daemon does not reply: see its log, and whether it still runs",
    }
}

/// Describes a killed process that did not end. Returns an empty text if it ended.
fn describe_hanging(ended: bool) -> String {
    if ended {
        return String::new();
    }
    ": the new process hangs in a call of the kernel (perhaps its storage does not reply) and can no longer take over"
        .into()
}

/// Describes why a program that ended did not take over.
fn describe_end(status: Option<std::process::ExitStatus>) -> String {
    match status {
        Some(status) if status.success() => {
            "it ended without an error and did not take over: it may not be virtioblkd; give virtioblkd's path as --binary"
                .into()
        }
        Some(status) => format!("it ended with {status} and did not take over; its messages are above"),
        None => {
            "it closed its output and did not take over: it may not be virtioblkd; give virtioblkd's path as --binary"
                .into()
        }
    }
}

/// The program to start, as a path that does not depend on the current directory.
fn program(options: &Upgrade) -> Result<PathBuf, Failure> {
    let program = match &options.binary {
        Some(program) => std::path::absolute(program),
        None => std::env::current_exe().map(|ours| ours.with_file_name(DAEMON)),
    };
    program.map_err(|error| {
        Failure::new("upgrade", format!("cannot find the new virtioblkd ({error}): give its path as --binary"))
    })
}

/// The new daemon's arguments.
fn arguments(
    options: &Upgrade,
    line: &CommandLine,
    trusted: bool,
    writer: Option<u32>,
) -> Result<Vec<String>, Failure> {
    let new: Vec<String> = options.options.iter().map(|word| with_own_name(word)).collect();
    if let Some(config) = &options.config {
        let path = std::path::absolute(config).ok().and_then(|path| path.into_os_string().into_string().ok());
        let path = path.ok_or_else(|| Failure::new("upgrade", "the path of --config is not UTF-8: rename the file"))?;
        return Ok(["--config".to_owned(), path].into_iter().chain(new).collect());
    }
    if !trusted {
        let user = writer.map_or("an unknown user".to_owned(), |uid| format!("user {uid}"));
        return Err(Failure::new(
            "not-trusted",
            format!(
                "the running daemon belongs to {user}, neither to root nor to you, so the options that it reports are not \
                 trusted: give its configuration file (upgrade --config FILE), or start 'virtioblkd OPTIONS --take-over \
                 CONTROL' yourself; the running daemon serves on"
            ),
        ));
    }
    let old = line.arguments.clone();
    let added = || upgrade_lists::add(old, &options.add);
    let checked = upgrade_lists::check_directories(&line.directory, &options.add, &new).and_then(|()| added());
    let old = checked.map_err(|why| Failure::new("upgrade", format!("{why}; the running daemon serves on")))?;
    for dropped in upgrade_lists::dropped(&old, &new) {
        logging::message(dropped);
    }
    Ok(replace(old, &new))
}

/// Returns the old arguments without the options that the new ones replace, followed by the new ones. An option is a word
/// that begins with two dashes; the words up to the next option are its values.
fn replace(old: Vec<String>, new: &[String]) -> Vec<String> {
    let name = |word: &str| word.starts_with("--").then(|| word.split('=').next().unwrap_or(word).to_owned());
    let mut replaced: Vec<String> = new.iter().filter_map(|word| name(word)).collect();
    for (_, excluded) in
        EXCLUDES.iter().filter(|(option, _)| new.iter().any(|word| name(word).as_deref() == Some(option)))
    {
        replaced.extend(excluded.iter().map(|option| (*option).to_owned()));
    }
    let mut dropping = false;
    let kept = old.into_iter().filter(|word| {
        if let Some(option) = name(word) {
            dropping = replaced.contains(&option);
        }
        !dropping
    });
    kept.chain(new.iter().cloned()).collect()
}

/// Describes an upgrade for people.
pub fn readable(figures: &TookOver) -> String {
    let milliseconds = |microseconds: u64| microseconds as f64 / 1000.0;
    format!(
        "upgraded: the guest was paused for {:.1} ms, {:.1} ms of it until its requests were completed\n",
        milliseconds(figures.pause_us),
        milliseconds(figures.drained_us.unwrap_or(0))
    )
}

#[cfg(test)]
mod tests {
    use super::replace;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn new_options_replace_old_ones_however_they_are_written() {
        let cases = [
            ("--cache none --blk-file a", "--cache unsafe", "--blk-file a --cache unsafe"),
            ("--cache=none --blk-file a", "--cache unsafe", "--blk-file a --cache unsafe"),
            ("--read-only --cache none", "--read-only=false", "--cache none --read-only=false"),
            ("--blk-file a --serial x", "--rbd p/i", "--serial x --rbd p/i"),
            ("--blk-file a --backend slow:1", "--backend slow:2", "--blk-file a --backend slow:2"),
            ("--fd 3 --cache none", "--socket-path s", "--cache none --socket-path s"),
            ("--copy-dir a --copy-dir b --cache none", "--copy-dir c", "--cache none --copy-dir c"),
            ("--cache-x y --cache none", "--cache unsafe", "--cache-x y --cache unsafe"),
            ("--cache none", "", "--cache none"),
        ];
        for (old, new, wanted) in cases {
            assert_eq!(replace(words(old), &words(new)), words(wanted), "{old} with {new}");
        }
    }
}
