//! Runs fio in a Linux guest: the five cache modes, compared with QEMU's own virtio-blk and with qemu-storage-daemon in the
//! same modes.
//!
//! `cargo bench --bench guest -- [--dir DIR] [--rounds N] [--seconds S] [--out DIR]`; `make bench-guest` first installs
//! what it needs.
//!
//! Method: one guest with one CPU has fifteen disks, a server and an image of its own behind each, and one queue each.
//! First fio writes to every disk and reads back what it wrote. Then each case is run on one disk after the other, the
//! servers taking turns within a mode, and all of that several times; the table has medians. The peers get what is best
//! for them here: an iothread each, aio=native with O_DIRECT and aio=threads without. Writes guest.md and guest.svg.
//! Needs KVM: under TCG the emulation of the guest's own code takes most of the time and hides the differences.

mod plot;

use std::collections::HashMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kit::guest::qemu::{self, Qemu, Vm};
use kit::guest::{Server, accelerator, mortal, run};
use virtioblkd::engine::{CacheMode, CachePolicy};

const IMAGE: usize = 128 << 20;
/// The PCI slot of the first disk; the others follow.
const FIRST_SLOT: usize = 8;
/// If more of the processors' time than this is in use before the start, the host is not idle.
const BUSY: f64 = 0.05;

/// fio's options for each case, and the case's name.
const CASES: [(&str, &str, &str); 6] = [
    ("rr1", "4 KiB random read, depth 1", "rw=randread bs=4k iodepth=1"),
    ("rw1", "4 KiB random write, depth 1", "rw=randwrite bs=4k iodepth=1"),
    ("rr32", "4 KiB random read, depth 32", "rw=randread bs=4k iodepth=32"),
    ("rw32", "4 KiB random write, depth 32", "rw=randwrite bs=4k iodepth=32"),
    ("wf1", "4 KiB random write and fsync, depth 1", "rw=randwrite bs=4k iodepth=1 fsync=1"),
    ("sr8", "128 KiB sequential read, depth 8", "rw=read bs=128k iodepth=8"),
];

/// The server of a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Served {
    Virtioblkd,
    Qemu,
    Qsd,
}

const SERVERS: [(Served, &str); 3] =
    [(Served::Virtioblkd, "virtioblkd"), (Served::Qemu, "QEMU virtio-blk"), (Served::Qsd, "qemu-storage-daemon")];

struct Options {
    dir: PathBuf,
    rounds: usize,
    seconds: u64,
    out: PathBuf,
}

/// The result of one run of one case on one disk.
#[derive(Clone, Copy)]
struct Figures {
    per_second: f64,
    p99_us: f64,
}

/// The medians: by case, mode and server, in the order of the lists above.
type Results = Vec<Vec<Vec<Figures>>>;

fn main() {
    let options = parse(std::env::args().skip(1));
    if accelerator() != "kvm" {
        println!(
            "nothing was measured: guests run without KVM here (/dev/kvm is missing, or too slow to boot a kernel). QEMU \
             emulates the guest's own code then (TCG), which takes most of the time and hides the differences between \
             servers. Measure on a machine with KVM; `make bench` compares the servers here, without a guest"
        );
        return;
    }
    let scratch =
        tempfile::tempdir_in(&options.dir).unwrap_or_else(|error| panic!("{}: {error}", options.dir.display()));
    let used_before = processors_used();
    let (mut vm, servers) = boot(scratch.path(), &options);
    let kernel = vm.until_line("kernel ").pop().expect("the line itself");
    println!("the guest is up; its disks return what they are given");
    let mut found: HashMap<(String, usize), Vec<Figures>> = HashMap::new();
    for round in 1..=options.rounds {
        for (case, title, _) in CASES {
            println!("round {round} of {}: {title}", options.rounds);
            for line in vm.until_line(&format!("done {case}")) {
                if let Some((disk, figures)) = figures(&line) {
                    found.entry((case.to_owned(), disk)).or_default().push(figures);
                }
            }
        }
    }
    vm.finish();
    drop(servers);
    let results = medians(&found, options.rounds);
    let machine = machine(&kernel["kernel ".len()..], used_before, &options);
    fs::create_dir_all(&options.out).expect("a directory for the results");
    let (table, drawing) = (options.out.join("guest.md"), options.out.join("guest.svg"));
    let text = document(&machine, &results);
    print!("\n{text}");
    fs::write(&table, text).expect("room for the table");
    fs::write(&drawing, plot::draw(&panels(&results), &SERVERS.map(|(_, name)| name))).expect("room for the plot");
    println!("\nwritten: {} and {}", table.display(), drawing.display());
}

