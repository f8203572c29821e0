//! The real program under virtio-driver (libblkio's), a front-end that nobody here wrote: every mode and request,
//! many queues, a model at depth, and what becomes of the data when somebody quiesces, leaves, is killed or is told to
//! end. The same tests for every kind of image: [`front_end_suite!`](crate::front_end_suite) makes
//! them.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::driver::load::{LOAD_QUEUES, Load, PAGE, PAGES, SIZE, holds, write_numbers};
use crate::driver::{ALL, Driver, F_FLUSH};
use crate::prng::Prng;
use crate::wait::wait_until;

/// An image full of zeroes, gone when dropped, and how it looks from outside.
pub trait Store {
    /// The daemon's options that name it.
    fn options(&self) -> Vec<OsString>;

    /// All of it, by another way than through the daemon.
    fn content(&self) -> Vec<u8>;

    /// A command that copies it to a file.
    fn copy_to(&self, file: &Path) -> Vec<OsString>;

    /// Others see what a mode that promises nothing has acknowledged, before any sync.
    fn shows_what_is_cached(&self) -> bool;
}

/// Makes an image of so many bytes, full of zeroes.
pub type NewStore = fn(u64) -> Box<dyn Store>;

/// The suite's tests, on the images of a [`NewStore`].
#[macro_export]
macro_rules! front_end_suite {
    ($new_store:path) => {
        $crate::front_end_suite!(
            $new_store:
            every_request_in_every_mode
            many_part_vectors_arrive_in_order
            as_many_queues_as_are_asked_for
            a_model_at_depth_64_over_four_rings
            a_quiesce_under_load_holds_the_image_still_and_lets_it_go_on
            a_daemon_told_to_end_under_load_keeps_everything_acknowledged
            a_held_daemon_told_to_end_writes_nothing_more
            a_front_end_killed_in_the_middle_leaves_everything_acknowledged_and_the_next_is_served
            one_front_end_after_another_whatever_they_negotiate
            a_4096_byte_block_is_the_smallest_there_is
            a_read_only_disk_is_read_and_nothing_else
        );

        #[test]
        #[ignore = "run by another test, in a process of its own that it kills"]
        fn the_victim() {
            $crate::front_end_suite::the_victim();
        }
    };
    ($new_store:path: $($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                $crate::front_end_suite::$name($new_store);
            }
        )*
    };
}

const MODES: [&str; 5] = ["none", "directsync", "writeback", "writethrough", "unsafe"];
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);
/// Minus EIO: what virtio-driver makes of VIRTIO_BLK_S_IOERR; and minus ENOTSUP, of VIRTIO_BLK_S_UNSUPP.
const EIO: i32 = -5;
const ENOTSUP: i32 = -95;

/// The program, serving an image of its own.
struct Served {
    child: Child,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    store: Box<dyn Store>,
    socket: PathBuf,
    control: PathBuf,
    _sockets: tempfile::TempDir,
}

