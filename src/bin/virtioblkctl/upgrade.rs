//! The subcommand `upgrade`: starts another virtioblkd that takes the guest over from the one that runs.
//!
//! We may be root and the daemon may not, or it may have been broken into. So the program never comes from the daemon, and
//! its options, directory and environment only from one that runs as root or as us: any of them names files or code
//! (`--blk-file`, `--pid-file`, `--copy-dir`, `--scratch`, `--ceph-library-path`, `--rbd-option`), or leaves a protection out (`--user`,
//! `--sandbox`).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use virtioblkd::internal::base::logging;
use virtioblkd::internal::control::client::{Client, Failure, REPLY_TIMEOUT};
use virtioblkd::internal::control::is_trusted;

use crate::duration;
use crate::successor::{self, Ending, Why};
use crate::upgrade_lists::{self, Added};

#[derive(Args)]
pub struct Upgrade {
    /// The new program [default: the virtioblkd in the directory of this virtioblkctl]
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// Start the new one with this configuration file, and OPTIONS, alone, instead of the running one's options
    ///
    /// Needed where the running one is neither root's nor yours, since its own word is not taken then.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Give up, and let the running daemon serve on, if the new one has not taken over by then
    #[arg(long, value_name = "TIME", default_value = "2min", value_parser = duration)]
    timeout: Duration,
    /// One more of an option that may be given several times, beside the running daemon's: copy-dir=DIR or
    /// rbd-option=NAME=VALUE. After `--` such an option replaces all of them
    #[arg(long, value_name = "OPTION=VALUE", value_parser = upgrade_lists::parse, conflicts_with = "config")]
    add: Vec<Added>,
    /// Options of virtioblkd that replace the running one's, such as `--cache writeback`; all others stay as they are
    #[arg(last = true, value_name = "OPTIONS")]
    options: Vec<String>,
}

/// Options that exclude others: a new one replaces those, too.
const EXCLUDES: [(&str, &[&str]); 5] = [
    ("--rbd", &["--blk-file", "--backend"]),
    ("--blk-file", &["--rbd"]),
    ("--backend", &["--rbd"]),
    ("--socket-path", &["--fd"]),
    ("--fd", &["--socket-path", "--socket-mode", "--socket-group"]),
];

/// The service manager's socket (systemd, sd_notify(3)): the one that is taken from any daemon.
const SYSTEMD_NOTIFY: &str = "/run/systemd/notify";

/// The new program's name, beside ours.
const DAEMON: &str = "virtioblkd";

/// How an upgrade ended, if it did not fail.
pub enum Outcome {
    /// The new daemon's figures.
    Done(Value),
    /// Given up by a signal; our exit status.
    GivenUp(u8),
}

/// Starts the new daemon and waits until it has taken over.
pub fn run(options: &Upgrade, control: &Path, mut client: Client) -> Result<Outcome, Failure> {
    let status = client.ask("query-status", json!({}), REPLY_TIMEOUT)?;
    let line = match client.ask("query-command-line", json!({}), REPLY_TIMEOUT) {
        // It has arguments that are no text; they are not needed.
        Err(failure) if failure.code == "no-upgrade" && options.config.is_some() => Value::Null,
        line => line?,
    };
    let trusted = client.writer().is_some_and(|uid| is_trusted(uid, rustix::process::geteuid().as_raw()));
    let writer = client.writer();
    drop(client);
    let program = program(options)?;
    let failed = |what: &str, why: &dyn std::fmt::Display| {
        Failure::new("upgrade", format!("{what} '{}': {why}; {}", program.display(), fate(control)))
    };
    let control = &std::path::absolute(control).map_err(|error| failed("cannot start", &error))?;
    let mut command = Command::new(&program);
    command.args(arguments(options, &line, trusted, writer)?).arg("--take-over").arg(control);
    if let Some(directory) = line["directory"].as_str().filter(|_| trusted) {
        command.current_dir(directory);
    }
    if let Some(socket) = line["notify-socket"].as_str().filter(|socket| trusted || *socket == SYSTEMD_NOTIFY) {
        command.env("NOTIFY_SOCKET", socket);
    }
    // Its log is for whoever looks at us, until it goes on with the other's.
    match successor::run(command, control, &status["daemon"]["pid"], options.timeout) {
        Ending::TookOver(figures) => Ok(Outcome::Done(figures)),
        Ending::Stayed(Why::Signal(signal, gone)) => {
            logging::message(format_args!("{signal}: the upgrade is given up{}; {}", lingers(gone), fate(control)));
            Ok(Outcome::GivenUp(128 + signal as u8))
        }
        Ending::Stayed(Why::NotStarted(error)) => {
            Err(failed("cannot start", &format!("{error}; give virtioblkd's path as --binary")))
        }
        Ending::Stayed(Why::Ended(status)) => Err(failed("no upgrade to", &not_taken_over(status))),
        Ending::Stayed(Why::Late(gone)) => {
            let how = if gone { " and was ended".to_owned() } else { lingers(false) };
            Err(failed("no upgrade to", &format!("it did not take over in time (--timeout){how}")))
        }
        Ending::Unknown => Err(Failure::new(
            "upgrade",
            format!(
                "the upgrade to '{}' was given up, and whether it had been carried out is not known: no daemon answers on \
                 '{}'; see 'virtioblkctl status' later, and the daemons' logs",
                program.display(),
                control.display()
            ),
        )),
    }
}