fn parse(mut args: impl Iterator<Item = String>) -> Options {
    let tmp = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let mut options = Options { dir: tmp.clone(), rounds: 3, seconds: 1, out: tmp };
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} needs a value"));
        match arg.as_str() {
            "--dir" => options.dir = value().into(),
            "--rounds" => options.rounds = value().parse().expect("a number of rounds"),
            "--seconds" => options.seconds = value().parse().expect("whole seconds"),
            "--out" => options.out = value().into(),
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    options
}

/// Starts the servers and the guest on their disks.
fn boot(dir: &Path, options: &Options) -> (Vm, Vec<Server>) {
    let mut qemu = Qemu::new(accelerator(), 768, 1);
    let mut servers = Vec::new();
    let content: Vec<u8> = (0..IMAGE).map(|at| (at * 31 + at / 512) as u8).collect();
    for (disk, (mode, (served, _))) in disks().enumerate() {
        let image = dir.join(format!("{disk}.img"));
        fs::write(&image, &content).expect("room for an image");
        fs::File::open(&image).and_then(|file| file.sync_all()).expect("it is stored");
        let address = format!(",num-queues=1,addr={:#x}", FIRST_SLOT + disk);
        qemu = match served {
            Served::Virtioblkd => {
                servers.push(Server::start(&image, mode, &["--log-level", "error"]));
                qemu.vhost_user_disk(&servers[servers.len() - 1].socket(), &address)
            }
            Served::Qsd => {
                servers.push(Server::start_as(|socket, _| qsd(socket, &image, mode)));
                // With config-wce, qemu-storage-daemon shows the guest a write-through cache, and the guest stops flushing.
                // That is right only in the modes that write through, so the option is disabled in the others.
                let told = if CachePolicy::from(mode).guest_sees_write_cache() { ",config-wce=off" } else { "" };
                qemu.vhost_user_disk(&servers[servers.len() - 1].socket(), &(address + told))
            }
            Served::Qemu => {
                let (id, aio) = (format!("own{disk}"), aio(mode));
                let drive = format!("if=none,id={id},format=raw,aio={aio},cache={mode},file={}", image.display());
                qemu.args(["-object", &format!("iothread,id=io{disk}"), "-drive", &drive, "-device"])
                    .args([format!("virtio-blk-pci,drive={id},iothread=io{disk}{address}")])
            }
        };
    }
    (qemu.linux(&job(options), "initramfs-full.cpio").start(), servers)
}

/// The disks in the order of their PCI slots: all servers in a mode, then the next mode.
fn disks() -> impl Iterator<Item = (CacheMode, (Served, &'static str))> {
    CacheMode::ALL.into_iter().flat_map(|mode| SERVERS.into_iter().map(move |server| (mode, server)))
}

fn aio(mode: CacheMode) -> &'static str {
    if CachePolicy::from(mode).opens_direct() { "native" } else { "threads" }
}

