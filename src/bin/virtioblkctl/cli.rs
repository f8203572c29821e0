//! The options and subcommands of `virtioblkctl`.

use std::ffi::OsString;
use std::time::Duration;

use clap::{Arg, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand};
use virtioblkd::internal::base::units::bytes;
use virtioblkd::internal::base::version::VERSION;
use virtioblkd::internal::config::disk_size;

use crate::chosen::Chosen;
use crate::{
    attend, blkdeviotune, domain, duration, libvirt_hook, map, metrics, pages, proxmox, rates, snapshot, throttle,
    twins, upgrade,
};

/// Query and control a running virtioblkd, and take snapshots of its disk
#[derive(Parser)]
#[command(name = "virtioblkctl", version = VERSION)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) chosen: Chosen,
    /// Print the daemon's JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: CtlCommand,
}

/// What a command's help says in place of the options of every command.
const GLOBAL_OPTIONS: &str = "Options of every command: --control DISK, --domain DOMAIN, --control-dir DIR, --json. See \
                              'virtioblkctl --help'";

/// The definition of the command line, in which a command's help does not repeat the options of every command.
pub(crate) fn command() -> Command {
    let command = Cli::command();
    let global: Vec<Arg> = command.get_arguments().filter(|option| option.is_global_set()).cloned().collect();
    // clap gives a subcommand the global options that it does not have.
    let hidden: Vec<Arg> = global.into_iter().map(|option| option.hide(true)).collect();
    command.mut_subcommands(|subcommand| with_hidden(subcommand, &hidden))
}

fn with_hidden(command: Command, hidden: &[Arg]) -> Command {
    let command = command.args(hidden).after_help(GLOBAL_OPTIONS);
    command.mut_subcommands(|subcommand| with_hidden(subcommand, hidden))
}