impl Served {
    fn new(new_store: NewStore, options: &[&str]) -> Served {
        let store = new_store(SIZE as u64);
        // Socket paths are short.
        let sockets = tempfile::tempdir().unwrap();
        let (socket, control) = (sockets.path().join("s"), sockets.path().join("c"));
        let mut child = Command::new(crate::programs::virtioblkd())
            .args(options)
            .args(store.options())
            .args([Path::new("--socket-path"), &socket, Path::new("--control-path"), &control])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (lines, stderr) = (log.clone(), BufReader::new(child.stderr.take().unwrap()));
        let reader = std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                *lines.lock().unwrap() += &(line + "\n");
            }
        });
        let served = Served { child, log, reader: Some(reader), store, socket, control, _sockets: sockets };
        served.wait_for("serving on");
        served
    }

    fn wait_for(&self, text: &str) {
        let end = Instant::now() + WAIT_TIMEOUT;
        while !self.log.lock().unwrap().contains(text) {
            assert!(Instant::now() < end, "no '{text}' in the log: {}", self.log.lock().unwrap());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn connect(&self, queues: usize, size: u16, memory: usize) -> Driver {
        Driver::connect(&self.socket, queues, size, memory, ALL).unwrap()
    }

    /// Until the server has let the last one go.
    fn connect_again(&self, queues: usize, size: u16, memory: usize) -> Driver {
        Driver::connect_soon(&self.socket, queues, size, memory, ALL)
    }

    /// Runs virtioblkctl; it must succeed. What it printed.
    fn ctl(&self, args: &[&str]) -> String {
        let output =
            Command::new(crate::programs::virtioblkctl()).arg("--control").arg(&self.control).args(args).output();
        let output = output.unwrap();
        let log = self.log.lock().unwrap();
        assert!(output.status.success(), "{args:?}: {}\n{log}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.ctl(&["--json", "status"])).unwrap()
    }

    /// The figures of all rings when nothing is in flight. A request is in the guest's hands before it is counted out.
    fn total_at_rest(&self) -> serde_json::Value {
        let mut total = serde_json::Value::Null;
        wait_until("nothing is in flight", || {
            total = self.status()["total"].take();
            total["in-flight"] == 0
        });
        total
    }

    fn image(&self) -> Vec<u8> {
        self.store.content()
    }

    fn terminate(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }

    /// SIGTERM, the end, and the image afterwards.
    fn end(mut self) -> Vec<u8> {
        self.terminate();
        let status = self.child.wait().unwrap();
        self.reader.take().unwrap().join().unwrap();
        let log = self.log.lock().unwrap();
        assert!(status.success() && log.contains("drained and synced"), "{status}: {log}");
        assert!(!self.socket.exists() && !self.control.exists());
        self.image()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Ended already, in most tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    Prng::new(seed).bytes(len)
}

pub fn every_request_in_every_mode(new_store: NewStore) {
    for mode in MODES {
        let served = Served::new(new_store, &["--cache", mode]);
        let mut guest = served.connect(2, 128, 4 << 20);
        let mut model = vec![0; SIZE];
        // Offset in the image, position and length in memory: odd sizes, from addresses aligned to nothing.
        let shapes = [(0, 0, 512), (512, 1, 512), (4096, 4096, 4096), (10_240, 513, 1536), (65_024, 3, 66_048)];
        for (seed, (offset, at, len)) in (1u64..).zip(shapes.into_iter().chain([(1 << 20, 4095, 1 << 20)])) {
            let data = pattern(seed, len);
            guest.fill(at, &data);
            assert_eq!(guest.one(0, |guest, id| guest.write(0, offset as u64, at, len, id)), 0, "{mode} {offset}");
            model[offset..offset + len].copy_from_slice(&data);
            let to = (2 << 20) + at;
            guest.fill(to, &vec![0xee; len]);
            assert_eq!(guest.one(1, |guest, id| guest.read(1, offset as u64, to, len, id)), 0, "{mode} {offset}");
            assert!(guest.fetch(to, len) == data, "{mode}: {len} bytes at {offset} came back changed");
        }
        assert_eq!(guest.one(0, |guest, id| guest.flush(0, id)), 0, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write_zeroes(0, 4096, 8192, false, id)), 0, "{mode}");
        model[4096..4096 + 8192].fill(0);
        assert_eq!(guest.one(1, |guest, id| guest.write_zeroes(1, 512, 512, true, id)), 0, "{mode}");
        model[512..1024].fill(0);
        assert_eq!(guest.one(0, |guest, id| guest.discard(0, 2 << 20, 1 << 20, id)), 0, "{mode}");
        // Past the end, and half a sector.
        assert_eq!(guest.one(0, |guest, id| guest.read(0, SIZE as u64, 0, 512, id)), EIO, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write(0, SIZE as u64 - 512, 0, 1024, id)), EIO, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 0, 0, 100, id)), EIO, "{mode}");
        drop(guest);
        let image = served.end();
        assert!(image[..2 << 20] == model[..2 << 20], "{mode}: the image is not what was written");
    }
}

pub fn many_part_vectors_arrive_in_order(new_store: NewStore) {
    for mode in ["none", "writethrough"] {
        let served = Served::new(new_store, &["--cache", mode]);
        let mut guest = served.connect(1, 128, 1 << 20);
        // 126 parts is what a ring of 128 takes: whole sectors, then odd pieces that add up to sectors.
        for (round, piece) in [512usize, 513, 1, 1023].into_iter().enumerate() {
            let mut parts: Vec<(usize, usize)> = (0..126).map(|part| (part * 2048 + part % 7, piece)).collect();
            let total: usize = parts.iter().map(|part| part.1).sum();
            parts.last_mut().unwrap().1 += total.next_multiple_of(512) - total;
            let data = pattern(round as u64 + 7, total.next_multiple_of(512));
            let mut done = 0;
            for &(at, len) in &parts {
                guest.fill(at, &data[done..done + len]);
                done += len;
            }
            let offset = (round * (256 << 10)) as u64;
            assert_eq!(guest.one(0, |guest, id| guest.vectored(0, true, offset, &parts, id)), 0, "{mode} {piece}");
            for &(at, len) in &parts {
                guest.fill(at, &vec![0; len]);
            }
            assert_eq!(guest.one(0, |guest, id| guest.vectored(0, false, offset, &parts, id)), 0, "{mode} {piece}");
            let back: Vec<u8> = parts.iter().flat_map(|&(at, len)| guest.fetch(at, len)).collect();
            assert!(back == data, "{mode}: parts of {piece}");
            let offset = offset as usize;
            assert!(served.image()[offset..offset + data.len()] == data, "{mode}: parts of {piece} in the image");
        }
    }
}

