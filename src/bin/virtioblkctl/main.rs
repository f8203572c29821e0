//! The operator's command: asks a running `virtioblkd` through its quiesce socket, and takes snapshots.
//!
//! Exit status: 0 success, 1 the daemon refused or could not be reached (`snapshot`: none was taken), 2 wrong usage.
//! `upgrade` ends with 128 + n if signal n gave it up. `quiesce -- COMMAND` exits with COMMAND's status (128 + n for signal n), 125 if we failed or the hold was lost, 126
//! and 127 if COMMAND cannot be run.

mod attend;
mod chosen;
mod domain;
mod each;
mod freezing;
mod hold;
mod libvirt_hook;
mod list;
mod show;
mod snapshot;
mod successor;
mod upgrade;
mod upgrade_lists;
mod watch;

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};
use serde_json::{Value, json};

use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::text::{clean, clean_json, clean_lines};
use virtioblkd::internal::base::units::bytes;
pub(crate) use virtioblkd::internal::base::units::time as duration;
use virtioblkd::internal::config::disk_size;
use virtioblkd::internal::control::client::{Client, Failure, REPLY_TIMEOUT};
use virtioblkd::internal::control::protocol::MAX_WHO;
use virtioblkd::internal::snapshot::USAGE;

use chosen::{Chosen, Disks};

/// Ask a running virtioblkd, and hold its disk still
#[derive(Parser)]
#[command(name = "virtioblkctl", version)]
struct Cli {
    #[command(flatten)]
    chosen: Chosen,
    /// Print the daemon's JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: CtlCommand,
}

#[derive(Subcommand)]
enum CtlCommand {
    /// The disks of this host: name, domain, mode, state, image
    ///
    /// STATE is in-use, idle (no guest), held, stopped (a failed request waits for `continue`), trouble, no-answer (within
    /// a second), stale (a socket without a daemon), not-running or no-permission.
    List,
    /// The disk: cache mode, front-end, rings, who holds it, last errors
    Status,
    /// Counters, a row a ring
    Stats,
    /// Hold the disk still: no write in flight, everything acknowledged durable
    ///
    /// Without COMMAND, prints a token and leaves the disk held until `resume TOKEN` or the end of the lease. With
    /// COMMAND, holds the disk while COMMAND runs, resumes whatever happens, and exits with COMMAND's status.
    Quiesce(Quiesce),
    /// Let the disk go on
    Resume(Resume),
    /// Take a snapshot of one disk or several, at one instant, that holds what its level promises
    ///
    /// Freezes the guest's filesystems if the level asks for it, holds every disk, takes the snapshot, lets everything
    /// go on, and prints what was really reached. Whatever fails, every disk goes on and the guest is thawed.
    Snapshot(snapshot::Snapshot),
    /// Freeze a guest for snapshots that others take of its disks' images (rbd snap create, Cinder)
    ///
    /// Runs until interrupted, one process for all disks of a guest. Each virtioblkd asks it before it holds its disk for
    /// such a snapshot: the guest is frozen once for all disks, and thawed when the last one goes on.
    Attend(attend::Attend),
    /// Copies in the background (`snapshot --to copy:... --background`): how far they are
    Copies(Copies),
    /// A libvirt domain: status, check, convert
    ///
    /// libvirt is asked through virsh, which honours LIBVIRT_DEFAULT_URI.
    Domain(domain::Domain),
    /// libvirt's hook: start a domain's disks before the domain, and end them after it
    ///
    /// Linked as /etc/libvirt/hooks/qemu.d/50-virtioblkd. Reads the domain's XML on standard input. The disks are described in
    /// the domain's metadata: see docs/libvirt.md.
    LibvirtHook(libvirt_hook::LibvirtHook),
    /// The process that thaws a guest if `snapshot` or `attend` is killed
    #[command(name = virtioblkd::internal::snapshot::guard::SUBCOMMAND, hide = true)]
    Guard,
    /// The process that shares an image's blocks for `snapshot`
    #[command(name = virtioblkd::internal::snapshot::cloner::SUBCOMMAND, hide = true)]
    Cloner,
    /// Let a stopped disk go on: what failed, and was kept from the guest, is tried again
    ///
    /// For a disk that `status` shows as STOPPED, after the cause was mended (space was added to a full filesystem).
    Continue,
    /// Tell the guest that its image has another size
    ///
    /// With SIZE the image, a file, is grown first. Grow a block device by its own tools and leave SIZE out.
    Resize(Resize),
    /// Replace the running daemon by another program, or change its options, while the guest runs
    ///
    /// Starts virtioblkd with the running one's options, changed by OPTIONS; it opens the image and checks everything, then
    /// takes over the guest, the sockets and the pid file, and the old one ends. The guest notices a pause of milliseconds.
    /// Whatever fails before that, the running daemon serves on. The image, its size, --read-only and the block size
    /// cannot change. Not while the disk is held or copied.
    Upgrade(upgrade::Upgrade),
    /// Print what happens, until interrupted
    Watch,
    /// End the daemon in order, as SIGTERM does
    Quit,
}