/// Parses the arguments, which begin with the program's name. Ends this process if they are wrong or ask for help.
pub(crate) fn parse(arguments: Vec<OsString>) -> Cli {
    let matches = command().get_matches_from(arguments);
    Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

#[derive(Subcommand)]
pub(crate) enum CtlCommand {
    /// List the disks of this host: name, domain, mode, state, image
    ///
    /// STATE is in-use, idle (no guest), held, stopped (a failed request waits for `continue`), trouble, no-answer (within
    /// a second), stale (a socket without a daemon), not-running or no-permission.
    List,
    /// Show the disk's cache mode, front-end, queues, holders and last errors
    ///
    /// With --check prints one line and ends with a status for monitoring: 0 well; 1 a warning, such as STALLED requests or a
    /// failed copy; 2 STOPPED, fenced, a sync that failed, or no answer.
    Status(StatusOptions),
    /// Show the counters, a row for each queue; the rates in each interval; or metrics of all disks for Prometheus
    Stats(Stats),
    /// Serve the metrics of all disks of this host to Prometheus, over HTTP
    ///
    /// /metrics has every disk that `list` shows. A daemon that does not answer within a second has virtioblkd_up 0 and holds
    /// nothing up. It needs no more than a user whom the control sockets let in (--control-mode, --control-access read-only).
    /// See docs/monitoring.md.
    Exporter(metrics::Exporter),
    /// Quiesce the disk: block new writes, complete those in flight, and make everything acknowledged durable
    ///
    /// Without COMMAND, prints a token, and the disk is held until `resume TOKEN` or the end of the lease. With COMMAND,
    /// holds the disk while COMMAND runs, resumes it in any case, and exits with COMMAND's status.
    Quiesce(Quiesce),
    /// End a hold, so that the guest's writes continue
    Resume(Resume),
    /// Give a hold more time: its lease begins anew
    Renew(Renew),
    /// Take a snapshot of one or several disks at one instant
    ///
    /// Freezes the guest's filesystems if the level needs it, holds every disk, takes the snapshot, resumes the disks, thaws
    /// the guest, and prints what was reached. If anything fails, the disks are resumed and the guest is thawed, too.
    Snapshot(snapshot::Snapshot),
    /// Freeze a guest for snapshots that others take of its disks' images (rbd snap create, Cinder)
    ///
    /// Runs until it is interrupted; one process serves all disks of a guest. Each virtioblkd asks it for consent before it
    /// holds its disk for such a snapshot. It freezes the guest once for all disks, and thaws it when the last disk is
    /// resumed.
    Attend(attend::Attend),
    /// Show the copies and exports that run in the background (`snapshot --background`), and their progress
    Copies(Copies),
    /// Show which parts of a running export's instant hold data, as `nbdinfo --map` does
    ///
    /// The export is one of `snapshot --to nbd:SOCKET`. With --json, the output is that of `nbdinfo --map --json`.
    Map(map::Map),
    /// A libvirt domain: status, check, convert, attach, detach, apply
    ///
    /// libvirt is asked through virsh, which honours LIBVIRT_DEFAULT_URI.
    Domain(domain::Domain),
    /// As virsh's domblkstat: a disk's counters
    Domblkstat(twins::Domblkstat),
    /// As virsh's domblkinfo: a disk's size, and what its image takes
    Domblkinfo(twins::Domblkinfo),
    /// As virsh's blockresize: grow a disk
    Blockresize(twins::Blockresize),
    /// As virsh's blkdeviotune: show or change the limits of a disk
    ///
    /// A total replaces the limits of reads and writes, and the other way round. Bytes may have a unit, such as 10M.
    Blkdeviotune(blkdeviotune::Blkdeviotune),
    /// libvirt's hook: start a domain's disks before the domain, and end them after it
    ///
    /// Install it as the link /etc/libvirt/hooks/qemu.d/50-virtioblkd. It reads the domain's XML on standard input. The
    /// domain's metadata describes the disks: see docs/libvirt.md.
    LibvirtHook(libvirt_hook::LibvirtHook),
    /// Proxmox VE's hookscript: start a VM's disks before the VM, and end them after it
    ///
    /// Install it as the link /var/lib/vz/snippets/virtioblkd-proxmox. /etc/virtioblkd/proxmox/VMID.xml describes the VM's
    /// disks: see docs/proxmox.md.
    ProxmoxHook(proxmox::ProxmoxHook),
    /// Print the arguments for `args:` of a Proxmox VE machine that connect QEMU to its disks
    ProxmoxArgs(proxmox::Vm),
    /// The process that thaws a guest if `snapshot` or `attend` is killed
    #[command(name = virtioblkd::internal::snapshot::guard::SUBCOMMAND, hide = true)]
    Guard,
    /// The process that shares an image's blocks for `snapshot`
    #[command(name = virtioblkd::internal::snapshot::cloner::SUBCOMMAND, hide = true)]
    Cloner,
    /// The process that asks whether another process uses an image, for the hooks
    #[command(name = virtioblkd::internal::host::image_use::SUBCOMMAND, hide = true)]
    ImageUse(libvirt_hook::ImageUse),
    /// Retry the failed requests of a stopped disk, which the guest still waits for
    ///
    /// For a disk that `status` shows as STOPPED, after its cause was fixed (for example, space was added to a full file
    /// system).
    Continue(Continue),
    /// Report a new size of the image to the guest
    ///
    /// With SIZE, grows the image first, if it is a file. Grow a block device with its own tools and leave SIZE out. With
    /// --domain only without SIZE.
    Resize(Resize),
    /// Show the limits of the disk's rates, or change them while the guest runs
    ///
    /// In libvirt's words, as `virtioblkd --throttle` has them. An upgrade keeps them.
    Throttle(throttle::Throttle),
    /// Replace the running daemon by another program, or change its options, while the guest runs
    ///
    /// Starts virtioblkd with the running daemon's options, changed by OPTIONS. The new daemon opens the image and checks
    /// everything. It then takes over the guest, the sockets and the pid file, and the old one ends. The guest sees a pause of
    /// milliseconds. If anything fails before that, the running daemon serves on. The image, its size, --read-only and the
    /// block size cannot change. An upgrade is refused while the disk is held or copied; it ends exports.
    Upgrade(upgrade::Upgrade),
    /// Write the manual pages and the completions of shells
    #[command(hide = true)]
    Pages(pages::Pages),
    /// Print the daemon's events until interrupted
    ///
    /// With --domain, prints those of all disks that the domain has now, each with the disk's name.
    Watch,
    /// End the daemon as SIGTERM does: it drains and syncs first
    Quit,
}

impl CtlCommand {
    /// Whether a disk or a guest waits for this command. Such a command must not wait for the reader of its messages.
    pub(crate) fn delays_a_guest(&self) -> bool {
        match self {
            CtlCommand::Snapshot(_) | CtlCommand::Attend(_) | CtlCommand::Guard => true,
            CtlCommand::Quiesce(quiesce) => !quiesce.command.is_empty(),
            _ => false,
        }
    }
}

#[derive(Args)]
pub(crate) struct StatusOptions {
    /// Print one line; the exit status says how well the disk is
    #[arg(long)]
    pub(crate) check: bool,
}

#[derive(Args)]
pub(crate) struct Stats {
    /// Print the rates and latencies of each interval, a whole number of seconds or a time such as 500ms, until interrupted
    #[arg(value_name = "INTERVAL", value_parser = rates::interval, conflicts_with_all = ["all", "openmetrics", "prometheus"])]
    pub(crate) interval: Option<Duration>,
    /// The number of intervals after which to end
    #[arg(value_name = "COUNT", requires = "interval")]
    pub(crate) count: Option<u64>,
    /// Show the columns of counts that are zero, too
    #[arg(long)]
    pub(crate) all: bool,
    /// Print the metrics in the text format OpenMetrics 1.0 instead; without --control those of all disks of this host
    #[arg(long, conflicts_with_all = ["all", "json"])]
    pub(crate) openmetrics: bool,
    /// The same in Prometheus' text format 0.0.4, for node_exporter's textfile collector
    #[arg(long, conflicts_with_all = ["all", "json", "openmetrics"])]
    pub(crate) prometheus: bool,
}

impl Stats {
    /// The text format in which metrics are wanted.
    pub(crate) fn format(&self) -> Option<metrics::Format> {
        match (self.openmetrics, self.prometheus) {
            (true, _) => Some(metrics::Format::OpenMetrics),
            (_, true) => Some(metrics::Format::Prometheus),
            _ => None,
        }
    }
}

#[derive(Args)]
pub(crate) struct Quiesce {
    /// How long the quiesce may take; then it is given up and the guest's writes continue
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub(crate) timeout: Duration,
    /// How long the hold lasts unless it is ended earlier; it is renewed while COMMAND runs
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub(crate) lease: Duration,
    /// A name for this hold, for status, events and the log
    #[arg(long, value_name = "TEXT")]
    pub(crate) who: Option<String>,
    /// The command to run while the disk is held
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Resume {
    /// The token of the hold to end, which quiesce printed (with --domain: vda=TOKEN,vdb=TOKEN)
    pub(crate) token: Option<String>,
    /// End every hold
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Args)]
pub(crate) struct Renew {
    /// The token of the hold, which quiesce printed
    pub(crate) token: String,
    /// How long the hold lasts from now on, unless it is ended earlier
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub(crate) lease: Duration,
}

#[derive(Args)]
pub(crate) struct Continue {
    /// Wait until the retried requests are completed and durable, which a quiesce of an instant finds out. The exit status is
    /// 1 if one of them fails again, or if TIME is over
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true, default_missing_value = "60s",
          value_parser = duration)]
    pub(crate) wait: Option<Duration>,
}