/// What became of the running daemon: it may have ended for a reason of its own.
fn fate(control: &Path) -> &'static str {
    match Client::connect(control) {
        Ok(_) => "the running daemon serves on",
        Err(_) => "the running daemon does not answer: see its log, and whether it still runs",
    }
}

/// What to add where a process was killed: that it does not die.
fn lingers(gone: bool) -> String {
    if gone {
        return String::new();
    }
    ": the new process hangs in a call of the kernel (its storage does not answer?) and can take nothing over any more"
        .into()
}

/// Why a program that ended did not take over.
fn not_taken_over(status: Option<std::process::ExitStatus>) -> String {
    match status {
        Some(status) if status.success() => {
            "it ended without an error and did not take over: is it virtioblkd? Give its path as --binary".into()
        }
        Some(status) => format!("it did not take over ({status}); a virtioblkd has said above why"),
        None => "it closed its output and did not take over: is it virtioblkd? Give its path as --binary".into(),
    }
}

/// The program to start, as a path that does not depend on our directory.
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
fn arguments(options: &Upgrade, line: &Value, trusted: bool, writer: Option<u32>) -> Result<Vec<String>, Failure> {
    if let Some(config) = &options.config {
        let path = std::path::absolute(config).ok().and_then(|path| path.into_os_string().into_string().ok());
        let path = path.ok_or_else(|| Failure::new("upgrade", "the path given as --config is no text: rename it"))?;
        return Ok(["--config".to_owned(), path].into_iter().chain(options.options.iter().cloned()).collect());
    }
    if !trusted {
        let user = writer.map_or("an unknown user".to_owned(), |uid| format!("user {uid}"));
        return Err(Failure::new(
            "not-trusted",
            format!(
                "the running daemon is {user}'s, neither root's nor yours, so the options that it says it was started with \
                 are not taken: give its configuration file (upgrade --config FILE), or start 'virtioblkd OPTIONS --take-over \
                 CONTROL' yourself; the running daemon serves on"
            ),
        ));
    }
    let old = line["arguments"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
    let old = upgrade_lists::add(old, &options.add).map_err(|why| Failure::new("upgrade", why))?;
    for lost in upgrade_lists::replaced(&old, &options.options) {
        logging::message(lost);
    }
    Ok(replace(old, &options.options))
}

/// The old arguments, but for the options that are among the new ones; then the new ones. An option is a word that begins
/// with two dashes, and what follows up to the next one is its value.
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

/// For people.
pub fn readable(figures: &Value) -> String {
    let milliseconds = |name: &str| figures[name].as_f64().unwrap_or_default() / 1000.0;
    format!(
        "upgraded: the guest was paused for {:.1} ms, {:.1} ms of it until its requests were answered\n",
        milliseconds("pause-us"),
        milliseconds("drained-us")
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