pub fn as_many_queues_as_are_asked_for(new_store: NewStore) {
    let served = Served::new(new_store, &[]);
    for queues in [1, 16, 256] {
        let mut guest = served.connect_again(queues, 16, 256 * 512);
        for queue in 0..queues {
            guest.fill(queue * 512, &pattern((queues + queue) as u64, 512));
            guest.write(queue, (queue * 512) as u64, queue * 512, 512, queue as u64);
            guest.kick(queue);
        }
        for queue in 0..queues {
            assert_eq!(guest.wait(queue), [(queue as u64, 0)]);
        }
        let status = served.status();
        assert_eq!(status["rings"].as_array().unwrap().len(), queues, "a thread for each ring in use, and no more");
        let image = served.image();
        for queue in 0..queues {
            assert!(image[queue * 512..(queue + 1) * 512] == pattern((queues + queue) as u64, 512), "{queue}");
        }
    }
    // More than was allowed is refused, not served wrongly; and the next is served.
    let few = Served::new(new_store, &["--num-queues", "2"]);
    assert!(Driver::connect(&few.socket, 3, 16, 4096, ALL).is_err());
    let mut guest = few.connect_again(2, 16, 4096);
    assert_eq!(guest.one(1, |guest, id| guest.write(1, 0, 0, 512, id)), 0);
}

/// Requests in flight over several rings against a model, in sectors. Two that overlap are never in flight together.
struct Model {
    /// What each sector holds; `None`: discarded, so anything.
    sectors: Vec<Option<u64>>,
    busy: Vec<bool>,
    asked: Vec<Option<Asked>>,
}

#[derive(Clone)]
struct Asked {
    sectors: std::ops::Range<usize>,
    read_to: Option<usize>,
}

/// Bytes of memory that each request has, and the longest transfer.
const ROOM: usize = 40 << 10;
const LONGEST: usize = 64;

impl Model {
    fn send(&mut self, guest: &mut Driver, queue: usize, id: usize, prng: &mut Prng, tag: u64) -> bool {
        let start = prng.below(self.sectors.len() as u64) as usize;
        let end = (start + 1 + prng.below(LONGEST as u64) as usize).min(self.sectors.len());
        if self.busy[start..end].contains(&true) {
            return false;
        }
        let (offset, len) = ((start * 512) as u64, (end - start) * 512);
        let at = id * ROOM + (prng.below(3) * prng.below(512)) as usize;
        let mut read_to = None;
        match prng.below(10) {
            0..=4 => {
                guest.fill(at, &tag.to_le_bytes().repeat(len / 8));
                guest.write(queue, offset, at, len, id as u64);
                self.sectors[start..end].fill(Some(tag));
            }
            5..=7 => {
                guest.fill(at, &vec![0xee; len]);
                guest.read(queue, offset, at, len, id as u64);
                read_to = Some(at);
            }
            8 => {
                guest.write_zeroes(queue, offset, len as u64, tag.is_multiple_of(2), id as u64);
                self.sectors[start..end].fill(Some(0));
            }
            _ => {
                guest.discard(queue, offset, len as u64, id as u64);
                self.sectors[start..end].fill(None);
            }
        }
        self.busy[start..end].fill(true);
        self.asked[id] = Some(Asked { sectors: start..end, read_to });
        true
    }

    fn answered(&mut self, guest: &Driver, id: usize) {
        let asked = self.asked[id].take().expect("answered once");
        self.busy[asked.sectors.clone()].fill(false);
        if let Some(at) = asked.read_to {
            let bytes = guest.fetch(at, asked.sectors.len() * 512);
            self.check(&bytes, asked.sectors);
        }
    }

    fn check(&self, bytes: &[u8], sectors: std::ops::Range<usize>) {
        for (sector, found) in sectors.zip(bytes.chunks(512)) {
            if let Some(tag) = self.sectors[sector] {
                assert!(found == tag.to_le_bytes().repeat(64), "sector {sector} does not hold {tag:#x}");
            }
        }
    }
}

