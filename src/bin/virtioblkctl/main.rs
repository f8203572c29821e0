//! The operator's command: controls a running `virtioblkd` through its control socket, and takes snapshots.
//!
//! The exit status is 0 on success, 1 if the daemon refused or could not be reached (`snapshot`: none was taken), and 2 for
//! wrong usage. `upgrade` ends with 128 + n if signal n ended it. `quiesce -- COMMAND` ends with COMMAND's status (128 + n
//! for signal n), with 125 if virtioblkctl itself failed or the hold was lost, and with 126 or 127 if COMMAND cannot be
//! run.
//!
//! | file | what |
//! |---|---|
//! | `cli`, `chosen` | the options and subcommands; the options that choose disks |
//! | `each` | commands for all disks of a domain |
//! | `show/` | replies and events, for people |
//! | `hold`, `continuation`, `watch`, `list`, `map` | subcommands: `quiesce -- COMMAND`, `continue --wait`, and those of these names |
//! | `snapshot`, `attend`, `freezing` | turn their options into plans for [`virtioblkd::internal::snapshot`] |
//! | `upgrade`, `upgrade_lists`, `successor` | an upgrade: the new daemon's options, and the wait for it |
//! | `domain`, `twins` | libvirt domains; commands of virsh that libvirt refuses for these disks |
//! | `libvirt_hook`, `proxmox` | called by libvirt and by Proxmox VE |
//! | `pages/` | manual pages and completions, for `make install` |

mod attend;
mod blkdeviotune;
mod chosen;
mod cli;
mod continuation;
mod domain;
mod each;
mod freezing;
mod health;
mod hold;
mod libvirt_hook;
mod list;
mod map;
mod metrics;
mod pages;
mod proxmox;
mod rates;
mod show;
mod snapshot;
mod successor;
mod throttle;
mod twins;
mod upgrade;
mod upgrade_lists;
mod watch;

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

use clap::CommandFactory;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use virtioblkd::disk::{CopyStatus, ThrottleStatus};
use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::text::{clean, clean_json, clean_lines};
pub(crate) use virtioblkd::internal::base::units::time as duration;
pub(crate) use virtioblkd::internal::control::client::parse;
use virtioblkd::internal::control::client::{Client, Failure, REPLY_TIMEOUT};
use virtioblkd::internal::control::protocol::MAX_WHO;
use virtioblkd::internal::control::protocol::return_types::{Continued, Quiesced, Resized, Resumed};
use virtioblkd::internal::snapshot::USAGE;

use chosen::Disks;
use cli::{ChangeCopy, Cli, Continue, Copies, CtlCommand, Quiesce, Renew, Resize, Resume, Stats, StatusOptions};

use crate::show::units;

fn main() -> ExitCode {
    let status = run_command();
    logging::finish_command();
    status
}

fn run_command() -> ExitCode {
    let cli = cli::parse(libvirt_hook::arguments());
    if let Err(failure) = cli.chosen.check() {
        return finish(&cli, Err(failure));
    }
    if cli.command.delays_a_guest() {
        logging::start_thread();
    }
    match &cli.command {
        CtlCommand::Snapshot(options) => return take_snapshot(options, &cli),
        CtlCommand::Attend(options) => return finish(&cli, attend::run(options, &cli.chosen, cli.json)),
        CtlCommand::Domain(options) => {
            return status_of(&cli, domain::run(options, &cli.chosen, cli.json), 1);
        }
        CtlCommand::Pages(options) => return finish(&cli, pages::run(options)),
        CtlCommand::List => return finish(&cli, list::run(&cli.chosen, cli.json).and_then(|text| print(&text))),
        CtlCommand::Exporter(options) => return finish(&cli, metrics::serve(options, &cli.chosen)),
        CtlCommand::Guard => return helper(virtioblkd::internal::snapshot::guard::serve),
        CtlCommand::LibvirtHook(options) => return libvirt_hook::run(options),
        CtlCommand::ProxmoxHook(options) => return proxmox::run(options),
        CtlCommand::ImageUse(options) => return libvirt_hook::check_image_use(options),
        CtlCommand::Domblkstat(options) => return finish(&cli, twins::domblkstat(options, &cli.chosen, cli.json)),
        CtlCommand::Domblkinfo(options) => return finish(&cli, twins::domblkinfo(options, &cli.chosen, cli.json)),
        CtlCommand::Blockresize(options) => return finish(&cli, twins::blockresize(options, &cli.chosen, cli.json)),
        CtlCommand::Blkdeviotune(options) => {
            return finish(&cli, blkdeviotune::run(options, &cli.chosen, cli.json));
        }
        CtlCommand::ProxmoxArgs(vm) => return finish(&cli, proxmox::print_arguments(vm)),
        CtlCommand::Cloner => return helper(virtioblkd::internal::snapshot::cloner::serve),
        _ => {}
    }
    if let CtlCommand::Stats(stats) = &cli.command
        && let Some(format) = stats.format()
    {
        return finish(&cli, metrics::print_page(&cli.chosen, format));
    }
    let own_failure = match &cli.command {
        CtlCommand::Status(StatusOptions { check: true }) => 2,
        CtlCommand::Quiesce(Quiesce { command, .. }) if !command.is_empty() => hold::FAILED,
        _ => 1,
    };
    status_of(&cli, cli.chosen.several(&[]).and_then(|disks| run(&cli, &disks)), own_failure)
}

