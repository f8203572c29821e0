//! Commands of virsh that libvirt refuses for a vhostuser disk, with virsh's names and output (tools/virsh-domain-monitor.c:
//! `cmdDomblkstat`, `cmdDomblkinfo`; tools/virsh-domain.c: `cmdBlockresize`), so that scripts go on working. `errs` and
//! `flush_operations` are there, too; the times are not, because the daemon does not measure them.

use std::path::Path;

use clap::Args;
use serde_json::{Map, Value, json};
use virtioblkd::disk::RingStatus;
use virtioblkd::internal::base::text::clean;
use virtioblkd::internal::control::client::{Client, Failure, REPLY_TIMEOUT};
use virtioblkd::internal::control::protocol::return_types::{Resized, Stats, Status};
use virtioblkd::internal::host::usage::{self, Usage};

use crate::chosen::{Chosen, target};
use crate::{json_page, parse, print};

#[derive(Args)]
pub(crate) struct Domblkstat {
    /// The domain's name or UUID
    domain: String,
    /// The disk: its target, such as vda, or its image [default: the sum of all]
    device: Option<String>,
    /// Print a more readable output
    #[arg(long)]
    human: bool,
}

#[derive(Args)]
#[command(override_usage = "virtioblkctl domblkinfo [--human] <DOMAIN> <DEVICE|--all>")]
pub(crate) struct Domblkinfo {
    /// The domain's name or UUID
    domain: String,
    /// The disk: its target, such as vda, or its image
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    device: Option<String>,
    /// Print sizes with units
    #[arg(long)]
    human: bool,
    /// Print all disks that virtioblkd serves
    #[arg(long)]
    all: bool,
}

#[derive(Args)]
#[command(override_usage = "virtioblkctl blockresize <DOMAIN> <PATH> <SIZE|--capacity>")]
pub(crate) struct Blockresize {
    /// The domain's name or UUID
    domain: String,
    /// The disk: its target, such as vda, or its image
    path: String,
    /// The new size in KiB, or with a unit: B, K, M, G, T (powers of 1024; KB, MB: of 1000)
    #[arg(value_parser = scaled, required_unless_present = "capacity", conflicts_with = "capacity")]
    size: Option<u64>,
    /// Take the size that the image has now
    #[arg(long)]
    capacity: bool,
}

/// A size as virsh takes it (`virScaleInteger`), in bytes.
fn scaled(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no size: give a number of KiB, or one with a unit, such as 20G");
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit = text[digits..].trim().to_ascii_lowercase();
    let scale = match unit.as_str() {
        "" => Some(1024),
        "b" | "byte" | "bytes" => Some(1),
        unit => {
            let (letter, rest) = unit.split_at_checked(1).ok_or_else(wrong)?;
            let power = "kmgtpe".find(letter).map(|at| at as u32 + 1);
            match (power, rest) {
                (Some(power), "" | "ib") => 1024u64.checked_pow(power),
                (Some(power), "b") => 1000u64.checked_pow(power),
                _ => None,
            }
        }
    };
    number.checked_mul(scale.ok_or_else(wrong)?).ok_or_else(wrong)
}

/// One disk of the domain, and its daemon's client.
pub(crate) struct Device {
    pub(crate) target: String,
    pub(crate) client: Client,
    pub(crate) status: Status,
}