pub fn a_model_at_depth_64_over_four_rings(new_store: NewStore) {
    const QUEUES: usize = 4;
    const DEPTH: usize = 64;
    for (seed, mode) in (1u64..).zip(MODES) {
        let served = Served::new(new_store, &["--cache", mode]);
        let mut guest = served.connect(QUEUES, 256, QUEUES * DEPTH * ROOM);
        let sectors = SIZE / 512;
        let mut model =
            Model { sectors: vec![Some(0); sectors], busy: vec![false; sectors], asked: vec![None; QUEUES * DEPTH] };
        let mut prng = Prng::new(seed);
        let (mut sent, mut answered) = (0u64, 0u64);
        let end = Instant::now() + WAIT_TIMEOUT;
        while answered < 3000 {
            for queue in 0..QUEUES {
                for id in queue * DEPTH..(queue + 1) * DEPTH {
                    if sent < 3000
                        && model.asked[id].is_none()
                        && model.send(&mut guest, queue, id, &mut prng, sent + 1)
                    {
                        sent += 1;
                    }
                }
                guest.kick(queue);
                for (id, result) in guest.completed(queue) {
                    assert_eq!(result, 0, "{mode}, seed {seed}");
                    model.answered(&guest, id as usize);
                    answered += 1;
                }
            }
            assert!(Instant::now() < end, "{mode}: {answered} of {sent} were answered");
            std::thread::yield_now();
        }
        assert!(model.asked.iter().all(Option::is_none));
        let total = served.total_at_rest();
        let kinds = ["reads", "writes", "discards", "write-zeroes"];
        let counted: u64 = kinds.iter().map(|kind| total[kind].as_u64().unwrap()).sum();
        assert_eq!((counted, total["errors"].as_u64()), (3000, Some(0)));
        drop(guest);
        model.check(&served.end(), 0..sectors);
    }
}

pub fn a_quiesce_under_load_holds_the_image_still_and_lets_it_go_on(new_store: NewStore) {
    for mode in MODES {
        let served = Served::new(new_store, &["--cache", mode]);
        let load = Load::start(&served.socket);
        for round in 0..4 {
            load.wait_for(100);
            let token = served.ctl(&["quiesce", "--lease", "60s"]);
            let image = served.image();
            // What the driver has taken note of since is in there too: nothing was acknowledged while held.
            holds(&image, &load.acknowledged(), mode);
            std::thread::sleep(Duration::from_millis(30));
            assert!(served.image() == image, "{mode}: the image changed while it was held");
            // Sooner or later a write stands before each ring.
            let end = Instant::now() + WAIT_TIMEOUT;
            loop {
                let status = served.status();
                assert_eq!(status["quiesce"]["state"], "quiesced", "{mode}");
                if status["rings"].as_array().unwrap().iter().all(|ring| ring["held"] == true) {
                    break;
                }
                assert!(Instant::now() < end, "{mode}: {status}");
            }
            if round % 2 == 0 {
                served.ctl(&["resume", token.trim()]);
            } else {
                served.ctl(&["resume", "--all"]);
            }
        }
        // Held for as long as a command runs.
        let dir = crate::programs::disk_dir();
        let copy = dir.path().join("copy");
        load.wait_for(100);
        let before = load.acknowledged();
        let copying = served.store.copy_to(&copy);
        let copying = copying.iter().map(|word| word.to_str().unwrap());
        served.ctl(&["quiesce", "--"].into_iter().chain(copying).collect::<Vec<_>>());
        holds(&std::fs::read(&copy).unwrap(), &before, mode);
        load.wait_for(100);
        let acknowledged = load.stop();
        holds(&served.end(), &acknowledged, mode);
    }
}

pub fn a_daemon_told_to_end_under_load_keeps_everything_acknowledged(new_store: NewStore) {
    for mode in MODES {
        let served = Served::new(new_store, &["--cache", mode]);
        let load = Load::start(&served.socket);
        load.wait_for(300);
        let image = served.end();
        // The driver may have found acknowledgements only after the end.
        std::thread::sleep(Duration::from_millis(20));
        holds(&image, &load.stop(), mode);
    }
}

pub fn a_held_daemon_told_to_end_writes_nothing_more(new_store: NewStore) {
    for mode in MODES {
        let served = Served::new(new_store, &["--cache", mode]);
        let load = Load::start(&served.socket);
        load.wait_for(100);
        served.ctl(&["quiesce"]);
        let held = served.image();
        assert!(served.end() == held, "{mode}: a held write was carried out at the end");
        let acknowledged = load.stop();
        holds(&held, &acknowledged, mode);
    }
}

