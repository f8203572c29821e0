//! The subcommands of `domain`, for a libvirt domain whose disks virtioblkd serves, or is to serve.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use virtioblkd::engine::cache::CacheMode;
use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::text::clean;
use virtioblkd::internal::control::client::Failure;
use virtioblkd::internal::host::check::facts::Facts;
use virtioblkd::internal::host::check::{self, Finding, Grade};
use virtioblkd::internal::host::connection;
use virtioblkd::internal::host::convert::{self, Converted};
use virtioblkd::internal::host::domain::{Domain as Description, VhostUserDisk, read_description};
use virtioblkd::internal::host::hook::Host;
use virtioblkd::internal::host::hotplug::{self, Applied, Scope};
use virtioblkd::internal::host::listing::{self, Listed, State};
use virtioblkd::internal::host::metadata::{self, DiskOptions};
use virtioblkd::internal::host::places::Places;
use virtioblkd::internal::host::redefine::redefine;
use virtioblkd::internal::host::virsh;

use crate::chosen::Chosen;
use crate::list::table;
use crate::{json_page, print, upgrade};

#[derive(Args)]
pub(crate) struct Domain {
    #[command(subcommand)]
    command: DomainCommand,
}

#[derive(Subcommand)]
enum DomainCommand {
    /// Show the domain's disks: target, mode, what the guest sees, state, image
    Status {
        /// The domain's name or UUID
        #[arg(value_name = "DOMAIN")]
        name: String,
    },
    /// Check for problems that would prevent the domain's disks from working at its next start, and say how to fix them
    ///
    /// Checks memory, queues, reconnecting, images, users, AppArmor, SELinux, QEMU's version, and what the guest will see.
    /// The exit status is 1 if there is a problem.
    Check {
        /// The domain's name or UUID, a file with its XML, or - for standard input
        #[arg(value_name = "DOMAIN")]
        name: String,
    },
    /// Change a disk that QEMU serves into one that virtioblkd serves, or with --back the other way
    ///
    /// Prints the changed XML; with --define libvirt uses it for the next start. Disks of type file, block and network
    /// (rbd) can be converted. If an element has no equivalent, the conversion is refused and names it.
    Convert(Convert),
    /// Attach a new disk to a running domain: starts its daemon first, and then attaches it through libvirt
    Attach(Attach),
    /// Detach a disk from a running domain, and end its daemon when the guest has released the disk
    Detach(Detach),
    /// Apply changed metadata (virsh edit) to the daemons of a running domain, by an upgrade in place
    ///
    /// The guest sees a pause of milliseconds. Changes that are impossible while a guest runs (the image, its size, readonly,
    /// the block size) are refused, and the daemon serves on with its old options; the
    /// exit status is 1 then. Disks that were attached without --config are left as they are.
    Apply {
        /// The domain's name or UUID
        #[arg(value_name = "DOMAIN")]
        name: String,
    },
}

#[derive(Args)]
struct Attach {
    /// The domain's name or UUID
    #[arg(value_name = "DOMAIN")]
    name: String,
    /// The new disk's target, such as vdb
    target: String,
    /// Attributes of our disk element in the metadata, such as file=/images/b.raw cache=none serial=data
    #[arg(value_name = "NAME=VALUE", required = true, value_parser = word)]
    words: Vec<(String, String)>,
    /// At the domain's next start, too; without it the disk is gone when the domain has shut down
    #[arg(long)]
    config: bool,
}

#[derive(Args)]
struct Detach {
    /// The domain's name or UUID
    #[arg(value_name = "DOMAIN")]
    name: String,
    /// The disk, such as vdb
    target: String,
    /// From the domain's next start, too; without it the disk is back then
    #[arg(long)]
    config: bool,
}

fn word(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("give NAME=VALUE, such as file=/images/b.raw")?;
    Ok((name.to_owned(), value.to_owned()))
}

#[derive(Args)]
struct Convert {
    /// The domain's name or UUID, a file with its XML, or - for standard input
    #[arg(value_name = "DOMAIN")]
    name: String,
    /// The disk's target, such as vda
    target: String,
    /// The disk's new cache mode [default: unchanged]
    #[arg(long, value_name = "MODE", value_parser = str::parse::<CacheMode>, conflicts_with = "back")]
    cache: Option<CacheMode>,
    /// Convert the other way: QEMU serves the disk itself again
    #[arg(long)]
    back: bool,
    /// Let libvirt define the changed domain (virsh define) instead of printing it
    #[arg(long)]
    define: bool,
}