/// The disks of the domain that virtioblkd serves; of them the one that `wanted` names by its target or its image.
pub(crate) fn devices(chosen: &Chosen, domain: &str, wanted: Option<&str>) -> Result<Vec<Device>, Failure> {
    let disks = chosen.of_domain(domain)?;
    let mut devices = Vec::new();
    for (name, control) in &disks.disks {
        let named = |failure: Failure| Failure::new(&failure.code, format!("{name}: {failure}"));
        let is_target = wanted == Some(target(name));
        if !is_target && wanted.is_some_and(|wanted| disks.disks.iter().any(|(other, _)| target(other) == wanted)) {
            continue;
        }
        let mut client = Client::connect(control).map_err(named)?;
        let status = client.query_status(REPLY_TIMEOUT).map_err(named)?;
        let has_image = |image: &str| status.disk.image_path.as_deref() == Some(image) || status.disk.image == image;
        if is_target || wanted.is_none_or(has_image) {
            devices.push(Device { target: target(name).to_owned(), client, status });
        }
    }
    match (devices.is_empty(), wanted) {
        (true, Some(wanted)) => Err(Failure::new(
            "no-daemon",
            format!("the domain {domain} has no disk '{wanted}' that virtioblkd serves; for others use virsh"),
        )),
        _ => Ok(devices),
    }
}

/// virsh's names of what the daemon counts, and its words for people, in its order.
fn figures(total: &RingStatus) -> [(&'static str, &'static str, u64); 6] {
    [
        ("rd_req", "number of read operations:", total.reads),
        ("rd_bytes", "number of bytes read:", total.read_bytes),
        ("wr_req", "number of write operations:", total.writes),
        ("wr_bytes", "number of bytes written:", total.written_bytes),
        ("errs", "error count:", total.errors),
        ("flush_operations", "number of flush operations:", total.flushes),
    ]
}

pub(crate) fn domblkstat(options: &Domblkstat, chosen: &Chosen, json: bool) -> Result<(), Failure> {
    let mut sums = figures(&RingStatus::default());
    for device in &mut devices(chosen, &options.domain, options.device.as_deref())? {
        let stats: Stats = parse(device.client.execute("query-stats", json!({}), REPLY_TIMEOUT)?)?;
        for (sum, figure) in sums.iter_mut().zip(figures(&stats.total)) {
            sum.2 = sum.2.wrapping_add(figure.2);
        }
    }
    if json {
        let all: Map<String, Value> = sums.iter().map(|(name, _, value)| ((*name).to_owned(), json!(value))).collect();
        return print(&json_page(&Value::Object(all)));
    }
    print(&stat_page(options.device.as_deref().unwrap_or_default(), &sums, options.human))
}

fn stat_page(device: &str, sums: &[(&str, &str, u64)], human: bool) -> String {
    let device = clean(device);
    match human {
        true => {
            let lines = sums.iter().map(|(_, words, value)| format!(" {words:<31} {value}\n"));
            format!("Device: {device}\n{}", lines.collect::<String>())
        }
        false => sums.iter().map(|(name, _, value)| format!("{device} {name} {value}\n")).collect(),
    }
}

/// What `domblkinfo` shows of a disk. `allocation`: `None` where it is not known.
struct Sizes {
    target: String,
    capacity: u64,
    allocation: Option<u64>,
    physical: u64,
}

impl Sizes {
    fn of(device: &Device) -> Self {
        let disk = &device.status.disk;
        let usage = disk.image_path.as_deref().and_then(|path| usage::of_file(Path::new(path)));
        // A device's blocks are all there.
        let is_path = disk.image_path.is_some();
        let other = Usage { allocation: disk.size, physical: disk.size };
        Sizes {
            target: device.target.clone(),
            capacity: disk.size,
            allocation: usage.or(is_path.then_some(other)).map(|usage| usage.allocation),
            physical: usage.unwrap_or(other).physical,
        }
    }

    fn cells(&self, human: bool) -> [String; 4] {
        let text = |value: u64| if human { capacity(value) } else { value.to_string() };
        let allocation = self.allocation.map_or("-".to_owned(), text);
        [clean(&self.target), text(self.capacity), allocation, text(self.physical)]
    }
}

/// As virsh's `vshPrettyCapacity`.
fn capacity(value: u64) -> String {
    let mut number = value as f64;
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    while number >= 1024.0 {
        let Some(next) = units.next() else { break };
        (number, unit) = (number / 1024.0, next);
    }
    format!("{number:.3} {unit}")
}