impl CtlCommand {
    /// Whether a disk or a guest waits for us, which must not wait for whoever reads our messages.
    fn holds_still(&self) -> bool {
        match self {
            CtlCommand::Snapshot(_) | CtlCommand::Attend(_) | CtlCommand::Guard => true,
            CtlCommand::Quiesce(quiesce) => !quiesce.command.is_empty(),
            _ => false,
        }
    }
}

#[derive(Args)]
struct Quiesce {
    /// Give up, and let the disk go on, if it is not still by then
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    timeout: Duration,
    /// The disk goes on by itself after this time (renewed while COMMAND runs)
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    lease: Duration,
    /// A name for this hold, for status, events and the log
    #[arg(long, value_name = "TEXT")]
    who: Option<String>,
    /// Hold the disk while this runs
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Resume {
    /// The hold to end, as quiesce printed it (with --domain: vda=TOKEN,vdb=TOKEN)
    token: Option<String>,
    /// End every hold
    #[arg(long)]
    all: bool,
}

#[derive(Args)]
struct Resize {
    /// Grow the image to this many bytes first (with K, M, G or T: powers of 1024)
    #[arg(value_name = "SIZE", value_parser = disk_size)]
    size: Option<u64>,
    /// Even if the image is smaller now: the guest loses what was behind its end
    #[arg(long)]
    force: bool,
}

#[derive(Args)]
struct Copies {
    #[command(subcommand)]
    change: Option<ChangeCopy>,
}

#[derive(Subcommand)]
enum ChangeCopy {
    /// End a copy and remove what there is of it
    Cancel {
        /// Its name, as `copies` shows it
        copy: String,
    },
    /// Let a copy read at most this much a second
    Limit {
        /// Its name, as `copies` shows it
        copy: String,
        /// Bytes a second, such as 100M (K, M, G or T: powers of 1024); 0: no limit
        #[arg(value_parser = bytes)]
        bandwidth: u64,
    },
}

fn main() -> ExitCode {
    let status = run_command();
    logging::finish_command();
    status
}

fn run_command() -> ExitCode {
    let cli = Cli::parse_from(libvirt_hook::arguments());
    if cli.command.holds_still() {
        logging::start_thread();
    }
    match &cli.command {
        CtlCommand::Snapshot(options) => return take_snapshot(options, &cli),
        CtlCommand::Attend(options) => return finish(&cli, attend::run(options, &cli.chosen, cli.json)),
        CtlCommand::Domain(options) => {
            return status_of(&cli, domain::run(options, &cli.chosen, cli.json), 1);
        }
        CtlCommand::List => return finish(&cli, list::run(&cli.chosen, cli.json).and_then(|text| print(&text))),
        CtlCommand::Guard => return helper(virtioblkd::internal::snapshot::guard::serve),
        CtlCommand::LibvirtHook(options) => return libvirt_hook::run(options),
        CtlCommand::Cloner => return helper(virtioblkd::internal::snapshot::cloner::serve),
        _ => {}
    }
    let own_failure = match &cli.command {
        CtlCommand::Quiesce(Quiesce { command, .. }) if !command.is_empty() => hold::FAILED,
        _ => 1,
    };
    status_of(&cli, cli.chosen.several(&[]).and_then(|disks| run(&cli, &disks)), own_failure)
}

fn status_of(cli: &Cli, result: Result<u8, Failure>, own_failure: u8) -> ExitCode {
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            tell(cli, &failure);
            ExitCode::from(if failure.code == USAGE { 2 } else { own_failure })
        }
    }
}

fn run(cli: &Cli, disks: &Disks) -> Result<u8, Failure> {
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

fn tell(cli: &Cli, failure: &Failure) {
    logging::message(failure);
    if cli.json {
        let error = json!({"error": {"code": failure.code, "desc": failure.message}});
        // The status tells it as well; a closed pipe is the reader's choice.
        let _ = writeln!(io::stdout(), "{}", clean_json(&error.to_string()));
    }
}

fn take_snapshot(options: &snapshot::Snapshot, cli: &Cli) -> ExitCode {
    finish(cli, snapshot::run(options, &cli.chosen, cli.json).and_then(|text| print(&text)))
}

fn finish(cli: &Cli, result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            tell(cli, &failure);
            ExitCode::from(if failure.code == USAGE { 2 } else { 1 })
        }
    }
}