/// Returns this program's exit status.
pub(crate) fn run(options: &Domain, chosen: &Chosen, json: bool) -> Result<u8, Failure> {
    match &options.command {
        DomainCommand::Status { name } => status(name, chosen, json),
        DomainCommand::Check { name } => check(name, chosen, json),
        DomainCommand::Convert(options) => convert(options),
        DomainCommand::Attach(Attach { name, target, words, config }) => {
            let host = Host::of_this_user().map_err(failed)?;
            changed(
                &format!("attached {target}"),
                hotplug::attach(&host, name, target, words, Scope { config: *config }),
            )
        }
        DomainCommand::Detach(Detach { name, target, config }) => {
            let host = Host::of_this_user().map_err(failed)?;
            changed(&format!("detached {target}"), hotplug::detach(&host, name, target, Scope { config: *config }))
        }
        DomainCommand::Apply { name } => apply(name),
    }
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::new("domain", error.to_string())
}

/// A name with a slash, or one that ends in `.xml`, is a file's; `-` is standard input's.
fn is_file(name: &str) -> bool {
    name == "-" || name.contains('/') || name.ends_with(".xml")
}

/// Reads the XML of a domain, of a file, or of standard input.
fn description(name: &str, of_libvirt: impl Fn(&str) -> Result<String, String>) -> Result<String, Failure> {
    if !is_file(name) {
        return of_libvirt(name).map_err(failed);
    }
    let read = match name {
        "-" => read_description(io::stdin()),
        path => File::open(path).map_err(|error| format!("cannot be opened: {error}")).and_then(read_description),
    };
    read.map_err(|error| failed(format!("'{name}' {error}")))
}

fn described(xml: &str) -> Result<(Description, Vec<DiskOptions>), Failure> {
    let domain = Description::parse(xml).map_err(failed)?;
    Ok((domain, metadata::of_xml(xml).unwrap_or_default()))
}

/// Prints what was done, and what was not reached besides. The guest has its disk, or has it no more.
fn changed(what: &str, result: Result<Vec<String>, String>) -> Result<u8, Failure> {
    let incomplete = result.map_err(failed)?;
    print(&format!("{}\n", clean(what)))?;
    incomplete.iter().for_each(logging::message);
    Ok(u8::from(!incomplete.is_empty()))
}

fn apply(name: &str) -> Result<u8, Failure> {
    let host = Host::of_this_user().map_err(failed)?;
    let upgrade =
        |control: &Path, file: &Path| upgrade::to_configuration(control, file).map_err(|error| error.to_string());
    let results = hotplug::apply(&host, name, upgrade).map_err(failed)?;
    let mut is_complete = results.incomplete.is_none();
    for (target, applied) in results.disks {
        let text = match applied {
            Applied::Unchanged => "unchanged".to_owned(),
            Applied::Upgraded => "has its new options".to_owned(),
            Applied::Left(why) => format!("left as it is: {why}"),
            Applied::Failed(why) => {
                is_complete = false;
                format!("failed: {why}")
            }
        };
        print(&format!("{}: {}\n", clean(&target), clean(&text)))?;
    }
    results.incomplete.iter().for_each(logging::message);
    Ok(u8::from(!is_complete))
}

fn status(name: &str, chosen: &Chosen, json: bool) -> Result<u8, Failure> {
    let xml = virsh::describe(name, false).map_err(failed)?;
    connection::check_local().map_err(failed)?;
    let (domain, described) = described(&xml)?;
    let state = virsh::run(&["domstate", "--domain", name], virsh::QUERY_TIMEOUT).map_err(failed)?;
    let listed = listing::find(&chosen.directories()).map_err(failed)?;
    let disks: Vec<Listed> = domain.disks.iter().map(|disk| in_list(&domain, disk, &listed)).collect();
    let states = listing::states(&disks);
    let rows: Vec<Value> = disks.iter().zip(&states).map(|(disk, state)| row(disk, state, &described)).collect();
    if json {
        let all =
            json!({"domain": domain.name, "state": state.trim(), "disks": rows, "other-disks": domain.other_targets});
        print(&json_page(&all))?;
        return Ok(0);
    }
    print(&format!("domain {}: {}\n", clean(&domain.name), clean(state.trim())))?;
    let cell = |row: &Value, key: &str| row[key].as_str().map_or("-".to_owned(), clean);
    let keys = ["target", "cache-mode", "guest-sees", "state", "image"];
    let cells: Vec<[String; 5]> = rows.iter().map(|row| keys.map(|key| cell(row, key))).collect();
    print(&table(&["TARGET", "MODE", "GUEST SEES", "STATE", "IMAGE"], &cells))?;
    if !domain.other_targets.is_empty() {
        print(&format!("not served by virtioblkd: {}\n", clean(&domain.other_targets.join(", "))))?;
    }
    Ok(0)
}

/// Returns the disk as `list` knows it, or one without a control socket if `list` does not know it.
fn in_list(domain: &Description, disk: &VhostUserDisk, listed: &[Listed]) -> Listed {
    let is_it = |found: &&Listed| {
        found.socket.as_deref() == Some(Path::new(&disk.socket))
            || found.target.as_deref() == Some(&disk.target)
                && found.domain.as_ref().is_some_and(|(_, uuid)| *uuid == domain.uuid)
    };
    let unknown = Listed { name: String::new(), domain: None, target: None, control: None, socket: None };
    Listed { target: Some(disk.target.clone()), ..listed.iter().find(is_it).cloned().unwrap_or(unknown) }
}