pub(crate) fn domblkinfo(options: &Domblkinfo, chosen: &Chosen, json: bool) -> Result<(), Failure> {
    let devices = devices(chosen, &options.domain, options.device.as_deref())?;
    let sizes: Vec<Sizes> = devices.iter().map(Sizes::of).collect();
    if json {
        let row = |one: &Sizes| {
            let row = json!({"capacity": one.capacity, "allocation": one.allocation, "physical": one.physical});
            (one.target.clone(), row)
        };
        return print(&json_page(&Value::Object(sizes.iter().map(row).collect())));
    }
    let rows: Vec<[String; 4]> = sizes.iter().map(|one| one.cells(options.human)).collect();
    print(&if options.all { table(&rows) } else { rows.iter().map(page).collect() })
}

fn page([_, capacity, allocation, physical]: &[String; 4]) -> String {
    format!("{:<15} {capacity}\n{:<15} {allocation}\n{:<15} {physical}\n", "Capacity:", "Allocation:", "Physical:")
}

/// As virsh's `vshTablePrint`.
fn table(rows: &[[String; 4]]) -> String {
    let head = ["Target", "Capacity", "Allocation", "Physical"].map(str::to_owned);
    let all = || std::iter::once(&head).chain(rows);
    let widths: [usize; 4] =
        std::array::from_fn(|column| all().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let line = |row: &[String; 4]| {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            let width = if column < 3 { width + 2 } else { 0 };
            line += &format!(" {cell:<width$}");
        }
        line + "\n"
    };
    let rule = "-".repeat(widths.iter().map(|width| width + 3).sum()) + "\n";
    line(&head) + &rule + &rows.iter().map(line).collect::<String>()
}

pub(crate) fn blockresize(options: &Blockresize, chosen: &Chosen, json: bool) -> Result<(), Failure> {
    let mut devices = devices(chosen, &options.domain, Some(&options.path))?;
    let [device] = devices.as_mut_slice() else {
        return Err(Failure::new(
            "no-daemon",
            format!("several disks have the image '{}': give a target", options.path),
        ));
    };
    let mut arguments = json!({"force": false});
    if let Some(size) = options.size {
        arguments["size"] = json!(size);
    }
    let reply = device.client.execute("resize", arguments, REPLY_TIMEOUT)?;
    if json {
        return print(&json_page(&reply));
    }
    let _: Resized = parse(reply)?;
    print(&format!("Block device '{}' is resized\n", clean(&options.path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_kib_unless_they_have_a_unit_of_virsh() {
        let cases = [
            ("20", 20 << 10),
            ("20G", 20 << 30),
            ("1GiB", 1 << 30),
            ("1 MB", 1_000_000),
            ("512B", 512),
            ("3k", 3 << 10),
        ];
        for (text, bytes) in cases {
            assert_eq!(scaled(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "1X", "1GX", "-1", "99999999999T", "1é", "é"] {
            assert!(scaled(text).unwrap_err().contains("no size"), "{text}");
        }
    }

    #[test]
    fn pages_are_those_of_virsh() {
        let sums = [("rd_req", "number of read operations:", 7)];
        assert_eq!(stat_page("vda", &sums, false), "vda rd_req 7\n");
        assert_eq!(stat_page("vda", &sums, true), "Device: vda\n number of read operations:      7\n");
        assert_eq!(stat_page("", &sums, false), " rd_req 7\n");
        let rows = [["vda", "1048576", "0", "1048576"].map(str::to_owned)];
        let expected = " Target   Capacity   Allocation   Physical\n\
                        --------------------------------------------\n \
                        vda      1048576    0            1048576\n";
        assert_eq!(table(&rows), expected);
        assert_eq!(page(&rows[0]), "Capacity:       1048576\nAllocation:     0\nPhysical:       1048576\n");
        assert_eq!((capacity(1 << 20), capacity(1000)), ("1.000 MiB".to_owned(), "1000.000 B".to_owned()));
    }
}
