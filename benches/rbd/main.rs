//! Compares 4 KiB random reads and writes of a Ceph RBD image with fio's rbd engine and with qemu-storage-daemon's export of
//! the same image, in one run.
//!
//! `cargo bench --bench rbd -- [--seconds S] [--rounds N] [--size MiB] [--only TEXT] [--ours OPTIONS]`
//!
//! Method: the benchmark starts a cluster (`scripts/ceph-cluster`: one OSD in memory on the loopback) and disables librbd's
//! cache. The three are measured in turn (A B C A B C ...), the two servers with virtio-driver as the front-end; fio needs
//! none, so it measures librbd alone. The output has virtioblkd's requests per second (median over the rounds) with the
//! server's processor time for each request, and for each peer the median of the ratios of each round, with the smallest and
//! the largest. Only the ratios are meaningful.
//!
//! Then virtioblkd with `--cache unsafe` is compared with `--cache writeback` in the same way: it promises less, so it must
//! not be slower.

#[allow(dead_code)]
#[path = "../peers/case.rs"]
mod case;
#[allow(dead_code)]
#[path = "../peers/client.rs"]
mod client;
#[allow(dead_code)]
#[path = "../kit/histogram.rs"]
mod histogram;
#[allow(dead_code)]
#[path = "../peers/server.rs"]
mod server;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use case::{Case, Pattern};
use client::{Client, Figures};
use kit::ceph::{Cluster, Image, POOL};
use kit::guest;
use rustix::process::{Pid, Signal, kill_process};
use server::{Running, Server};

const MIB: u64 = 1 << 20;

const fn case(name: &'static str, pattern: Pattern, depth: usize) -> Case {
    Case { name, direct: true, pattern, block: 4096, queues: 1, depth }
}

const CASES: [Case; 6] = [
    case("randread q1", Pattern::RandomRead, 1),
    case("randread q16", Pattern::RandomRead, 16),
    case("randread q64", Pattern::RandomRead, 64),
    case("randwrite q1", Pattern::RandomWrite, 1),
    case("randwrite q16", Pattern::RandomWrite, 16),
    case("randwrite q64", Pattern::RandomWrite, 64),
];

/// The case that compares `unsafe` with `writeback`.
const UNSAFE_CASES: [Case; 6] = [
    case("unsafe randread q16", Pattern::RandomRead, 16),
    case("unsafe randwrite q1", Pattern::RandomWrite, 1),
    case("unsafe randwrite q16", Pattern::RandomWrite, 16),
    case("unsafe randwrite q64", Pattern::RandomWrite, 64),
    case("unsafe write+flush q1", Pattern::WriteFlush, 1),
    case("unsafe write+flush q16", Pattern::WriteFlush, 16),
];

struct Options {
    seconds: f64,
    rounds: usize,
    size: u64,
    only: String,
    /// Additional options of virtioblkd.
    ours: String,
}

/// The image under test, and its cluster.
struct Rig<'a> {
    image: Image<'a>,
    /// The cluster's configuration file with librbd's cache disabled, for which fio has no option.
    conf: PathBuf,
    dir: tempfile::TempDir,
}

fn main() {
    let options = parse(std::env::args().skip(1));
    server::require_qsd();
    let cluster = Cluster::start(&[]);
    let rig = prepare(&cluster, &options);
    println!(
        "{} rounds of {} s, {} MiB, one OSD in memory, client {}{}{}",
        options.rounds,
        options.seconds,
        options.size / MIB,
        Client::Free.name(),
        if options.ours.is_empty() { "" } else { ", virtioblkd " },
        options.ours,
    );
    for case in CASES.iter().filter(|case| case.name.contains(&options.only)) {
        compare(&rig, &options, case);
    }
    for case in UNSAFE_CASES.iter().filter(|case| case.name.contains(&options.only)) {
        compare_unsafe(&rig, &options, case);
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Options {
    let mut options = Options { seconds: 2.0, rounds: 5, size: 64 * MIB, only: String::new(), ours: String::new() };
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} needs a value"));
        match arg.as_str() {
            "--seconds" => options.seconds = value().parse().expect("seconds"),
            "--rounds" => options.rounds = value().parse().expect("a number of rounds"),
            "--size" => options.size = value().parse::<u64>().expect("MiB") * MIB,
            "--only" => options.only = value(),
            "--ours" => options.ours = value(),
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    options
}

/// Writes every block, so that no missing object is measured.
fn prepare<'a>(cluster: &'a Cluster, options: &Options) -> Rig<'a> {
    let dir = tempfile::tempdir().expect("a directory");
    let conf = dir.path().join("ceph.conf");
    let text = std::fs::read_to_string(cluster.conf()).expect("the cluster's configuration");
    std::fs::write(&conf, text.replace("[client]\n", "[client]\nrbd cache = false\n")).expect("a configuration");
    let spec = format!("{POOL}/bench");
    let mut import = cluster.rbd_command(&["import", "--no-progress", "-", &spec]);
    let mut import = import.stdin(Stdio::piped()).spawn().expect("rbd");
    let mut content = import.stdin.take().expect("piped");
    let chunk: Vec<u8> = (0..MIB).map(|at| (at * 31 + at / 512) as u8).collect();
    for _ in 0..options.size / MIB {
        content.write_all(&chunk).expect("rbd reads on");
    }
    drop(content);
    assert!(import.wait().expect("our own child").success(), "rbd import failed");
    Rig { image: Image { cluster, spec }, conf, dir }
}

