//! The front-end: keeps every queue full and counts the completed requests.

use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};

use super::case::{Blocks, Case, Pattern};
use super::histogram::Histogram;
use super::server::Running;
use kit::driver::{ALL, Driver};

/// Where the client runs, and how it waits.
#[derive(Clone, Copy, PartialEq)]
pub enum Client {
    Same,
    Poll,
    Free,
}

impl Client {
    pub fn named(name: &str) -> Client {
        match name {
            "same" => Client::Same,
            "poll" => Client::Poll,
            "free" => Client::Free,
            other => panic!("--client {other}: same, poll or free"),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Client::Same => "and server share a CPU",
            Client::Poll => "polls on its own CPU",
            Client::Free => "sleeps, anywhere",
        }
    }
}

/// The result of one measurement.
pub struct Figures {
    pub per_second: f64,
    /// The server's processor time (user and system) for each request, in microseconds.
    pub cpu_us: f64,
    /// The time from a request to its completion (write + flush: to the completion of the flush), in microseconds: the median,
    /// and the time that one request in a hundred exceeds.
    pub latency_us: f64,
    pub p99_us: f64,
}

impl Figures {
    /// Computes the result from the server's `cpu_seconds` and the times of all requests that were completed in `seconds`.
    pub fn new(seconds: f64, cpu_seconds: f64, answered: u64, times: &Histogram) -> Figures {
        Figures {
            per_second: answered as f64 / seconds,
            cpu_us: cpu_seconds * 1e6 / answered as f64,
            latency_us: times.quantile(0.5),
            p99_us: times.quantile(0.99),
        }
    }
}

struct Load<'a> {
    driver: Driver,
    blocks: Blocks,
    case: &'a Case,
    /// For each slot: the write is completed, and its flush is in flight.
    flushing: Vec<bool>,
    /// For each slot: when its request was submitted.
    asked: Vec<Instant>,
    answered: u64,
    times: Histogram,
}

pub fn measure(running: &Running, case: &Case, client: Client, size: u64, seconds: f64) -> Figures {
    let slots = case.queues * case.depth;
    let descriptors = (case.depth * 4).next_power_of_two().max(128) as u16;
    let mut driver = Driver::connect_soon(&running.socket, case.queues, descriptors, slots.max(4) * case.block, ALL);
    check(&mut driver);
    place(client, running.pid());
    let blocks = Blocks::new(case, size);
    let asked = vec![Instant::now(); slots];
    let mut load =
        Load { driver, blocks, case, flushing: vec![false; slots], asked, answered: 0, times: Histogram::default() };
    load.start();
    let (start, length) = (Instant::now(), Duration::from_secs_f64(seconds));
    let before = running.cpu_seconds();
    while start.elapsed() < length {
        load.turn(client);
    }
    let (took, cpu) = (start.elapsed().as_secs_f64(), running.cpu_seconds() - before);
    Figures::new(took, cpu, load.answered, &load.times)
}

impl Load<'_> {
    fn start(&mut self) {
        for queue in 0..self.case.queues {
            let now = Instant::now();
            for slot in 0..self.case.depth {
                self.ask(queue, queue * self.case.depth + slot, now);
            }
            self.driver.kick(queue);
        }
    }

    fn ask(&mut self, queue: usize, slot: usize, now: Instant) {
        self.asked[slot] = now;
        let block = self.case.block;
        let (offset, at) = (self.blocks.next() * block as u64, slot * block);
        match self.case.pattern {
            Pattern::RandomRead | Pattern::SequentialRead => self.driver.read(queue, offset, at, block, slot as u64),
            Pattern::RandomWrite | Pattern::WriteFlush => self.driver.write(queue, offset, at, block, slot as u64),
        }
    }

    /// Takes completions and submits new requests.
    fn turn(&mut self, client: Client) {
        let mut any = false;
        for queue in 0..self.case.queues {
            // Only the wait on the last queue may sleep, and only if no other queue had a completion.
            let sleep = client != Client::Poll && !any && queue + 1 == self.case.queues;
            let done = if !sleep {
                self.driver.completed(queue)
            } else if self.case.queues == 1 {
                self.driver.wait(queue)
            } else {
                self.driver.wait_any(self.case.queues);
                self.driver.completed(queue)
            };
            any |= !done.is_empty();
            // The clock is read once for each batch: it is the end of the completed requests and the start of the next.
            let now = Instant::now();
            for &(slot, result) in &done {
                assert_eq!(result, 0, "an I/O error");
                self.answer(queue, slot as usize, now);
            }
            if !done.is_empty() {
                self.driver.kick(queue);
            }
        }
    }

    fn answer(&mut self, queue: usize, slot: usize, now: Instant) {
        if self.case.pattern == Pattern::WriteFlush && !self.flushing[slot] {
            self.flushing[slot] = true;
            return self.driver.flush(queue, slot as u64);
        }
        self.flushing[slot] = false;
        self.answered += 1;
        self.times.record(now - self.asked[slot]);
        self.ask(queue, slot, now);
    }
}

/// Checks that the server stores and returns data. This sends a flush, as every guest soon does: some caches write through
/// until the first flush, and that is not to be measured.
fn check(driver: &mut Driver) {
    let pattern: Vec<u8> = (0..4096).map(|at| (at * 7 + 3) as u8).collect();
    driver.fill(0, &pattern);
    assert_eq!(driver.one(0, |driver, id| driver.write(0, 8 * 4096, 0, 4096, id)), 0);
    assert_eq!(driver.one(0, |driver, id| driver.read(0, 8 * 4096, 4096, 4096, id)), 0);
    assert_eq!(driver.fetch(4096, 4096), pattern, "wrong data");
    assert_eq!(driver.one(0, |driver, id| driver.flush(0, id)), 0);
}

/// Pins the client's thread and every thread of the server to the CPUs of the measurement.
fn place(client: Client, server: u32) {
    let on = |cpus: &[usize]| {
        let mut set = CpuSet::new();
        cpus.iter().for_each(|&cpu| set.set(cpu));
        set
    };
    let everywhere = on(&(0..std::thread::available_parallelism().map_or(1, usize::from)).collect::<Vec<_>>());
    let (ours, theirs) = match client {
        Client::Same => (on(&[0]), on(&[0])),
        Client::Poll => (on(&[0]), on(&[1])),
        Client::Free => (everywhere, everywhere),
    };
    sched_setaffinity(None, &ours).expect("this CPU");
    for thread in std::fs::read_dir(format!("/proc/{server}/task")).expect("a running server") {
        let id = thread.ok().and_then(|entry| entry.file_name().to_str()?.parse().ok());
        let id = id.and_then(rustix::process::Pid::from_raw);
        // This fails for a thread that has ended meanwhile.
        let _ = sched_setaffinity(id, &theirs);
    }
}