/// The front-end that [`a_front_end_killed_in_the_middle_leaves_everything_acknowledged_and_the_next_is_served`] kills.
pub fn the_victim() {
    let socket = std::env::var_os("VICTIMS_SOCKET").expect("run by another test");
    let mut guest = Driver::connect_soon(Path::new(&socket), LOAD_QUEUES, 64, SIZE, ALL);
    // One line an acknowledgement; the pipe's end ends us, too.
    write_numbers(&mut guest, || false, |page, number| println!("\nacknowledged {page} {number}"));
}

pub fn a_front_end_killed_in_the_middle_leaves_everything_acknowledged_and_the_next_is_served(new_store: NewStore) {
    for mode in MODES {
        let served = Served::new(new_store, &["--cache", mode]);
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["the_victim", "--ignored", "--nocapture"])
            .env("VICTIMS_SOCKET", &served.socket)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut acknowledged = vec![0; PAGES];
        let mut count = 0;
        for line in BufReader::new(victim.stdout.take().unwrap()).lines().map_while(Result::ok) {
            let mut words = line.split(' ');
            // A line that the kill cut short says too little, or names a smaller number, which is no less true.
            let (Some("acknowledged"), Some(Ok(page)), Some(Ok(number))) =
                (words.next(), words.next().map(str::parse::<usize>), words.next().map(str::parse::<u64>))
            else {
                continue;
            };
            acknowledged[page] = acknowledged[page].max(number);
            count += 1;
            if count == 500 {
                victim.kill().unwrap();
            }
        }
        assert!(!victim.wait().unwrap().success());
        assert!(count >= 500, "{mode}: the victim died by itself");
        served.wait_for("front-end disconnected");
        if mode != "unsafe" || served.store.shows_what_is_cached() {
            holds(&served.image(), &acknowledged, mode);
        }
        let mut guest = served.connect_again(1, 64, PAGE);
        assert_eq!(guest.one(0, |guest, id| guest.read(0, 0, 0, PAGE, id)), 0, "{mode}");
        served.total_at_rest();
        drop(guest);
        holds(&served.end(), &acknowledged, mode);
    }
}

pub fn one_front_end_after_another_whatever_they_negotiate(new_store: NewStore) {
    let served = Served::new(new_store, &[]);
    for round in 0..12u8 {
        let mask = if round % 2 == 0 { ALL } else { !F_FLUSH };
        let mut guest = Driver::connect_soon(&served.socket, 1 + usize::from(round % 3), 32, 8192, mask);
        guest.fill(0, &[round; 4096]);
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 4096, 0, 4096, id)), 0);
        let durable = served.ctl(&["status"]).contains("a write is acknowledged when durable");
        assert_eq!(durable, round % 2 == 1, "round {round}");
    }
    assert!(served.end()[4096..8192] == [11; 4096]);
}

pub fn a_4096_byte_block_is_the_smallest_there_is(new_store: NewStore) {
    for mode in MODES {
        let served = Served::new(new_store, &["--cache", mode, "--logical-block-size", "4096"]);
        let mut guest = served.connect(1, 64, 64 << 10);
        guest.fill(1, &[7; 8192]);
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 4096, 1, 8192, id)), 0, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 512, 1, 4096, id)), EIO, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 4096, 1, 512, id)), EIO, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write_zeroes(0, 4096, 4096, true, id)), 0, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write_zeroes(0, 512, 4096, true, id)), EIO, "{mode}");
        drop(guest);
        let image = served.end();
        assert!(image[..8192] == [0; 8192] && image[8192..12288] == [7; 4096] && image[12288] == 0, "{mode}");
    }
}

pub fn a_read_only_disk_is_read_and_nothing_else(new_store: NewStore) {
    for mode in MODES {
        let served = Served::new(new_store, &["--cache", mode, "--read-only"]);
        let mut guest = served.connect(1, 64, 8192);
        guest.fill(0, &[7; 4096]);
        assert_eq!(guest.one(0, |guest, id| guest.read(0, 0, 4096, 4096, id)), 0, "{mode}");
        assert_eq!(guest.fetch(4096, 4096), [0; 4096]);
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 0, 0, 4096, id)), EIO, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write_zeroes(0, 0, 4096, true, id)), ENOTSUP, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.discard(0, 0, 4096, id)), ENOTSUP, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.flush(0, id)), 0, "{mode}: there is nothing to sync, and it is");
        drop(guest);
        assert!(served.end().iter().all(|&byte| byte == 0), "{mode}");
    }
}