fn compare(rig: &Rig, options: &Options, case: &Case) {
    let mut rounds = Vec::new();
    for _ in 0..options.rounds {
        let [ours, qsd] =
            [virtioblkd(rig, options, "none"), qemu_storage_daemon(rig)].map(|line| measure(rig, options, case, line));
        rounds.push((ours, qsd, fio(rig, case, options.seconds)));
    }
    let cost = median(rounds.iter().map(|(ours, ..)| ours.cpu_us));
    println!("{:<16} {:>9.0}/s ({cost:.1} us)", case.name, median(rounds.iter().map(|(ours, ..)| ours.per_second)));
    report("fio's rbd engine", rounds.iter().map(|(ours, _, fio)| ours.per_second / fio).collect());
    report("qemu-storage-daemon", rounds.iter().map(|(ours, qsd, _)| ours.per_second / qsd.per_second).collect());
    println!("      (its processor time: {:.1} us)", median(rounds.iter().map(|(_, qsd, _)| qsd.cpu_us)));
}

fn compare_unsafe(rig: &Rig, options: &Options, case: &Case) {
    let round = |_| ["unsafe", "writeback"].map(|mode| measure(rig, options, case, virtioblkd(rig, options, mode)));
    let rounds: Vec<[Figures; 2]> = (0..options.rounds).map(round).collect();
    let cost = median(rounds.iter().map(|[without, _]| without.cpu_us));
    println!(
        "{:<22} {:>9.0}/s ({cost:.1} us)",
        case.name,
        median(rounds.iter().map(|[without, _]| without.per_second))
    );
    report("writeback", rounds.iter().map(|[without, with]| without.per_second / with.per_second).collect());
    println!("      (its processor time: {:.1} us)", median(rounds.iter().map(|[_, with]| with.cpu_us)));
}

fn report(name: &str, ratios: Vec<f64>) {
    let (low, high) =
        (ratios.iter().copied().fold(f64::INFINITY, f64::min), ratios.iter().copied().fold(0.0, f64::max));
    println!("    / {name:<22} x{:.2} ({low:.2} .. {high:.2})", median(ratios.into_iter()));
}

/// Measures the server that this command line starts.
fn measure(rig: &Rig, options: &Options, case: &Case, line: String) -> Figures {
    let running = server::start(&Server::Other(line), Path::new(""), case, rig.dir.path());
    let figures = client::measure(&running, case, Client::Free, options.size, options.seconds);
    end(running);
    figures
}

/// Ends a server in order. The lock of a killed server on the image lasts for half a minute.
fn end(running: Running) {
    let pid = Pid::from_raw(running.pid() as i32).expect("a process");
    kill_process(pid, Signal::TERM).expect("our own child");
    let stat = format!("/proc/{}/stat", running.pid());
    // The process remains as a zombie until it is dropped.
    guest::wait_until("the server ends", || std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") Z ")));
}

fn virtioblkd(rig: &Rig, options: &Options, mode: &str) -> String {
    format!(
        "{} --socket-path {{socket}} --rbd {} --ceph-conf {} --cache {mode} --log-level error {}",
        env!("CARGO_BIN_EXE_virtioblkd"),
        rig.image.spec,
        rig.conf.display(),
        options.ours
    )
}

fn qemu_storage_daemon(rig: &Rig) -> String {
    format!(
        "qemu-storage-daemon --object iothread,id=io --blockdev \
         driver=rbd,node-name=f,pool={POOL},image={},conf={},cache.direct=on --export \
         type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={{socket}},writable=on,iothread=io",
        rig.image.name(),
        rig.conf.display()
    )
}

/// The requests per second that fio reports.
fn fio(rig: &Rig, case: &Case, seconds: f64) -> f64 {
    let (rw, group) = match case.pattern {
        Pattern::RandomRead => ("randread", "read"),
        _ => ("randwrite", "write"),
    };
    let output = Command::new("fio")
        .env("CEPH_CONF", &rig.conf)
        .args(["--name=bench", "--ioengine=rbd", "--clientname=admin", "--output-format=json", "--time_based"])
        .args([format!("--pool={POOL}"), format!("--rbdname={}", rig.image.name()), format!("--rw={rw}")])
        .args([format!("--bs={}", case.block), format!("--iodepth={}", case.depth), format!("--runtime={seconds}")])
        .current_dir(rig.dir.path())
        .output()
        .expect("fio");
    assert!(output.status.success(), "fio: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    // Ceph's libraries may print something before fio's output.
    let json = &text[text.find('{').expect("JSON")..];
    let report: serde_json::Value = serde_json::from_str(json).expect("JSON");
    report["jobs"][0][group]["iops"].as_f64().expect("a number")
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