#[derive(Args)]
pub(crate) struct Resize {
    /// Grow the image to this size first, in bytes (K, M, G or T: powers of 1024)
    #[arg(value_name = "SIZE", value_parser = disk_size)]
    pub(crate) size: Option<u64>,
    /// Accept a smaller image, too: the guest loses what was beyond its new end
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Args)]
pub(crate) struct Copies {
    #[command(subcommand)]
    pub(crate) change: Option<ChangeCopy>,
}

#[derive(Subcommand)]
pub(crate) enum ChangeCopy {
    /// End a copy and remove its partial file
    Cancel {
        /// The copy's name, as `copies` shows it (with --domain: vda=COPY,vdb=COPY, or a name that one disk alone has)
        copy: String,
    },
    /// Limit how much a copy reads in a second
    Limit {
        /// The copy's name, as `copies` shows it (with --domain: vda=COPY,vdb=COPY, or a name that one disk alone has)
        copy: String,
        /// Bytes a second, such as 100M (K, M, G or T: powers of 1024); 0: no limit
        #[arg(value_parser = bytes)]
        bandwidth: u64,
    },
}

impl ChangeCopy {
    /// The copy's name, or those of several disks' copies.
    pub(crate) fn copy(&self) -> &str {
        match self {
            ChangeCopy::Cancel { copy } | ChangeCopy::Limit { copy, .. } => copy,
        }
    }
}
