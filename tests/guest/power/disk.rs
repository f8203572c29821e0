//! The disk below: a volatile cache of unlimited size behind NBD, and a record of what went in and out in one order,
//! which is the order of what the front-end said, too. One thread does all of it.
//!
//! What the record says of time is safe: a step stands after everything that made it happen, and before everything
//! that happens because of it, as the front-end waits until it stands there. An acknowledgement may stand later than
//! the guest had it, so a lie that is mended soon could pass; therefore every reply of the disk is late, at random.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::nbd::{self, Command};
use super::said::{SECTOR, Said};
use kit::guest::qemu::Qemu;
use kit::guest::wait_until;
use kit::prng::Prng;

/// One thing that happened. Numbers are NBD's cookies made unique.
pub enum Event {
    /// The cache has it; so may, from now on, the medium.
    Write { id: u64, first: u64, data: Data },
    /// The guest's kernel is told.
    WriteDone(u64),
    /// A flush arrived: it is about the writes that are done.
    Flush(u64),
    /// The guest's kernel is told that they are on the medium.
    FlushDone(u64),
    /// The front-end in the guest.
    Said(Said),
}

/// What a write brings.
pub enum Data {
    Bytes(Vec<u8>),
    /// So many sectors of zeroes.
    Zeroes(u64),
}

impl Data {
    /// In sectors.
    pub fn len(&self) -> u64 {
        match self {
            Data::Bytes(bytes) => (bytes.len() / SECTOR) as u64,
            Data::Zeroes(sectors) => *sectors,
        }
    }

    /// One of its sectors.
    pub fn sector(&self, at: u64) -> &[u8] {
        match self {
            Data::Bytes(bytes) => &bytes[at as usize * SECTOR..][..SECTOR],
            Data::Zeroes(_) => &[0; SECTOR],
        }
    }
}

/// A medium, and all that happened to its disk since.
pub struct Record {
    pub start: Vec<u8>,
    pub events: Vec<Event>,
}

/// The disk. Ends with the QEMU that uses it.
pub struct VolatileDisk {
    shared: Arc<Mutex<Shared>>,
    thread: Option<JoinHandle<()>>,
    dir: PathBuf,
}

struct Shared {
    /// What the guest reads: cache over medium.
    image: Vec<u8>,
    /// While a record is made.
    record: Option<Record>,
    ended: bool,
    under_way: usize,
}

impl Shared {
    fn note(&mut self, event: Event) {
        if let Some(record) = &mut self.record {
            record.events.push(event);
        }
    }
}

impl VolatileDisk {
    /// A disk of `size` bytes that listens in `dir`. `seed`: of its delays.
    pub fn start(dir: &Path, size: usize, seed: u64) -> VolatileDisk {
        let shared = Shared { image: vec![0; size], record: None, ended: false, under_way: 0 };
        let shared = Arc::new(Mutex::new(shared));
        let listeners = ["nbd", "said"].map(|name| UnixListener::bind(dir.join(name)).expect("a fresh directory"));
        let thread = {
            let shared = shared.clone();
            std::thread::spawn(move || {
                let [nbd, said] = listeners.map(|listener| listener.accept().expect("QEMU connects").0);
                Thread::new(nbd, said, shared, seed).run().expect("NBD as QEMU speaks it");
            })
        };
        VolatileDisk { shared, thread: Some(thread), dir: dir.to_owned() }
    }

    /// Plugs it in, and the front-end's port.
    pub fn plug_in(&self, qemu: Qemu) -> Qemu {
        let socket = |name: &str| self.dir.join(name).display().to_string();
        let disk = format!("driver=nbd,node-name=below,discard=unmap,server.type=unix,server.path={}", socket("nbd"));
        let port = format!("socket,id=said,path={}", socket("said"));
        qemu.args(["-chardev", &port, "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=said"]).args([
            "-blockdev",
            &disk,
            "-device",
            "virtio-blk-pci,drive=below",
        ])
    }

    /// Lets the cache settle, and begins a record.
    pub fn begin(&self) {
        wait_until("the disk is idle", || {
            let mut shared = self.shared.lock().expect("the disk's thread runs");
            let idle = shared.under_way == 0;
            if idle {
                shared.record = Some(Record { start: shared.image.clone(), events: Vec::new() });
                shared.ended = false;
            }
            idle
        });
    }

    /// Ends the record of a load whose server was ended in order.
    pub fn end(&self) -> Record {
        wait_until("the front-end's last word", || self.shared.lock().expect("the disk's thread runs").ended);
        let mut shared = self.shared.lock().expect("the disk's thread runs");
        shared.note(Event::Said(Said::Stopped));
        shared.record.take().expect("begun")
    }
}

impl Drop for VolatileDisk {
    fn drop(&mut self) {
        // A test that fails may have no QEMU, and then the thread waits for one.
        if !std::thread::panicking() {
            self.thread.take().expect("started").join().expect("the disk's thread");
        }
    }
}