fn qsd(socket: &Path, image: &Path, mode: CacheMode) -> Command {
    let switch = |on: bool| if on { "on" } else { "off" };
    let direct = switch(CachePolicy::from(mode).opens_direct());
    let (no_flush, through) =
        (mode == CacheMode::Unsafe, matches!(mode, CacheMode::Directsync | CacheMode::Writethrough));
    let file = format!(
        "driver=file,node-name=f,filename={},aio={},cache.direct={direct},cache.no-flush={}",
        image.display(),
        aio(mode),
        switch(no_flush)
    );
    let export = format!(
        "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on,writethrough={},iothread=io",
        socket.display(),
        switch(through)
    );
    let mut command = mortal("qemu-storage-daemon");
    command.args(["--object", "iothread,id=io", "--blockdev", &file, "--export", &export]);
    command
}

/// The guest's script: it names the disks by their slots, checks them, and measures.
fn job(options: &Options) -> String {
    let disks = disks().count();
    // fio's default clock is the processor's counter, with which a run under TCG did not end.
    let jobs = |words: &str| {
        let mut text =
            format!("[global]\nioengine=libaio\ndirect=1\nclocksource=clock_gettime\n{}\n", words.replace(' ', "\n"));
        for disk in 0..disks {
            write!(text, "[{disk}]\nstonewall\nfilename=/dev/slot{}\n", FIRST_SLOT + disk).expect("a string");
        }
        text
    };
    let mut job = format!(
        "set -eo pipefail\n\
         while [ $(ls -d /sys/block/vd* | wc -l) -lt {disks} ]; do sleep 0.1; done\n\
         for disk in /sys/block/vd*; do\n\
         \tslot=$(readlink -f $disk/device)\n\
         \tslot=${{slot%.0/virtio*}}\n\
         \tln -s /dev/${{disk##*/}} /dev/slot$((0x${{slot##*:}}))\n\
         done\n"
    );
    let mut file =
        |name: &str, words: &str| writeln!(job, "cat >/tmp/{name} <<'END'\n{}END", jobs(words)).expect("a string");
    file("check", "rw=write bs=64k size=4m iodepth=4 verify=crc32c do_verify=1 verify_fatal=1");
    for (case, _, words) in CASES {
        file(case, &format!("{words} time_based=1 runtime={} norandommap=1", options.seconds));
    }
    job.push_str(
        "fio --eta=never --output=/tmp/checked /tmp/check || { cat /tmp/checked; exit 1; }\necho kernel $(uname -r)\n",
    );
    for _ in 0..options.rounds {
        for (case, _, _) in CASES {
            // fio prints a line for each disk; see "terse output" in fio(1).
            writeln!(job, "fio --eta=never --output-format=terse --terse-version=3 /tmp/{case}\necho done {case}")
                .expect("a string");
        }
    }
    job
}

/// Parses a line of fio's terse output, version 3. The job's name is the disk's number.
fn figures(line: &str) -> Option<(usize, Figures)> {
    let fields: Vec<&str> = line.split(';').collect();
    if fields.len() < 87 || fields[0] != "3" {
        return None;
    }
    assert_eq!(fields[4], "0", "fio had an error: {line}");
    // Reads and then writes have 41 fields each, the third of which is the rate.
    let (reads, writes) = (&fields[5..46], &fields[46..87]);
    let number = |text: &str| text.parse::<f64>().unwrap_or_else(|_| panic!("'{text}' is no number: {line}"));
    let side = if number(reads[2]) > 0.0 { reads } else { writes };
    let p99 = side.iter().find_map(|field| field.strip_prefix("99.000000%="));
    let p99_us = number(p99.unwrap_or_else(|| panic!("no 99th percentile: {line}")));
    Some((
        fields[2].parse().expect("the number that the job was named by"),
        Figures { per_second: number(side[2]), p99_us },
    ))
}

