//! Single-stepping a server (ptrace(2)), and the load on it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use kit::driver::{ALL, Driver};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::case::{Case, Pattern};
use super::functions::{self, Addresses, Mappings};

const BLOCK: usize = 4096;
const IMAGE: u64 = 16 << 20;
/// What the server executes no more instructions for is over.
const QUIET: Duration = Duration::from_millis(100);

/// What has been executed.
#[derive(Default)]
struct Steps {
    count: AtomicU64,
    /// Where, if that is asked for.
    addresses: Option<Mutex<Addresses>>,
}

impl Steps {
    /// The addresses since the last call.
    fn take_addresses(&self) -> Addresses {
        let addresses = self.addresses.as_ref().expect("--functions asks for them");
        std::mem::take(&mut addresses.lock().expect("no panic while held"))
    }
}

/// Prints how many instructions each function takes for one request of `case`, in `program`.
pub fn print_functions(program: &Path, case: &Case, requests: u64, dir: &Path) {
    let socket = dir.join("vhost");
    let mut server = start(program, case, &socket, dir);
    let mut driver = Driver::connect_soon(&socket, 1, 128, case.depth * BLOCK, ALL);
    load(&mut driver, case, 1024);
    let (steps, tracer) = step(&server, Steps { addresses: Some(Mutex::default()), ..Steps::default() });
    load(&mut driver, case, 2 * case.depth as u64);
    settled(&steps);
    steps.take_addresses();
    let sent = load(&mut driver, case, 3 * requests);
    settled(&steps);
    let (mappings, addresses) = (Mappings::of(server.id()), steps.take_addresses());
    server.kill().expect("our own child");
    tracer.join().expect("it ends with the server");
    let _ = server.wait();
    // Only now: the tracer waits for every child.
    mappings.print(&addresses, sent);
}

/// Instructions in user mode for one request of `case`, in `program`.
pub fn count(program: &Path, case: &Case, requests: u64, dir: &Path) -> f64 {
    let once = || {
        let socket = dir.join("vhost");
        let mut server = start(program, case, &socket, dir);
        let mut driver = Driver::connect_soon(&socket, 1, 128, case.depth * BLOCK, ALL);
        // Buffers are made, and what is learned of the medium is learned.
        load(&mut driver, case, 1024);
        let (steps, tracer) = step(&server, Steps::default());
        let threads = ring_threads(server.id());
        load(&mut driver, case, 2 * case.depth as u64);
        let mut counted = |requests| {
            let before = settled(&steps);
            let sent = load(&mut driver, case, requests);
            (settled(&steps) - before, sent)
        };
        // The difference is free of what happens once in each.
        let ((few, sent_few), (many, sent_many)) = (counted(requests), counted(3 * requests));
        assert_eq!(ring_threads(server.id()), threads, "another thread serves: the machine is too slow to count here");
        server.kill().expect("our own child");
        tracer.join().expect("it ends with the server");
        // The tracer has reaped it.
        let _ = server.wait();
        (many as f64 - few as f64) / (sent_many - sent_few) as f64
    };
    once().min(once())
}