/// A process that another virtioblkctl started, with a socket as its standard input.
fn helper(serve: fn(OwnedFd) -> ExitCode) -> ExitCode {
    match io::stdin().as_fd().try_clone_to_owned() {
        Ok(link) => serve(link),
        Err(error) => {
            logging::message(format_args!("no standard input: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// What a command on one disk came to.
enum Answer {
    Text(String),
    /// Our exit status; all was said.
    Status(u8),
}

fn answer(cli: &Cli, path: &Path, mut client: Client) -> Result<Answer, Failure> {
    let text = match &cli.command {
        CtlCommand::Status => page(cli, &client.ask("query-status", json!({}), REPLY_TIMEOUT)?, show::status),
        CtlCommand::Stats => page(cli, &client.ask("query-stats", json!({}), REPLY_TIMEOUT)?, show::stats),
        CtlCommand::Quiesce(quiesce) => {
            let arguments = arguments(quiesce);
            if !quiesce.command.is_empty() {
                return hold::run(client, arguments, quiesce.timeout, &quiesce.command).map(Answer::Status);
            }
            let answer = client.ask("quiesce", arguments, quiesce.timeout + REPLY_TIMEOUT)?;
            if !cli.json {
                // Standard output has the token alone, for TOKEN=$(...).
                logging::message(format_args!("the disk is held: {}", show::figures(&answer)));
            }
            page(cli, &answer, |answer| format!("{}\n", clean(answer["token"].as_str().unwrap_or_default())))
        }
        CtlCommand::Resume(resume) => {
            let arguments = match &resume.token {
                Some(token) => json!({"token": token}),
                None => json!({"all": true}),
            };
            page(cli, &client.ask("resume", arguments, REPLY_TIMEOUT)?, resumed)
        }
        CtlCommand::Copies(Copies { change: None }) => {
            page(cli, &client.ask("query-copies", json!({}), REPLY_TIMEOUT)?, show::copies)
        }
        CtlCommand::Copies(Copies { change: Some(change) }) => {
            let (command, arguments) = match change {
                ChangeCopy::Cancel { copy } => ("copy-cancel", json!({"copy": copy})),
                ChangeCopy::Limit { copy, bandwidth } => {
                    ("copy-bandwidth", json!({"copy": copy, "bandwidth": bandwidth}))
                }
            };
            page(cli, &client.ask(command, arguments, REPLY_TIMEOUT)?, |_| String::new())
        }
        CtlCommand::Continue => {
            let readable = |answer: &Value| match answer["retried"].as_u64() {
                Some(0) | None => "the disk was not stopped\n".to_owned(),
                Some(some) => {
                    format!("{some} failed request(s) are tried again; 'status' shows whether they fail again\n")
                }
            };
            page(cli, &client.ask("continue", json!({}), REPLY_TIMEOUT)?, readable)
        }
        CtlCommand::Resize(Resize { size, force }) => {
            let mut arguments = json!({"force": force});
            if let Some(size) = size {
                arguments["size"] = json!(size);
            }
            let readable = |answer: &Value| format!("the guest's disk has {} bytes\n", answer["size"]);
            page(cli, &client.ask("resize", arguments, REPLY_TIMEOUT)?, readable)
        }
        CtlCommand::Upgrade(options) => match upgrade::run(options, path, client)? {
            upgrade::Outcome::Done(figures) => page(cli, &figures, upgrade::readable),
            upgrade::Outcome::GivenUp(status) => return Ok(Answer::Status(status)),
        },
        CtlCommand::Watch => return watch::run(path, client, cli.json).map(Answer::Status),
        CtlCommand::List
        | CtlCommand::Domain(_)
        | CtlCommand::Snapshot(_)
        | CtlCommand::Attend(_)
        | CtlCommand::LibvirtHook(_)
        | CtlCommand::Guard
        | CtlCommand::Cloner => {
            return Err(Failure::new("internal", "this command is run elsewhere"));
        }
        CtlCommand::Quit => {
            page(cli, &client.ask("quit", json!({}), REPLY_TIMEOUT)?, |_| "the daemon ends\n".to_owned())
        }
    };
    Ok(Answer::Text(text))
}

fn page(cli: &Cli, answer: &Value, readable: impl Fn(&Value) -> String) -> String {
    if cli.json { format!("{}\n", clean_json(&format!("{answer:#}"))) } else { readable(answer) }
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

fn resumed(answer: &Value) -> String {
    match answer["holders"].as_u64() {
        Some(0) | None => format!("{} hold(s) ended, the disk goes on\n", answer["resumed"]),
        Some(others) => {
            format!("{} hold(s) ended, {others} holder(s) left: the disk is still held\n", answer["resumed"])
        }
    }
}

/// Prints at once, also into a pipe. The text has a daemon's words in it: whatever was not cleaned before is cleaned here.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(clean_lines(text).as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Failure::new("output", format!("cannot print: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_written_with_units() {
        let limit = ["virtioblkctl", "--control", "c", "copies", "limit", "copy-1", "100M"];
        let CtlCommand::Copies(Copies { change: Some(ChangeCopy::Limit { bandwidth, .. }) }) =
            Cli::try_parse_from(limit).expect("a size with a unit").command
        else {
            panic!("copies limit is something else");
        };
        assert_eq!(bandwidth, 100 << 20);
        let snapshot =
            ["virtioblkctl", "snapshot", "--disk", "c", "--level", "crash", "--to", "copy:/b", "--bandwidth"];
        assert!(Cli::try_parse_from(snapshot.iter().chain(&["400M"])).is_ok());
        let error = Cli::try_parse_from(snapshot.iter().chain(&["fast"])).err().expect("no size").to_string();
        assert!(error.contains("400M"), "{error}");
    }
}