fn status_of(cli: &Cli, result: Result<u8, Failure>, own_failure: u8) -> ExitCode {
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            report(cli, &failure);
            ExitCode::from(if failure.code == USAGE { 2 } else { own_failure })
        }
    }
}

fn run(cli: &Cli, disks: &Disks) -> Result<u8, Failure> {
    if let CtlCommand::Status(StatusOptions { check: true }) = &cli.command
        && !disks.disks.is_empty()
    {
        return health::run(disks, cli.json);
    }
    let path = match disks.disks.as_slice() {
        [] => {
            let error = Cli::command().error(
                clap::error::ErrorKind::MissingRequiredArgument,
                "--control DISK is missing: give a name that 'virtioblkctl list' shows, or the socket that virtioblkd was \
                 started with as --control-path; or --domain DOMAIN",
            );
            error.exit();
        }
        [(_, path)] if disks.domain.is_none() => path,
        _ => return each::run(cli, disks),
    };
    match answer(cli, path, Client::connect(path)?)? {
        Answer::Text(text) => print(&text).map(|()| 0),
        Answer::Status(status) => Ok(status),
    }
}

fn report(cli: &Cli, failure: &Failure) {
    logging::message(failure);
    if cli.json {
        // The exit status reports the failure, too, so an error of a closed pipe does not matter.
        let _ = writeln!(io::stdout(), "{}", clean_json(&error_json(failure).to_string()));
    }
}

/// A failure as `--json` has it.
fn error_json(failure: &Failure) -> Value {
    json!({"error": {"code": failure.code, "desc": failure.message}})
}

/// Formats a value for `--json`. It may contain a daemon's words, so control characters in it are escaped.
fn json_page(value: &Value) -> String {
    format!("{}\n", clean_json(&format!("{value:#}")))
}

fn take_snapshot(options: &snapshot::Snapshot, cli: &Cli) -> ExitCode {
    finish(cli, snapshot::run(options, &cli.chosen, cli.json).and_then(|text| print(&text)))
}

fn finish(cli: &Cli, result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            report(cli, &failure);
            ExitCode::from(if failure.code == USAGE { 2 } else { 1 })
        }
    }
}

