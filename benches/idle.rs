//! Measures what an idle daemon costs, and how soon it serves the first request.
//!
//! `cargo bench --bench idle -- [--dir DIR] [--seconds S] [--starts N]`
//!
//! Method: the real program in its sandbox, with a control socket, serves a file in DIR (default: the system's temporary
//! directory). *first request* is the time from the moment before exec until a read is completed for a front-end that waits
//! for the socket without sleeping (N starts, default 20; in turn with `qemu-storage-daemon` with an iothread). The other
//! figures are read from /proc: without a front-end, with one that uses one ring, and after a load on that ring. Processor
//! time is the scheduler's own count over S seconds (default 10). Resident memory is shown in two parts: the daemon's own
//! memory, and pages of the program's and the libraries' files, which all daemons of a host share.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kit::driver::{ALL, Driver};
use kit::guest;
use kit::guest::Server;
use virtioblkd::engine::CacheMode;

struct Options {
    dir: PathBuf,
    seconds: f64,
    starts: usize,
}

fn main() {
    let options = parse(std::env::args().skip(1));
    let dir = tempfile::tempdir_in(&options.dir).unwrap_or_else(|error| panic!("{}: {error}", options.dir.display()));
    let image = dir.path().join("disk.img");
    fs::write(&image, vec![1u8; 64 << 20]).expect("an image");
    fs::File::open(&image).and_then(|file| file.sync_all()).expect("it is stored");
    first_request(&image, dir.path(), options.starts);
    println!(
        "\n{:<52} {:>8} {:>8} {:>8} {:>8} {:>6} {:>8}",
        "idle", "RSS KiB", "own", "files", "threads", "fds", "CPU"
    );
    for mode in [CacheMode::None, CacheMode::Writeback] {
        for queues in [1, 64, 256] {
            measure(&image, mode, queues, options.seconds);
        }
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Options {
    let mut options = Options { dir: std::env::temp_dir(), seconds: 10.0, starts: 20 };
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} needs a value"));
        match arg.as_str() {
            "--dir" => options.dir = value().into(),
            "--seconds" => options.seconds = value().parse().expect("seconds"),
            "--starts" => options.starts = value().parse().expect("a number of starts"),
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    options
}

/// A process that is killed when dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // This fails if the process has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn first_request(image: &Path, dir: &Path, starts: usize) {
    let socket = dir.join("s");
    let ours = |sandbox: &str| {
        let mut command = Command::new(guest::server::program("virtioblkd"));
        command.arg("--socket-path").arg(&socket).arg("--control-path").arg(dir.join("c"));
        command.arg("--blk-file").arg(image).args(["--sandbox", sandbox, "--log-level", "error"]);
        command
    };
    let qsd = || {
        let mut command = Command::new("qemu-storage-daemon");
        let file =
            format!("driver=file,node-name=f,filename={},cache.direct=on,aio=native,locking=off", image.display());
        let export = "type=vhost-user-blk,id=e,node-name=f,writable=on,iothread=io,addr.type=unix,addr.path=";
        command.args(["--object", "iothread,id=io", "--blockdev", &file, "--export"]);
        command.arg(format!("{export}{}", socket.display()));
        command
    };
    let mut times: [Vec<f64>; 3] = Default::default();
    for _ in 0..starts {
        times[0].push(once(ours("on"), &socket));
        times[1].push(once(ours("off"), &socket));
        times[2].push(once(qsd(), &socket));
    }
    println!("first request after exec, {starts} starts each");
    for (name, mut times) in ["virtioblkd", "virtioblkd --sandbox off", "qemu-storage-daemon"].into_iter().zip(times) {
        times.sort_by(f64::total_cmp);
        println!(
            "    {name:<26} median {:>7.2} ms, best {:>7.2}, worst {:>7.2}",
            times[times.len() / 2],
            times[0],
            times[times.len() - 1]
        );
    }
}

/// Starts the server and reads once. Returns the time from before exec to the completion of the read, in milliseconds.
fn once(mut command: Command, socket: &Path) -> f64 {
    // The previous server was killed, so its socket is left.
    let _ = fs::remove_file(socket);
    let begun = Instant::now();
    let child = command.stdout(Stdio::null()).spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut child = Killed(child);
    let mut driver = loop {
        match Driver::connect(socket, 1, 128, 4096, ALL) {
            Ok(driver) => break driver,
            Err(error) => {
                assert!(begun.elapsed() < Duration::from_secs(20), "{}: {error}", socket.display());
                let ended = child.0.try_wait().expect("our own child");
                assert!(ended.is_none(), "{command:?} ended: {ended:?}");
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    };
    assert_eq!(driver.one(0, |driver, id| driver.read(0, 0, 0, 4096, id)), 0);
    begun.elapsed().as_secs_f64() * 1e3
}

fn measure(image: &Path, mode: CacheMode, queues: usize, seconds: f64) {
    let server = Server::start(image, mode, &["--num-queues", &queues.to_string(), "--log-level", "error"]);
    let name = |what: &str| format!("{mode}, {queues} queues configured, {what}");
    Idle::over(server.pid(), seconds).print(&name("no front-end"));
    if queues > 1 {
        // The front-end may use all configured queues, and this one uses one.
        let _driver = Driver::connect_soon(&server.socket(), 1, 128, 4096, ALL);
        return Idle::over(server.pid(), 0.0).print(&name("one ring in use"));
    }
    let mut driver = Driver::connect_soon(&server.socket(), 1, 256, 64 * 4096, ALL);
    Idle::over(server.pid(), seconds).print(&name("one ring in use"));
    for round in 0..2000u64 {
        for slot in 0..64 {
            let offset = (round * 64 + slot) * 8191 % (16 << 10) * 4096;
            match slot % 2 {
                0 => driver.read(0, offset, slot as usize * 4096, 4096, slot),
                _ => driver.write(0, offset, slot as usize * 4096, 4096, slot),
            }
        }
        driver.kick(0);
        let mut answered = 0;
        while answered < 64 {
            let done = driver.wait(0);
            assert!(done.iter().all(|(_, result)| *result == 0), "an I/O error");
            answered += done.len();
        }
    }
    Idle::over(server.pid(), seconds).print(&name("after a load"));
}

/// The figures of a process in /proc.
struct Idle {
    rss: u64,
    own: u64,
    files: u64,
    threads: u64,
    descriptors: usize,
    /// Percent of one processor.
    busy: f64,
}

impl Idle {
    /// Measures the process over this time.
    fn over(pid: u32, seconds: f64) -> Idle {
        // By then the process has finished its last request.
        std::thread::sleep(Duration::from_millis(200));
        let (begun, before) = (Instant::now(), run_seconds(pid));
        std::thread::sleep(Duration::from_secs_f64(seconds.max(0.1)));
        let busy = (run_seconds(pid) - before) / begun.elapsed().as_secs_f64() * 100.0;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a running server");
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field of /proc/PID/status");
            line.split_whitespace().nth(0).and_then(|word| word.parse().ok()).expect("a number")
        };
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("a running server").count();
        Idle {
            rss: number("VmRSS:"),
            own: number("RssAnon:"),
            files: number("RssFile:") + number("RssShmem:"),
            threads: number("Threads:"),
            descriptors,
            busy,
        }
    }

    fn print(&self, name: &str) {
        println!(
            "{name:<52} {:>8} {:>8} {:>8} {:>8} {:>6} {:>7.3}%",
            self.rss, self.own, self.files, self.threads, self.descriptors, self.busy
        );
    }
}

/// The processor time of all threads of a process, by the scheduler's count.
fn run_seconds(pid: u32) -> f64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("a running server");
    let nanoseconds = threads.map(|thread| {
        let path = thread.expect("a thread").path().join("schedstat");
        let text = fs::read_to_string(path).expect("a kernel with schedstats");
        text.split(' ').next().and_then(|word| word.parse::<f64>().ok()).expect("a number")
    });
    nanoseconds.sum::<f64>() / 1e9
}
