//! 4 KiB random reads and writes against qemu-storage-daemon's vhost-user-blk export, on the same file, in one run.
//!
//! `cargo bench --bench peers -- [--dir DIR] [--seconds S] [--rounds N] [--size MiB]`
//!
//! Method: both servers are given the same raw file, one after the other, in turn (A B A B ...), with virtio-driver as
//! the front-end: it sleeps on its call eventfd, as a guest does. Before a measurement each server stores and returns
//! a pattern. Printed: requests per second of both (medians over the rounds), and the median of the ratios pair by
//! pair, with the smallest and the largest. Only the ratios mean anything.

#[path = "../tests/driver/mod.rs"]
mod driver;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use driver::{ALL, Driver};

const BLOCK: usize = 4096;
const MIB: u64 = 1 << 20;

struct Options {
    dir: PathBuf,
    seconds: f64,
    rounds: usize,
    size: u64,
}

/// A server that is started for one measurement.
#[derive(Clone, Copy)]
enum Server {
    Virtioblkd,
    /// qemu-storage-daemon with this `aio=`.
    Qsd(&'static str),
}

struct Running {
    child: Child,
    socket: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Gone already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn main() {
    let options = parse(std::env::args().skip(1));
    let image = options.dir.join("virtioblkd-bench.img");
    prepare(&image, options.size);
    if Command::new("qemu-storage-daemon").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!(
            "qemu-storage-daemon is not installed: on Debian, apt-get install qemu-utils (or qemu-system-common)"
        );
        std::process::exit(1);
    }
    println!(
        "4 KiB random, {} MiB file in {}, {} rounds of {} s",
        options.size / MIB,
        options.dir.display(),
        options.rounds,
        options.seconds
    );
    println!("{:<28} {:>12} {:>12}   ratio (min .. max)", "case", "virtioblkd/s", "qsd/s");
    for (cache, peers) in [("none", &["native", "threads", "io_uring"][..]), ("writeback", &["threads", "io_uring"])] {
        for write in [false, true] {
            for depth in [1, 32] {
                for aio in peers {
                    compare(&options, &image, cache, aio, write, depth);
                }
            }
        }
    }
    std::fs::remove_file(&image).expect("the image of this run");
}

fn parse(mut args: impl Iterator<Item = String>) -> Options {
    let mut options = Options { dir: std::env::temp_dir(), seconds: 1.5, rounds: 5, size: 256 * MIB };
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} needs a value"));
        match arg.as_str() {
            "--dir" => options.dir = value().into(),
            "--seconds" => options.seconds = value().parse().expect("seconds"),
            "--rounds" => options.rounds = value().parse().expect("a number of rounds"),
            "--size" => options.size = value().parse::<u64>().expect("MiB") * MIB,
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    options
}

/// A file with every block written: no measurement of holes.
fn prepare(image: &Path, size: u64) {
    use std::io::Write;
    let mut file = std::fs::File::create(image).expect("the image");
    let chunk: Vec<u8> = (0..MIB).map(|at| (at * 31 + at / 512) as u8).collect();
    for _ in 0..size / MIB {
        file.write_all(&chunk).expect("space for the image");
    }
    file.sync_all().expect("the image on disk");
}

fn compare(options: &Options, image: &Path, cache: &str, aio: &'static str, write: bool, depth: usize) {
    let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        let a = measure(options, image, Server::Virtioblkd, cache, write, depth);
        let b = measure(options, image, Server::Qsd(aio), cache, write, depth);
        ours.push(a);
        theirs.push(b);
        ratios.push(a / b);
    }
    let verb = if write { "write" } else { "read" };
    let case = format!("{verb} {cache} depth {depth} / {aio}");
    let (low, high) = (min(&ratios), max(&ratios));
    let (ours, theirs, ratio) = (median(ours), median(theirs), median(ratios));
    println!("{case:<28} {ours:>12.0} {theirs:>12.0}   x{ratio:.2} ({low:.2} .. {high:.2})");
}

fn measure(options: &Options, image: &Path, server: Server, cache: &str, write: bool, depth: usize) -> f64 {
    let running = start(server, image, cache, &options.dir);
    let mut driver = Driver::connect_soon(&running.socket, 1, 128, depth.max(16) * BLOCK, ALL);
    check(&mut driver);
    let blocks = options.size / BLOCK as u64;
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut ask = |driver: &mut Driver, slot: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let offset = random % blocks * BLOCK as u64;
        let at = slot as usize * BLOCK;
        if write { driver.write(0, offset, at, BLOCK, slot) } else { driver.read(0, offset, at, BLOCK, slot) }
    };
    for slot in 0..depth as u64 {
        ask(&mut driver, slot);
    }
    driver.kick(0);
    let (start, length) = (Instant::now(), Duration::from_secs_f64(options.seconds));
    let mut done = 0u64;
    while start.elapsed() < length {
        for (slot, result) in driver.wait(0) {
            assert_eq!(result, 0, "an I/O error");
            done += 1;
            ask(&mut driver, slot);
        }
        driver.kick(0);
    }
    done as f64 / start.elapsed().as_secs_f64()
}

/// The server stores and returns what it is given.
fn check(driver: &mut Driver) {
    let pattern: Vec<u8> = (0..BLOCK).map(|at| (at * 7 + 3) as u8).collect();
    driver.fill(0, &pattern);
    assert_eq!(driver.one(0, |driver, id| driver.write(0, 8 * BLOCK as u64, 0, BLOCK, id)), 0);
    assert_eq!(driver.one(0, |driver, id| driver.read(0, 8 * BLOCK as u64, BLOCK, BLOCK, id)), 0);
    assert_eq!(driver.fetch(BLOCK, BLOCK), pattern, "wrong data");
}

fn start(server: Server, image: &Path, cache: &str, dir: &Path) -> Running {
    let socket = dir.join(format!("virtioblkd-bench-{}.sock", std::process::id()));
    // Left over from a run that was killed.
    let _ = std::fs::remove_file(&socket);
    let mut command = match server {
        Server::Virtioblkd => {
            let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
            command.arg("--socket-path").arg(&socket).arg("--blk-file").arg(image).args(["--cache", cache]);
            command.args(["--log-level", "error"]);
            command
        }
        Server::Qsd(aio) => {
            let direct = if cache == "none" { "on" } else { "off" };
            let file = format!(
                "driver=file,node-name=f,filename={},aio={aio},cache.direct={direct},locking=off",
                image.display()
            );
            let export = format!(
                "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on,iothread=io",
                socket.display()
            );
            let mut command = Command::new("qemu-storage-daemon");
            command.args(["--object", "iothread,id=io", "--blockdev", &file, "--export", &export]);
            command
        }
    };
    let child = command.stdout(Stdio::null()).spawn().expect("the server");
    Running { child, socket }
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

fn median(values: Vec<f64>) -> f64 {
    let values = sorted(values);
    values[values.len() / 2]
}

fn min(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn max(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}
