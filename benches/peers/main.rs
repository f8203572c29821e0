//! Compares the requests per second with those of other vhost-user-blk servers, on the same file, in one run.
//!
//! `cargo bench --bench peers -- [--dir DIR] [--seconds S] [--rounds N] [--size MiB] [--only TEXT]
//!     [--client same|poll|free] [--ours OPTIONS] [--peer 'NAME=COMMAND LINE']...`
//!
//! Method: all servers serve the same raw file in turn (A B C A B C ...), with virtio-driver as the front-end. Before each
//! measurement the server stores and returns a pattern. The output has virtioblkd's requests per second (median over the
//! rounds), and for each peer the median of the ratios of each round, with the smallest and the largest; in brackets the
//! server's processor time (user and system) for each request; and the latency: the median of a request's time, and the time
//! that one in a hundred exceeds (medians over the rounds). Only ratios are meaningful, and latencies only in comparison.
//! The queue is always full, so at a depth above 1 a latency is mostly the wait for earlier requests.
//!
//! The client has three modes: with `same` it shares one CPU with the server and sleeps on its call eventfd (this measures
//! the length of the software path); with `poll` it polls its rings on a CPU of its own; with `free` it sleeps, and the
//! scheduler chooses its CPU.
//!
//! With `--ours '--poll-max-ns 32768'` virtioblkd's rings poll before they sleep, as the iothread of qemu-storage-daemon does
//! by default.
//!
//! A peer's command line may contain `{socket}`, `{image}` and `{direct}` (`on` or `off`). The bare kernel takes part as two
//! more peers: `call` makes one system call for each request, and `uring` uses a plain io_uring; neither has a virtqueue.

mod bare;
mod case;
mod client;
mod server;

#[path = "../kit/histogram.rs"]
mod histogram;

use std::path::{Path, PathBuf};

use case::{CASES, Case};
use client::{Client, Figures};
use server::Server;

const MIB: u64 = 1 << 20;

struct Options {
    dir: PathBuf,
    seconds: f64,
    rounds: usize,
    size: u64,
    only: String,
    client: Client,
    /// Additional options of virtioblkd.
    ours: String,
    peers: Vec<(String, String)>,
}

/// The servers that are measured.
enum Runner {
    Server(Server),
    Bare(bare::Way),
}

fn main() {
    let options = parse(std::env::args().skip(1));
    let image = options.dir.join(format!("virtioblkd-bench-{}.img", std::process::id()));
    prepare(&image, options.size);
    server::require_qsd();
    println!(
        "{} MiB file in {}, {} rounds of {} s, client {}{}{}",
        options.size / MIB,
        options.dir.display(),
        options.rounds,
        options.seconds,
        options.client.name(),
        if options.ours.is_empty() { "" } else { ", virtioblkd " },
        options.ours,
    );
    for case in CASES.iter().filter(|case| case.name.contains(&options.only)) {
        compare(&options, &image, case);
    }
    std::fs::remove_file(&image).expect("the image of this run");
}

fn parse(mut args: impl Iterator<Item = String>) -> Options {
    let mut options = Options {
        dir: std::env::temp_dir(),
        seconds: 1.0,
        rounds: 5,
        size: 256 * MIB,
        only: String::new(),
        client: Client::Same,
        ours: String::new(),
        peers: Vec::new(),
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} needs a value"));
        match arg.as_str() {
            "--dir" => options.dir = value().into(),
            "--seconds" => options.seconds = value().parse().expect("seconds"),
            "--rounds" => options.rounds = value().parse().expect("a number of rounds"),
            "--size" => options.size = value().parse::<u64>().expect("MiB") * MIB,
            "--only" => options.only = value(),
            "--client" => options.client = Client::named(&value()),
            "--ours" => options.ours = value(),
            "--peer" => {
                let peer = value();
                let (name, command) = peer.split_once('=').expect("--peer 'NAME=COMMAND LINE'");
                options.peers.push((name.into(), command.into()));
            }
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    options
}

/// Creates a file whose blocks are all written, so that no hole is measured.
fn prepare(image: &Path, size: u64) {
    use std::io::Write;
    let mut file = std::fs::File::create(image).expect("the image");
    let chunk: Vec<u8> = (0..MIB).map(|at| (at * 31 + at / 512) as u8).collect();
    for _ in 0..size / MIB {
        file.write_all(&chunk).expect("space for the image");
    }
    file.sync_all().expect("the image on disk");
}

fn compare(options: &Options, image: &Path, case: &Case) {
    let mut runners = vec![("virtioblkd".to_owned(), Runner::Server(Server::Virtioblkd(options.ours.clone())))];
    for aio in if case.direct { &["native", "threads", "io_uring"][..] } else { &["threads", "io_uring"] } {
        runners.push((format!("qsd-{aio}"), Runner::Server(Server::Qsd(aio))));
    }
    for (name, command) in &options.peers {
        runners.push((name.clone(), Runner::Server(Server::Other(command.clone()))));
    }
    // The bare kernel uses one thread, which is not comparable with four queues.
    if case.queues == 1 {
        runners.push(("call".into(), Runner::Bare(bare::Way::Call)));
        runners.push(("uring".into(), Runner::Bare(bare::Way::Uring)));
    }
    let mut figures: Vec<Vec<Figures>> = runners.iter().map(|_| Vec::new()).collect();
    for _ in 0..options.rounds {
        for ((_, runner), figures) in runners.iter().zip(&mut figures) {
            figures.push(match runner {
                Runner::Server(server) => {
                    let running = server::start(server, image, case, &options.dir);
                    client::measure(&running, case, options.client, options.size, options.seconds)
                }
                Runner::Bare(way) => bare::measure(*way, image, case, options.size, options.seconds),
            });
        }
    }
    let cost = |figures: &[Figures]| median(figures.iter().map(|figure| figure.cpu_us));
    let ours = median(figures[0].iter().map(|figure| figure.per_second));
    let latency = |figures: &[Figures]| {
        let (middle, p99) =
            (figures.iter().map(|figure| figure.latency_us), figures.iter().map(|figure| figure.p99_us));
        format!("latency {:>7.1} us, p99 {:>7.1} us", median(middle), median(p99))
    };
    let rate = format!("{ours:.0}/s");
    println!("{:<21} {rate:<21} ({:>5.1} us)  {}", case.name, cost(&figures[0]), latency(&figures[0]));
    for ((name, _), theirs) in runners.iter().zip(&figures).skip(1) {
        let ratios = || figures[0].iter().zip(theirs).map(|(ours, theirs)| ours.per_second / theirs.per_second);
        let (low, high) = (ratios().fold(f64::INFINITY, f64::min), ratios().fold(0.0, f64::max));
        let ratio = format!("x{:.2} ({low:.2} .. {high:.2})", median(ratios()));
        println!("    / {name:<15} {ratio:<21} ({:>5.1} us)  {}", cost(theirs), latency(theirs));
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