fn row(disk: &Listed, state: &State, described: &[DiskOptions]) -> Value {
    let target = disk.target.clone().unwrap_or_default();
    let options = described.iter().find(|described| described.target == target);
    let of_options = |keys: &[&str]| {
        let option = options.and_then(|disk| disk.options.iter().find(|(name, _)| keys.contains(&name.as_str())));
        option.map(|(_, value)| value.as_str())
    };
    json!({
        "target": target,
        "cache-mode": state.text(|disk| &disk.cache_mode).or(of_options(&["cache"])),
        "guest-sees": state.text(|disk| &disk.guest_sees),
        "state": if disk.control.is_none() { "not-running" } else { state.word },
        "image": state.text(|disk| &disk.image).or(of_options(&["blk-file", "rbd"])),
        "control": disk.control,
    })
}

fn check(name: &str, chosen: &Chosen, json: bool) -> Result<u8, Failure> {
    let xml = description(name, |name| connection::check_ours().and_then(|()| virsh::describe(name, true)))?;
    let host = Host::of_this_user().map_err(failed)?;
    let findings = check::findings(&xml, &Facts::of_this_host(&host, &chosen.directories(), &xml));
    let problems = findings.iter().filter(|found| found.grade == Grade::Problem).count();
    if json {
        let all: Vec<Value> = findings.iter().map(finding_json).collect();
        print(&json_page(&Value::from(all)))?;
    } else {
        let mut page: String = findings.iter().map(finding_text).collect();
        page += "what a guest sees in each mode:\n";
        page.extend(CacheMode::ALL.map(|mode| format!("  {:<14}{}\n", mode.name(), check::what_the_guest_sees(mode))));
        page += &match problems {
            0 => "no problem was found\n".to_owned(),
            1 => "1 problem\n".to_owned(),
            some => format!("{some} problems\n"),
        };
        print(&page)?;
    }
    Ok(u8::from(problems > 0))
}

fn grade(finding: &Finding) -> &'static str {
    match finding.grade {
        Grade::Problem => "problem",
        Grade::Note => "note",
    }
}

fn finding_json(finding: &Finding) -> Value {
    json!({"grade": grade(finding), "about": finding.about, "what": finding.what, "fix": finding.fix})
}

fn finding_text(finding: &Finding) -> String {
    let (grade, about, what) = (grade(finding), clean(&finding.about), clean(&finding.what));
    let fix = if finding.fix.is_empty() { String::new() } else { format!("{:10}fix: {}\n", "", clean(&finding.fix)) };
    format!("{grade:<10}{about}: {what}\n{fix}")
}

fn convert(options: &Convert) -> Result<u8, Failure> {
    // The converted disk has the path of a socket of this host and this user.
    if !options.back && (options.define || !is_file(&options.name)) {
        connection::check_ours().map_err(failed)?;
    }
    let notes = match (options.define, is_file(&options.name)) {
        (true, false) => {
            let places = Places::of_this_user().map_err(failed)?;
            let change = |xml: &str| converted(options, xml).map(|Converted { xml, notes }| (xml, notes));
            redefine(&places, &options.name, change).map_err(failed)?
        }
        (define, _) => {
            let xml = description(&options.name, virsh::describe_whole)?;
            let Converted { xml, notes } = converted(options, &xml).map_err(failed)?;
            if define { virsh::define(&xml).map_err(failed) } else { print_xml(&xml) }?;
            notes
        }
    };
    if options.define {
        report_definition(options);
    }
    notes.iter().for_each(logging::message);
    Ok(0)
}

fn converted(options: &Convert, xml: &str) -> Result<Converted, String> {
    if options.back {
        return convert::to_qemu(xml, &options.target).map_err(|error| error.to_string());
    }
    let places = Places::of_this_user()?;
    let cache = options.cache.map(|mode| mode.name());
    convert::to_vhost_user(xml, &options.target, cache, &places.sockets).map_err(|error| error.to_string())
}

/// Prints the XML unchanged, because libvirt reads it.
fn print_xml(xml: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let printed = out.write_all(xml.as_bytes()).and_then(|()| out.flush());
    printed.map_err(|error| Failure::new(crate::OUTPUT, format!("cannot print: {error}")))
}

fn report_definition(options: &Convert) {
    logging::message(format!("converted the disk {} of {}", options.target, options.name));
    let state = virsh::run(&["domstate", "--domain", &options.name], virsh::QUERY_TIMEOUT).unwrap_or_default();
    if !matches!(state.trim(), "" | "shut off") {
        logging::message("the domain runs: the disk is converted at its next start");
    }
}
