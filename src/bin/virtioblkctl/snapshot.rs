//! The subcommand `snapshot`: its options become a plan, its receipt is printed.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::text::clean_json;
use virtioblkd::internal::control::client::Failure;
use virtioblkd::internal::snapshot::plan::{Consistency, Method, Plan};
use virtioblkd::internal::snapshot::receipt::Receipt;
use virtioblkd::internal::snapshot::{self, USAGE};

use virtioblkd::internal::base::units::bytes;

use crate::chosen::Chosen;
use crate::duration;
use crate::freezing::Freezing;

#[derive(Args)]
pub struct Snapshot {
    /// A disk: its name, or its control socket (virtioblkd --control-path); once for each. Or --domain for all of a domain
    #[arg(long = "disk", value_name = "DISK")]
    disks: Vec<PathBuf>,
    /// What is promised: crash, filesystem (needs --qga, --libvirt or --domain), application (needs hooks besides)
    #[arg(long, value_name = "LEVEL", value_parser = str::parse::<Consistency>)]
    level: Consistency,
    /// How: reflink:PATH, copy:PATH, rbd, rbd:NAME or exec:COMMAND; one a disk, or one for all with {} for the image's
    /// file name; an RBD image needs none
    #[arg(long = "to", value_name = "WAY:ARG")]
    to: Vec<OsString>,
    #[command(flatten)]
    freezing: Freezing,
    /// Take a weaker snapshot, and say so, where the level cannot be reached
    #[arg(long)]
    or_weaker: bool,
    /// Give up if the disks are not still by then
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    timeout: Duration,
    /// Give up if the guest's filesystems are not frozen by then; also for each hook
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    freeze_timeout: Duration,
    /// The longest that the disks may be held, an exec: included
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    lease: Duration,
    /// Of copy:, in bytes a second, such as 400M (K, M, G or T: powers of 1024)
    #[arg(long, value_name = "BYTES", default_value = "0", hide_default_value = true, value_parser = bytes)]
    bandwidth: u64,
    /// Compute the SHA-256 of each snapshot
    #[arg(long)]
    digest: bool,
    /// Do not wait for the end of copy:
    #[arg(long)]
    background: bool,
}

/// Takes the snapshot.
pub fn run(options: &Snapshot, chosen: &Chosen, json: bool) -> Result<String, Failure> {
    let receipt = snapshot::take(&plan(options, chosen)?)?;
    if receipt.level != receipt.requested_level {
        logging::message(format_args!("WEAKER THAN ASKED FOR: the snapshot is {} consistent", receipt.level));
    }
    show(&receipt, json)
}

fn plan(options: &Snapshot, chosen: &Chosen) -> Result<Plan, Failure> {
    let disks = chosen.several(&options.disks)?;
    let usage = |why: String| Failure::new(USAGE, why);
    let ways = options.to.iter().map(Method::parse).collect::<Result<_, _>>().map_err(usage)?;
    Ok(Plan {
        disks: disks.controls(),
        level: options.level,
        ways,
        agent: options.freezing.agent(options.level, disks.domain.as_deref()),
        hooks: options.freezing.hooks.clone(),
        or_weaker: options.or_weaker,
        timeout: options.timeout,
        freeze_timeout: options.freeze_timeout,
        lease: options.lease,
        bandwidth: options.bandwidth,
        digest: options.digest,
        background: options.background,
        progress: std::io::stderr().is_terminal(),
    })
}

fn show(receipt: &Receipt, json: bool) -> Result<String, Failure> {
    if !json {
        return Ok(receipt.page());
    }
    let text = serde_json::to_string_pretty(receipt);
    text.map(|text| format!("{}\n", clean_json(&text)))
        .map_err(|error| Failure::new("internal", format!("the receipt: {error}")))
}
