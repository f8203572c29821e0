//! The front-end inside the guest: keeps a served disk busy at changing depth, and says each step to the host before it
//! takes the next.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::said::{Kind, SECTOR, Said, content};
use kit::driver::{ALL, Driver, F_FLUSH};
use kit::prng::Prng;

/// Where the host hands the front-end its [`Plan`].
pub const PLAN: &str = "VIRTIOBLKD_POWER_PLAN";
const SOCKET: &str = "/tmp/vhost";
const CONTROL: &str = "/tmp/control";
const QUEUES: usize = 2;
/// Most requests under way, and most sectors in one.
const DEPTH: usize = 16;
const LONGEST: u64 = 16;

/// What a front-end does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Of its choices.
    pub seed: u64,
    /// See [`content`].
    pub salt: u64,
    /// The part of the disk that it uses, from the start.
    pub sectors: u64,
    /// How many writes, write-zeroes, discards and flushes.
    pub requests: u64,
    /// It is a driver that can flush, and does.
    pub flushes: bool,
    /// How many times an operator quiesces the disk meanwhile.
    pub holds: u64,
    /// After each of these: a snapshot with this `--to`, where `N` stands for its number.
    pub copies: Option<String>,
}

/// The way to the host: a virtio-serial port. A step is in the host's record before `say` returns; the kernel does not
/// wait until somebody has read what is written to such a port, so the host answers.
#[derive(Clone)]
struct Port(Arc<Mutex<File>>);

impl Port {
    /// The only one that there is.
    fn open() -> Port {
        let mut names = fs::read_dir("/sys/class/virtio-ports").expect("virtio_console is loaded");
        let name = names.next().expect("a port").expect("its name").file_name();
        let file = File::options().read(true).write(true).open(Path::new("/dev").join(name)).expect("the host's port");
        Port(Arc::new(Mutex::new(file)))
    }

    fn say(&self, steps: &[Said]) {
        let lines: String = steps.iter().map(|step| format!("{step}\n")).collect();
        let mut port = self.0.lock().expect("no one panicked");
        port.write_all(lines.as_bytes()).expect("the host listens");
        port.read_exact(&mut vec![0; steps.len()]).expect("the host answers");
    }
}

enum Request {
    Change { number: u64, kind: Kind, start: u64, end: u64, slot: usize },
    Flush(u64),
}

struct Load {
    plan: Plan,
    prng: Prng,
    driver: Driver,
    port: Port,
    /// By queue.
    under_way: [Vec<Request>; QUEUES],
    busy: Vec<bool>,
    slots: Vec<usize>,
    depth: usize,
    made: u64,
    answered: Arc<AtomicU64>,
}

/// Runs the plan to its end.
pub fn run() {
    let plan = std::env::var(PLAN).unwrap_or_else(|_| panic!("${PLAN} is not set: see tests/guest/power/guest.sh"));
    let plan: Plan = serde_json::from_str(&plan).expect("a plan");
    // Not having acknowledged FLUSH is how a driver says that it cannot flush.
    let mask = if plan.flushes { ALL } else { ALL & !F_FLUSH };
    let driver = Driver::connect_soon(Path::new(SOCKET), QUEUES, 64, DEPTH * LONGEST as usize * SECTOR, mask);
    let port = Port::open();
    let answered = Arc::new(AtomicU64::new(0));
    let operator = operator(&plan, port.clone(), answered.clone());
    let mut load = Load {
        prng: Prng::new(plan.seed),
        driver,
        port: port.clone(),
        under_way: [vec![], vec![]],
        busy: vec![false; plan.sectors as usize],
        slots: (0..DEPTH).collect(),
        depth: 1,
        made: 0,
        answered,
        plan,
    };
    while load.made < load.plan.requests || load.under_way.iter().any(|queue| !queue.is_empty()) {
        load.send();
        load.take_answers();
    }
    operator.join().expect("the operator");
    port.say(&[Said::Ended]);
}

impl Load {
    /// Fills the queues to the depth of the moment.
    fn send(&mut self) {
        if self.prng.below(16) == 0 {
            self.depth = self.prng.one_of(&[1, 2, 4, 8, DEPTH]);
        }
        let room = self.depth.saturating_sub(self.under_way.iter().map(Vec::len).sum());
        let left = self.plan.requests - self.made;
        let requests: Vec<Request> = (0..left.min(room as u64)).filter_map(|_| self.make()).collect();
        let steps: Vec<Said> = requests
            .iter()
            .map(|request| match *request {
                Request::Change { number, kind, start, end, .. } => Said::Sent(number, kind, start..end),
                Request::Flush(number) => Said::FlushSent(number),
            })
            .collect();
        // Before the requests are in the ring: a server that polls takes them before we kick.
        self.port.say(&steps);
        for request in requests {
            let queue = self.prng.below(QUEUES as u64) as usize;
            self.put(queue, &request);
            self.under_way[queue].push(request);
        }
        (0..QUEUES).for_each(|queue| self.driver.kick(queue));
    }

