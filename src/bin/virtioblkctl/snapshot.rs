//! The subcommand `snapshot`: turns its options into a plan, and prints the receipt.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::text::clean_json;
use virtioblkd::internal::control::client::Failure;
use virtioblkd::internal::snapshot::plan::{Consistency, Method, SnapshotPlan};
use virtioblkd::internal::snapshot::receipt::Receipt;
use virtioblkd::internal::snapshot::{self, USAGE};

use virtioblkd::internal::base::units::bytes;

use crate::chosen::{Chosen, target};
use crate::duration;
use crate::freezing::Freezing;

#[derive(Args)]
pub struct Snapshot {
    /// A disk: its name, or its control socket (virtioblkd --control-path); give it once for each. Or use --domain for all
    /// disks of a domain
    #[arg(long = "disk", value_name = "DISK")]
    disks: Vec<PathBuf>,
    /// What the snapshot must hold: crash, filesystem (needs --qga, --libvirt or --domain), application (also needs
    /// --hooks)
    #[arg(long, value_name = "LEVEL", value_parser = str::parse::<Consistency>)]
    level: Consistency,
    /// How to take it: reflink:PATH, copy:PATH, nbd:SOCKET, rbd, rbd:NAME or exec:COMMAND. Give one for each disk, or one for all disks
    /// with {} in place of the image's file name. An RBD image needs none
    #[arg(long = "to", value_name = "WAY:ARG")]
    to: Vec<OsString>,
    #[command(flatten)]
    freezing: Freezing,
    /// If the level cannot be reached, take a weaker snapshot and report that
    #[arg(long)]
    or_weaker: bool,
    /// How long quiescing the disks may take
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    timeout: Duration,
    /// How long freezing the guest's filesystems may take, and each hook
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    freeze_timeout: Duration,
    /// How long the disks may be held, including the command of exec:
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    lease: Duration,
    /// The most bytes a second that copy: and nbd: may read, such as 400M (K, M, G or T: powers of 1024); 0: no limit
    #[arg(long, value_name = "BYTES", default_value = "0", hide_default_value = true, value_parser = bytes)]
    bandwidth: u64,
    /// Compute the SHA-256 of each snapshot
    #[arg(long)]
    digest: bool,
    /// Leave the copies of copy: and the exports of nbd: running in the background
    #[arg(long)]
    background: bool,
    /// How long an export of nbd: lasts without a client
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    idle: Duration,
    /// The most bytes that nbd: may save of what the guest overwrites meanwhile, such as 10G; when it is more, the export
    /// fails [default: the daemon's --scratch-size, or half of what is free in its --copy-dir]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    scratch_size: Option<u64>,
}

/// Takes the snapshot.
pub fn run(options: &Snapshot, chosen: &Chosen, json: bool) -> Result<String, Failure> {
    let receipt = snapshot::take(&plan(options, chosen)?)?;
    if receipt.level != receipt.requested_level {
        logging::message(format_args!("WEAKER THAN REQUESTED: the snapshot is {} consistent", receipt.level));
    }
    show(&receipt, json)
}

fn plan(options: &Snapshot, chosen: &Chosen) -> Result<SnapshotPlan, Failure> {
    let disks = chosen.several(&options.disks)?;
    let export_names = disks.disks.iter().map(|(name, _)| export_name(name)).collect();
    let usage = |why: String| Failure::new(USAGE, why);
    let methods = options.to.iter().map(Method::parse).collect::<Result<_, _>>().map_err(usage)?;
    Ok(SnapshotPlan {
        disks: disks.controls(),
        level: options.level,
        methods,
        agent: options.freezing.agent(options.level, disks.domain.as_deref())?,
        hooks: options.freezing.hooks.clone(),
        or_weaker: options.or_weaker,
        timeout: options.timeout,
        freeze_timeout: options.freeze_timeout,
        lease: options.lease,
        bandwidth: options.bandwidth,
        digest: options.digest,
        background: options.background,
        progress: std::io::stderr().is_terminal(),
        export_names,
        idle: options.idle,
        scratch_size: options.scratch_size,
    })
}

/// The name of a disk's export: libvirt's target of the disk, or the file name of its socket without its extension.
fn export_name(disk: &str) -> String {
    let name = Path::new(disk).file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    target(&name).to_owned()
}

fn show(receipt: &Receipt, json: bool) -> Result<String, Failure> {
    if !json {
        return Ok(receipt.page());
    }
    let text = serde_json::to_string_pretty(receipt);
    text.map(|text| format!("{}\n", clean_json(&text)))
        .map_err(|error| Failure::new("internal", format!("the receipt: {error}")))
}