fn start(program: &Path, case: &Case, socket: &Path, dir: &Path) -> Child {
    // Left by the server before, which was killed.
    let _ = std::fs::remove_file(socket);
    let mut command = Command::new(program);
    command.arg("--socket-path").arg(socket);
    command.args(["--sandbox", "off", "--log-level", "error"]).args(case.more);
    match case.cache {
        Some(cache) => command.args(["--cache", cache]).arg("--blk-file").arg(image(dir)),
        None => command.args(["--backend", &format!("null:{IMAGE}")]),
    };
    command.stdin(Stdio::null()).spawn().unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

/// An image of which every block is written, made for the first case.
fn image(dir: &Path) -> PathBuf {
    let image = dir.join("image");
    if !image.exists() {
        std::fs::write(&image, vec![1; IMAGE as usize]).expect("space for the image");
    }
    image
}

/// Has the threads of the server's virtqueue execute one instruction at a time, until the server ends. Returns what was
/// executed so far, beginning with `steps`, and the thread that does this.
fn step(server: &Child, steps: Steps) -> (Arc<Steps>, JoinHandle<()>) {
    let steps = Arc::new(steps);
    let (counter, pid) = (steps.clone(), server.id());
    let (attached, all_attached) = std::sync::mpsc::channel();
    // The thread that attaches is the one that may step.
    let tracer = std::thread::spawn(move || {
        for thread in ring_threads(pid) {
            ptrace::seize(thread, ptrace::Options::PTRACE_O_TRACECLONE).expect("ptrace: our own child");
            ptrace::interrupt(thread).expect("it was attached to");
        }
        attached.send(()).expect("the other end waits");
        while !has_ended(pid, &counter) {}
    });
    all_attached.recv().expect("the tracer attaches");
    (steps, tracer)
}

/// The threads that serve the virtqueue. Others run now and then, however many requests there are: what they do is no part
/// of a request.
fn ring_threads(server: u32) -> Vec<Pid> {
    let threads = std::fs::read_dir(format!("/proc/{server}/task")).expect("a running server");
    let paths = threads.map(|thread| thread.expect("a thread").path());
    let is_ring =
        |path: &PathBuf| std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name.starts_with("ring"));
    let number = |path: PathBuf| path.file_name()?.to_str()?.parse().ok();
    paths.filter(is_ring).map(|path| Pid::from_raw(number(path).expect("a number"))).collect()
}

/// Waits until a thread of the server has stopped, and has it execute its next instruction.
fn has_ended(server: u32, steps: &Steps) -> bool {
    let (thread, signal) = match waitpid(None, Some(WaitPidFlag::__WALL)) {
        Ok(WaitStatus::Stopped(thread, Signal::SIGTRAP)) => {
            steps.count.fetch_add(1, Ordering::Relaxed);
            if let (Some(addresses), Some(address)) = (&steps.addresses, functions::program_counter(thread)) {
                *addresses.lock().expect("no panic while held").entry(address).or_default() += 1;
            }
            (thread, None)
        }
        Ok(WaitStatus::Stopped(thread, signal)) => (thread, Some(signal)),
        Ok(WaitStatus::PtraceEvent(thread, ..)) => (thread, None),
        Ok(WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, ..)) => {
            return thread.as_raw() as u32 == server;
        }
        Ok(_) => return false,
        Err(_) => return true,
    };
    // A thread that was killed meanwhile is reaped by the next call.
    let _ = ptrace::step(thread, signal);
    false
}

/// The number of instructions when no thread executes any for a while.
fn settled(steps: &Steps) -> u64 {
    let mut before = steps.count.load(Ordering::Relaxed);
    loop {
        std::thread::sleep(QUIET);
        let now = steps.count.load(Ordering::Relaxed);
        if now == before {
            return now;
        }
        before = now;
    }
}

/// Sends at least `requests`, and returns how many there were.
fn load(driver: &mut Driver, case: &Case, requests: u64) -> u64 {
    let mut sent = 0;
    while sent < requests {
        for slot in 0..case.depth {
            // An odd step visits all blocks, and neighbours are not merged.
            let offset = (sent * 37 % (IMAGE / BLOCK as u64)) * BLOCK as u64;
            match case.pattern {
                Pattern::Read => driver.read(0, offset, slot * BLOCK, BLOCK, sent),
                Pattern::Write | Pattern::WriteFlush => driver.write(0, offset, slot * BLOCK, BLOCK, sent),
            }
            sent += 1;
        }
        take_all(driver, case.depth);
        if case.pattern == Pattern::WriteFlush {
            driver.flush(0, sent);
            sent += 1;
            take_all(driver, 1);
        }
    }
    sent
}

fn take_all(driver: &mut Driver, mut missing: usize) {
    driver.kick(0);
    while missing > 0 {
        for (_, result) in driver.wait(0) {
            assert_eq!(result, 0, "an I/O error");
            missing -= 1;
        }
    }
}