/// Runs a helper process that another virtioblkctl started. Its standard input is a socket.
fn helper(serve: fn(OwnedFd) -> ExitCode) -> ExitCode {
    match io::stdin().as_fd().try_clone_to_owned() {
        Ok(link) => serve(link),
        Err(error) => {
            logging::message(format_args!("cannot use standard input: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// The result of a command on one disk.
enum Answer {
    /// The text to print.
    Text(String),
    /// The exit status of a command that has printed its output itself.
    Status(u8),
}

fn answer(cli: &Cli, path: &Path, mut client: Client) -> Result<Answer, Failure> {
    let text = match &cli.command {
        CtlCommand::Status(_) => page(cli, client.execute("query-status", json!({}), REPLY_TIMEOUT)?, show::status)?,
        CtlCommand::Stats(Stats { interval: Some(interval), count, .. }) => {
            return rates::run(path, client, *interval, *count, cli.json).map(Answer::Status);
        }
        CtlCommand::Stats(stats) => {
            let reply = client.execute("query-stats", json!({}), REPLY_TIMEOUT)?;
            page(cli, reply, |reply| show::stats(reply, stats.all))?
        }
        CtlCommand::Quiesce(quiesce) => {
            let arguments = arguments(quiesce);
            if !quiesce.command.is_empty() {
                let status = hold::run(client, arguments, quiesce.timeout, quiesce.lease, &quiesce.command);
                return status.map(Answer::Status);
            }
            let reply = client.execute("quiesce", arguments, quiesce.timeout + REPLY_TIMEOUT)?;
            page(cli, reply, |reply: &Quiesced| {
                // Standard output carries the token alone, for TOKEN=$(...).
                let shorter = hold::shorter(quiesce.lease, reply.lease_ms);
                logging::message(format_args!("the disk is held{shorter}: {}", show::figures(&reply.figures)));
                format!("{}\n", clean(&reply.token))
            })?
        }
        CtlCommand::Resume(resume) => {
            let arguments = match &resume.token {
                Some(token) => json!({"token": token}),
                None => json!({"all": true}),
            };
            page(cli, client.execute("resume", arguments, REPLY_TIMEOUT)?, resumed)?
        }
        CtlCommand::Renew(Renew { token, lease }) => {
            let arguments = json!({"token": token, "lease-ms": lease.as_millis() as u64});
            let readable = |reply: &Value| {
                let granted = reply["lease-ms"].as_u64().unwrap_or(0);
                match hold::shorter(*lease, granted) {
                    shorter if shorter.is_empty() => {
                        format!("the hold lasts {} from now on, unless it is ended earlier\n", units::time(granted))
                    }
                    shorter => format!("the hold lasts{shorter}\n"),
                }
            };
            page(cli, client.execute("renew-lease", arguments, REPLY_TIMEOUT)?, readable)?
        }
        CtlCommand::Copies(Copies { change: None }) => {
            page(cli, client.execute("query-copies", json!({}), REPLY_TIMEOUT)?, |copies: &Vec<CopyStatus>| {
                show::copies(copies)
            })?
        }
        CtlCommand::Copies(Copies { change: Some(change) }) => {
            let reply = change_copy(&mut client, change, change.copy())?;
            let is_export = matches!(change, ChangeCopy::Cancel { .. }) && is_export(&mut client, change.copy())?;
            page(cli, reply, |_: &Value| changed_copy(change, is_export))?
        }
        CtlCommand::Map(options) => map::run(client, options, cli.json)?,
        CtlCommand::Continue(Continue { wait: Some(timeout) }) => {
            let reply = continuation::run(client, *timeout)?;
            page(cli, reply, continuation::readable)?
        }
        CtlCommand::Continue(Continue { wait: None }) => {
            let readable = |reply: &Continued| match reply.retried {
                0 => "the disk was not stopped\n".to_owned(),
                1 => "1 failed request is retried; 'status' shows whether it fails again\n".to_owned(),
                some => format!("{some} failed requests are retried; 'status' shows whether they fail again\n"),
            };
            page(cli, client.execute("continue", json!({}), REPLY_TIMEOUT)?, readable)?
        }
        CtlCommand::Resize(Resize { size, force }) => {
            let mut arguments = json!({"force": force});
            if let Some(size) = size {
                arguments["size"] = json!(size);
            }
            let readable = |reply: &Resized| {
                format!("the guest's disk now has {} ({} bytes)\n", units::bytes(reply.size), reply.size)
            };
            page(cli, client.execute("resize", arguments, REPLY_TIMEOUT)?, readable)?
        }
        CtlCommand::Throttle(options) => {
            let limits = throttle::run(options, path, &mut client)?;
            let reply = serde_json::to_value(ThrottleStatus::of(&limits)).unwrap_or(Value::Null);
            page(cli, reply, |_: &Value| throttle::readable(&limits))?
        }
        CtlCommand::Upgrade(options) => match upgrade::run(options, path, client)? {
            upgrade::Done::Upgraded(figures) => page(cli, figures, upgrade::readable)?,
            upgrade::Done::Interrupted(status) => return Ok(Answer::Status(status)),
        },
        CtlCommand::Watch => return watch::run(path, client, cli.json).map(Answer::Status),
        CtlCommand::List
        | CtlCommand::Exporter(_)
        | CtlCommand::Domain(_)
        | CtlCommand::Snapshot(_)
        | CtlCommand::Attend(_)
        | CtlCommand::LibvirtHook(_)
        | CtlCommand::ProxmoxHook(_)
        | CtlCommand::ImageUse(_)
        | CtlCommand::ProxmoxArgs(_)
        | CtlCommand::Domblkstat(_)
        | CtlCommand::Domblkinfo(_)
        | CtlCommand::Blockresize(_)
        | CtlCommand::Blkdeviotune(_)
        | CtlCommand::Pages(_)
        | CtlCommand::Guard
        | CtlCommand::Cloner => {
            return Err(Failure::new("internal", "this command needs no connection; please report it as a defect"));
        }
        CtlCommand::Quit => {
            let reply = client.execute("quit", json!({}), REPLY_TIMEOUT)?;
            page(cli, reply, |_: &Value| "the daemon ends\n".to_owned())?
        }
    };
    Ok(Answer::Text(text))
}

/// Cancels or limits the copy with this name.
fn change_copy(client: &mut Client, change: &ChangeCopy, copy: &str) -> Result<Value, Failure> {
    let (command, arguments) = match change {
        ChangeCopy::Cancel { .. } => ("copy-cancel", json!({"copy": copy})),
        ChangeCopy::Limit { bandwidth, .. } => ("copy-bandwidth", json!({"copy": copy, "bandwidth": bandwidth})),
    };
    client.execute(command, arguments, REPLY_TIMEOUT)
}

/// Whether the daemon's copy of this name is an export, which has no file.
fn is_export(client: &mut Client, copy: &str) -> Result<bool, Failure> {
    let copies: Vec<CopyStatus> = parse(client.execute("query-copies", json!({}), REPLY_TIMEOUT)?)?;
    Ok(copies.iter().any(|one| one.copy == copy && one.export.is_some()))
}

/// Says that a copy was cancelled or limited.
fn changed_copy(change: &ChangeCopy, is_export: bool) -> String {
    match change {
        ChangeCopy::Cancel { copy } if is_export => format!("{copy} is cancelled; its clients' connections end\n"),
        ChangeCopy::Cancel { copy } => format!("{copy} is cancelled; its partial file is removed\n"),
        ChangeCopy::Limit { copy, bandwidth: 0 } => format!("{copy} has no limit\n"),
        ChangeCopy::Limit { copy, bandwidth } => {
            format!("{copy} reads at most {} a second\n", units::bytes(*bandwidth))
        }
    }
}

/// Formats a reply: as the daemon's JSON, or for people.
fn page<T: DeserializeOwned>(cli: &Cli, reply: Value, readable: impl FnOnce(&T) -> String) -> Result<String, Failure> {
    if cli.json {
        return Ok(json_page(&reply));
    }
    parse(reply).map(|reply| readable(&reply))
}

fn arguments(quiesce: &Quiesce) -> Value {
    let user = || {
        let command = quiesce.command.first().map(|name| format!(" -- {}", name.to_string_lossy()));
        format!("virtioblkctl quiesce{}", command.unwrap_or_default())
    };
    let mut who = quiesce.who.clone().unwrap_or_else(user);
    while who.len() > MAX_WHO {
        who.pop();
    }
    json!({
        "timeout-ms": quiesce.timeout.as_millis() as u64,
        "lease-ms": quiesce.lease.as_millis() as u64,
        "detached": quiesce.command.is_empty(),
        "who": who,
    })
}

fn resumed(reply: &Resumed) -> String {
    let resumed = reply.resumed.unwrap_or(0) as u64;
    let ended = units::count(resumed, "hold");
    match reply.holders {
        0 if resumed == 0 => "the disk was not held\n".to_owned(),
        0 => format!("{ended} ended: the guest's writes continue\n"),
        left => format!("{ended} ended, {} left: the disk is still held\n", units::count(left as u64, "holder")),
    }
}

/// The code of the failure that standard output cannot be written.
const OUTPUT: &str = "output";

/// Prints at once, also into a pipe. The text may contain a daemon's words, so control characters in it are replaced.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(clean_lines(text).as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Failure::new(OUTPUT, format!("cannot print: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    use clap::Parser;

    #[test]
    fn the_definition_of_the_command_line_is_valid() {
        cli::command().debug_assert();
    }

    #[test]
    fn sizes_on_the_command_line_may_have_units() {
        let limit = ["virtioblkctl", "--control", "c", "copies", "limit", "copy-1", "100M"];
        let CtlCommand::Copies(Copies { change: Some(ChangeCopy::Limit { bandwidth, .. }) }) =
            Cli::try_parse_from(limit).expect("a size with a unit").command
        else {
            panic!("not the subcommand copies limit");
        };
        assert_eq!(bandwidth, 100 << 20);
        let snapshot =
            ["virtioblkctl", "snapshot", "--disk", "c", "--level", "crash", "--to", "copy:/b", "--bandwidth"];
        assert!(Cli::try_parse_from(snapshot.iter().chain(&["400M"])).is_ok());
        let error = Cli::try_parse_from(snapshot.iter().chain(&["fast"])).err().expect("no size").to_string();
        assert!(error.contains("400M"), "{error}");
    }
}
