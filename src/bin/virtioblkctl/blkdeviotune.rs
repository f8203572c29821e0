//! virsh's `blkdeviotune` (tools/virsh-domain.c, `cmdBlkdeviotune`), which libvirt refuses for a vhostuser disk, with virsh's
//! arguments and output.

use std::sync::LazyLock;

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};
use serde_json::{Map, Value, json};
use virtioblkd::engine::throttle::{Limits, Words};
use virtioblkd::internal::base::logging;
use virtioblkd::internal::config::limit;
use virtioblkd::internal::control::client::Failure;
use virtioblkd::internal::host::hook::Host;
use virtioblkd::internal::host::iotune;
use virtioblkd::internal::snapshot::USAGE;

use crate::chosen::Chosen;
use crate::twins::{Device, devices};
use crate::{json_page, print, throttle};

#[derive(Args)]
pub(crate) struct Blkdeviotune {
    /// The domain's name or UUID
    domain: String,
    /// The disk: its target, such as vda, or its image
    device: String,
    /// Show or change the domain's next start
    #[arg(long)]
    config: bool,
    /// Show or change the domain that runs. Without --live and --config: this if it runs, else its next start
    #[arg(long)]
    live: bool,
    #[command(flatten)]
    limits: Given,
}

/// The limits on the command line, each an option of its own.
struct Given(Vec<(String, String)>);

/// The options' names, and those with underscores, which virsh has too.
static NAMES: LazyLock<Vec<(String, String)>> = LazyLock::new(|| {
    Limits::names(Words::Libvirt).into_iter().map(|name| (name.clone(), name.replace('-', "_"))).collect()
});

impl Args for Given {
    fn augment_args(mut command: Command) -> Command {
        for (name, alias) in &*NAMES {
            let help = format!("Set {}; 0 lifts the limit", name.replace('-', " "));
            command = command
                .arg(Arg::new(name.as_str()).long(name.as_str()).alias(alias.as_str()).value_name("NUMBER").help(help));
        }
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let names = Limits::names(Words::Libvirt).into_iter();
        Ok(Given(names.filter_map(|name| Some((name.clone(), matches.get_one::<String>(&name)?.clone()))).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Given {
    fn change(&self, mut limits: Limits) -> Result<Limits, String> {
        let values = self.0.iter().map(|(name, value)| Ok((name.clone(), limit(name, value)?)));
        limits.change(&values.collect::<Result<Vec<_>, String>>()?)?;
        Ok(limits)
    }
}

fn failed(error: String) -> Failure {
    Failure::new("domain", error)
}

fn one_device(options: &Blkdeviotune, chosen: &Chosen) -> Result<Device, Failure> {
    let mut devices = devices(chosen, &options.domain, Some(&options.device))?;
    match (devices.pop(), devices.is_empty()) {
        (Some(device), true) => Ok(device),
        _ => {
            Err(Failure::new("no-daemon", format!("several disks have the image '{}': give a target", options.device)))
        }
    }
}

pub(crate) fn run(options: &Blkdeviotune, chosen: &Chosen, json: bool) -> Result<(), Failure> {
    let (live, config) = match (options.live, options.config) {
        // As virsh: VIR_DOMAIN_AFFECT_CURRENT. Where libvirt does not answer, only the daemon can be asked.
        (false, false) => match iotune::runs(&options.domain) {
            Ok(false) => (false, true),
            Ok(true) | Err(_) => (true, false),
        },
        given => given,
    };
    let device = if live { Some(one_device(options, chosen)?) } else { None };
    if options.limits.0.is_empty() {
        let limits = match device {
            Some(device) => device.status.disk.throttle.unwrap_or_default().limits(),
            None => iotune::of_next_start(&options.domain, &options.device).map_err(failed)?,
        };
        return print(&if json { json_page(&members(&limits)) } else { page(&limits) });
    }
    let host = Host::of_this_user().map_err(failed)?;
    let target = device.as_ref().map_or(options.device.clone(), |device| device.target.clone());
    if let Some(mut device) = device {
        let usage = |why: String| Failure::new(USAGE, why);
        let limits = options.limits.change(throttle::current(&mut device.client)?).map_err(usage)?;
        throttle::set(&mut device.client, &limits)?;
        for why in iotune::note_live(&host, &options.domain, &target, &limits).unwrap_or_else(|error| vec![error]) {
            logging::message(format_args!("the limits are in effect, but {why}"));
        }
    }
    if config {
        let change = |limits| options.limits.change(limits);
        iotune::change_next_start(&host, &options.domain, &target, change).map_err(failed)?;
    }
    if json { print(&json_page(&json!({}))) } else { Ok(()) }
}

/// virsh's names in its order: the averages, the bursts, the size of an operation, the lengths.
fn rows(limits: &Limits) -> Vec<(String, u64)> {
    let values = limits.values(Words::Libvirt);
    let rank = |name: &str| match name {
        name if name.ends_with("-length") => 3,
        "size-iops-sec" => 2,
        name if name.ends_with("-max") => 1,
        _ => 0,
    };
    let value = |name: &str| values.iter().find(|(known, _)| known == name).map_or(0, |(_, value)| *value);
    let mut names = Limits::names(Words::Libvirt);
    names.sort_by_key(|name| rank(name));
    names.into_iter().map(|name| (name.replace('-', "_"), value(&name))).collect()
}

fn members(limits: &Limits) -> Value {
    Value::Object(rows(limits).into_iter().map(|(name, value)| (name, json!(value))).collect::<Map<_, _>>())
}

fn page(limits: &Limits) -> String {
    rows(limits).iter().map(|(name, value)| format!("{name:<15}: {value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_that_of_virsh() {
        let given = Given(vec![("total-iops-sec".into(), "500".into()), ("read-bytes-sec".into(), "1M".into())]);
        let page = page(&given.change(Limits::default()).unwrap());
        let start = "total_bytes_sec: 0\nread_bytes_sec : 1048576\nwrite_bytes_sec: 0\ntotal_iops_sec : 500\n";
        assert!(page.starts_with(start), "{page}");
        let lines: Vec<&str> = page.lines().collect();
        assert_eq!((lines[6], lines[12]), ("total_bytes_sec_max: 0", "size_iops_sec  : 0"));
        assert_eq!(lines[13], "total_bytes_sec_max_length: 0");
    }
}