    /// Thinks of a request. `None`: of one whose sectors are busy; a disk may do changes of one place in any order.
    fn make(&mut self) -> Option<Request> {
        // Mostly alone, but often enough behind another: a sync that runs must not answer for what came later.
        let flushing = self.under_way.iter().flatten().any(|request| matches!(request, Request::Flush(_)));
        if self.plan.flushes && self.prng.below(if flushing { 4 } else { 10 }) == 0 {
            self.made += 1;
            return Some(Request::Flush(self.made));
        }
        let start = self.prng.below(self.plan.sectors);
        let end = (start + 1 + self.prng.below(LONGEST)).min(self.plan.sectors);
        let sectors = start as usize..end as usize;
        if self.busy[sectors.clone()].contains(&true) {
            return None;
        }
        self.busy[sectors].fill(true);
        self.made += 1;
        let kind = match self.prng.below(16) {
            0 => Kind::Discard,
            1 | 2 => Kind::Zeroes,
            _ => Kind::Write,
        };
        let slot = self.slots.pop().expect("a slot for each request under way");
        Some(Request::Change { number: self.made, kind, start, end, slot })
    }

    fn put(&mut self, queue: usize, request: &Request) {
        let Request::Change { number, kind, start, end, slot } = *request else {
            let Request::Flush(number) = *request else { unreachable!("there are two kinds") };
            return self.driver.flush(queue, number);
        };
        let (offset, len) = (start * SECTOR as u64, (end - start) * SECTOR as u64);
        match kind {
            Kind::Discard => self.driver.discard(queue, offset, len, number),
            Kind::Zeroes => self.driver.write_zeroes(queue, offset, len, number % 2 == 0, number),
            Kind::Write => {
                let at = slot * LONGEST as usize * SECTOR;
                let bytes: Vec<u8> = (start..end).flat_map(|sector| content(self.plan.salt, sector, number)).collect();
                self.driver.fill(at, &bytes);
                self.driver.write(queue, offset, at, bytes.len(), number);
            }
        }
    }

    /// Waits for at least one answer, if any is due.
    fn take_answers(&mut self) {
        let mut steps = Vec::new();
        while steps.is_empty() && self.under_way.iter().any(|queue| !queue.is_empty()) {
            for queue in 0..QUEUES {
                for (number, result) in self.driver.completed(queue) {
                    steps.push(self.answer(queue, number, result));
                }
            }
            if steps.is_empty() {
                self.driver.wait_any(QUEUES);
            }
        }
        self.port.say(&steps);
        self.answered.fetch_add(steps.len() as u64, Ordering::SeqCst);
    }

    fn answer(&mut self, queue: usize, wanted: u64, result: i32) -> Said {
        let is_it = |request: &Request| match request {
            Request::Change { number, .. } | Request::Flush(number) => *number == wanted,
        };
        let at = self.under_way[queue].iter().position(is_it).expect("an answer to what was asked");
        assert_eq!(result, 0, "request {wanted} failed");
        match self.under_way[queue].swap_remove(at) {
            Request::Flush(number) => Said::FlushAcknowledged(number),
            Request::Change { number, start, end, slot, .. } => {
                self.busy[start as usize..end as usize].fill(false);
                self.slots.push(slot);
                Said::Acknowledged(number)
            }
        }
    }
}

/// A thread that quiesces the disk every so many answers, says so while it is held, and resumes it; then copies it.
fn operator(plan: &Plan, port: Port, answered: Arc<AtomicU64>) -> JoinHandle<()> {
    let (holds, every, copies) = (plan.holds, plan.requests / (plan.holds + 1), plan.copies.clone());
    std::thread::spawn(move || {
        for hold in 1..=holds {
            while answered.load(Ordering::SeqCst) < hold * every {
                std::thread::sleep(Duration::from_millis(1));
            }
            let token = virtioblkctl(&["--control", CONTROL, "quiesce"]);
            port.say(&[Said::Held]);
            virtioblkctl(&["--control", CONTROL, "resume", token.trim()]);
            if let Some(to) = &copies {
                let to = to.replace('N', &hold.to_string());
                virtioblkctl(&["snapshot", "--disk", CONTROL, "--level", "crash", "--to", &to]);
                port.say(&[Said::Copied(hold)]);
            }
        }
    })
}

fn virtioblkctl(arguments: &[&str]) -> String {
    let output = Command::new("virtioblkctl").args(arguments).output().expect("virtioblkctl runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "virtioblkctl {arguments:?}: {}\n{said}", output.status);
    String::from_utf8(output.stdout).expect("text")
}