fn medians(found: &HashMap<(String, usize), Vec<Figures>>, rounds: usize) -> Results {
    let median = |values: &[Figures], pick: fn(&Figures) -> f64| {
        let mut values: Vec<f64> = values.iter().map(pick).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let one = |case: &str, disk: usize| {
        let values = found.get(&(case.to_owned(), disk)).map_or(&[][..], Vec::as_slice);
        assert_eq!(values.len(), rounds, "fio said too little of {case} on disk {disk}");
        Figures { per_second: median(values, |one| one.per_second), p99_us: median(values, |one| one.p99_us) }
    };
    let modes = |case| {
        (0..CacheMode::ALL.len())
            .map(|mode| (0..SERVERS.len()).map(|server| one(case, mode * SERVERS.len() + server)).collect())
            .collect()
    };
    CASES.iter().map(|(case, _, _)| modes(case)).collect()
}

/// The share of the processors' time that is in use, over two seconds (proc(5), /proc/stat).
fn processors_used() -> f64 {
    let read = || {
        let text = fs::read_to_string("/proc/stat").expect("/proc is mounted");
        let fields = text.lines().next().expect("a line of all processors").split_whitespace().skip(1);
        let times: Vec<f64> = fields.map(|field| field.parse().expect("a number")).collect();
        // These are the times of the idle task and of waits for I/O.
        (times.iter().sum::<f64>(), times[3] + times[4])
    };
    let before = read();
    std::thread::sleep(Duration::from_secs(2));
    let after = read();
    1.0 - (after.1 - before.1) / (after.0 - before.0)
}

fn machine(guest_kernel: &str, used_before: f64, options: &Options) -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").expect("/proc is mounted");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown", |rest| rest.trim_matches([' ', '\t', ':']));
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").expect("/proc is mounted");
    let filesystem = run(Command::new("df").arg("--output=fstype").arg(&options.dir));
    let filesystem = filesystem.lines().last().unwrap_or("unknown").trim();
    let (major, minor) = qemu::version();
    let verdict = if used_before > BUSY {
        "**The machine had other work: nothing here says who is faster.**"
    } else {
        "The machine was idle before."
    };
    format!(
        "{cpus} CPUs ({model}), host Linux {}, images on {filesystem}, QEMU {major}.{minor}, guest Linux {guest_kernel} \
         under KVM. In use of the host's processors before: {:.0} %. Medians of {} rounds of {} s. {verdict}",
        host.trim(),
        100.0 * used_before,
        options.rounds,
        options.seconds,
    )
}

fn document(machine: &str, results: &Results) -> String {
    let mut text = format!(
        "# fio in a guest\n\nRequests per second, in brackets the latency that one in a hundred exceeds. Made by \
         `make bench-guest`, whose method is at the head of `benches/guest/main.rs`. Ratios mean something, and only \
         within a line.\n\n{machine}\n\n![The same as bars](guest.svg)\n"
    );
    for ((_, title, _), modes) in CASES.iter().zip(results) {
        write!(text, "\n## {title}\n\n| mode |").expect("a string");
        SERVERS.iter().for_each(|(_, name)| write!(text, " {name} |").expect("a string"));
        text.push_str(" / QEMU | / qemu-storage-daemon |\n|---|---|---|---|---|---|\n");
        for (mode, servers) in CacheMode::ALL.iter().zip(modes) {
            write!(text, "| `{mode}` |").expect("a string");
            for one in servers {
                write!(text, " {:.0} ({:.0} us) |", one.per_second, one.p99_us).expect("a string");
            }
            let ratio = |peer: usize| servers[0].per_second / servers[peer].per_second;
            writeln!(text, " {:.2} | {:.2} |", ratio(1), ratio(2)).expect("a string");
        }
    }
    text
}

fn panels(results: &Results) -> Vec<plot::Panel> {
    let group = |(mode, servers): (&CacheMode, &Vec<Figures>)| plot::Group {
        name: mode.name(),
        values: servers.iter().map(|one| one.per_second).collect(),
    };
    let panel = |((_, title, _), modes): (&(&str, &'static str, &str), &Vec<Vec<Figures>>)| plot::Panel {
        title,
        groups: CacheMode::ALL.iter().zip(modes).map(group).collect(),
    };
    CASES.iter().zip(results).map(panel).collect()
}
