//! Single-stepping a server (ptrace(2)), and the load on it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kit::driver::{ALL, Driver};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::case::{Case, Pattern};

const BLOCK: usize = 4096;
const IMAGE: u64 = 16 << 20;
/// What the server executes no more instructions for is over.
const QUIET: Duration = Duration::from_millis(100);

/// Instructions in user mode for one request of `case`, in `program`.
pub fn count(program: &Path, case: &Case, requests: u64, dir: &Path) -> f64 {
    let once = || {
        let socket = dir.join("vhost");
        let mut server = start(program, case, &socket, dir);
        let mut driver = Driver::connect_soon(&socket, 1, 128, case.depth * BLOCK, ALL);
        // Buffers are made, and what is learned of the medium is learned.
        load(&mut driver, case, 1024);
        let (steps, tracer) = step(&server);
        load(&mut driver, case, 2 * case.depth as u64);
        let mut counted = |requests| {
            let before = settled(&steps);
            let sent = load(&mut driver, case, requests);
            (settled(&steps) - before, sent)
        };
        // The difference is free of what happens once in each.
        let ((few, sent_few), (many, sent_many)) = (counted(requests), counted(3 * requests));
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

/// Has all threads of `server` execute one instruction at a time, until the server ends. Returns the number of instructions
/// so far, and the thread that does this.
fn step(server: &Child) -> (Arc<AtomicU64>, JoinHandle<()>) {
    let steps = Arc::new(AtomicU64::new(0));
    let (counter, pid) = (steps.clone(), server.id());
    let (attached, all_attached) = std::sync::mpsc::channel();
    // The thread that attaches is the one that may step.
    let tracer = std::thread::spawn(move || {
        for thread in std::fs::read_dir(format!("/proc/{pid}/task")).expect("a running server") {
            let name = thread.expect("a thread").file_name();
            let thread = Pid::from_raw(name.to_str().expect("a number").parse().expect("a number"));
            ptrace::seize(thread, ptrace::Options::PTRACE_O_TRACECLONE).expect("ptrace: our own child");
            ptrace::interrupt(thread).expect("it was attached to");
        }
        attached.send(()).expect("the other end waits");
        while !has_ended(pid, &counter) {}
    });
    all_attached.recv().expect("the tracer attaches");
    (steps, tracer)
}

/// Waits until a thread of the server has stopped, and has it execute its next instruction.
fn has_ended(server: u32, counter: &AtomicU64) -> bool {
    let (thread, signal) = match waitpid(None, Some(WaitPidFlag::__WALL)) {
        Ok(WaitStatus::Stopped(thread, Signal::SIGTRAP)) => {
            counter.fetch_add(1, Ordering::Relaxed);
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
fn settled(steps: &AtomicU64) -> u64 {
    let mut before = steps.load(Ordering::Relaxed);
    loop {
        std::thread::sleep(QUIET);
        let now = steps.load(Ordering::Relaxed);
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