/// A reply that is due, and what it means.
struct Due {
    at: Instant,
    cookie: u64,
    event: Event,
}

struct Thread {
    nbd: UnixStream,
    said: UnixStream,
    half_a_line: Vec<u8>,
    shared: Arc<Mutex<Shared>>,
    due: Vec<Due>,
    prng: Prng,
    last: u64,
}

impl Thread {
    fn new(nbd: UnixStream, said: UnixStream, shared: Arc<Mutex<Shared>>, seed: u64) -> Thread {
        Thread { nbd, said, half_a_line: Vec::new(), shared, due: Vec::new(), prng: Prng::new(seed), last: 0 }
    }

    fn run(mut self) -> io::Result<()> {
        let size = self.shared.lock().expect("no one panicked").image.len();
        if !nbd::handshake(&mut self.nbd, size as u64)? {
            return Ok(());
        }
        self.said.set_nonblocking(true)?;
        loop {
            let next = self.due.iter().map(|due| due.at).min();
            let timeout = next.map(|at| at.saturating_duration_since(Instant::now()));
            let timeout = timeout.map(|timeout| Timespec::try_from(timeout).expect("a short time"));
            let mut fds = [PollFd::new(&self.nbd, PollFlags::IN), PollFd::new(&self.said, PollFlags::IN)];
            poll(&mut fds, timeout.as_ref())?;
            let asked = !fds[0].revents().is_empty();
            self.listen()?;
            if asked && !self.take_request()? {
                return Ok(());
            }
            self.send_replies()?;
        }
    }

    fn listen(&mut self) -> io::Result<()> {
        let mut bytes = [0; 65536];
        loop {
            match self.said.read(&mut bytes) {
                // QEMU ends; its disk goes next.
                Ok(0) => return Ok(()),
                Ok(count) => self.half_a_line.extend(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        let whole = self.half_a_line.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let mut heard = Vec::new();
        {
            let mut shared = self.shared.lock().expect("no one panicked");
            for line in String::from_utf8_lossy(&self.half_a_line[..whole]).lines() {
                let said = Said::parse(line).ok_or_else(|| io::Error::other(format!("the guest said '{line}'")))?;
                shared.ended |= said == Said::Ended;
                shared.note(Event::Said(said));
                heard.push(b'.');
            }
        }
        self.said.write_all(&heard)?;
        self.half_a_line.drain(..whole);
        Ok(())
    }

    /// `false`: QEMU has gone.
    fn take_request(&mut self) -> io::Result<bool> {
        let request = match nbd::request(&mut self.nbd) {
            Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
                return Ok(false);
            }
            request => request?,
        };
        self.last += 1;
        let id = self.last;
        let late = self.delay(&request.command);
        let mut shared = self.shared.lock().expect("no one panicked");
        let event = match request.command {
            Command::Disconnect => return Ok(false),
            Command::Read { offset, len } => {
                let data = shared.image[offset as usize..][..len].to_vec();
                drop(shared);
                nbd::reply(&mut self.nbd, request.cookie, &data)?;
                return Ok(true);
            }
            Command::Write { offset, data } => {
                shared.image[offset as usize..][..data.len()].copy_from_slice(&data);
                shared.note(Event::Write { id, first: offset / SECTOR as u64, data: Data::Bytes(data) });
                Event::WriteDone(id)
            }
            Command::Zero { offset, len } => {
                shared.image[offset as usize..][..len].fill(0);
                let data = Data::Zeroes((len / SECTOR) as u64);
                shared.note(Event::Write { id, first: offset / SECTOR as u64, data });
                Event::WriteDone(id)
            }
            Command::Flush => {
                shared.note(Event::Flush(id));
                Event::FlushDone(id)
            }
        };
        shared.under_way += 1;
        let late = if shared.record.is_some() { late } else { Duration::ZERO };
        drop(shared);
        self.due.push(Due { at: Instant::now() + late, cookie: request.cookie, event });
        Ok(true)
    }

    /// Long beside the way of a word from the guest, and longer for a flush, so that much happens while one runs; now and
    /// then so long that many others overtake.
    fn delay(&mut self, command: &Command) -> Duration {
        let longest = match command {
            _ if self.prng.below(16) == 0 => 20_000,
            Command::Flush => 10_000,
            _ => 1500,
        };
        Duration::from_micros(self.prng.below(longest))
    }

    fn send_replies(&mut self) -> io::Result<()> {
        let now = Instant::now();
        while let Some(at) = self.due.iter().position(|due| due.at <= now) {
            let due = self.due.swap_remove(at);
            {
                let mut shared = self.shared.lock().expect("no one panicked");
                shared.under_way -= 1;
                shared.note(due.event);
            }
            nbd::reply(&mut self.nbd, due.cookie, &[])?;
        }
        Ok(())
    }
}
