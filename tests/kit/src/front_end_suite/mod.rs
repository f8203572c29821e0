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

use crate::driver::load::SIZE;
use crate::driver::{ALL, Driver};
use crate::prng::Prng;
use crate::wait::wait_until;

mod ends;
mod model;
mod requests;

pub use ends::*;
pub use model::*;
pub use requests::*;

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
            every_request_type_works_in_every_mode
            many_part_vectors_arrive_in_order
            as_many_queues_run_as_are_asked_for
            requests_at_depth_64_over_four_rings_match_a_model
            a_quiesce_under_load_changes_no_byte_until_its_resume
            a_daemon_told_to_end_under_load_keeps_everything_acknowledged
            a_held_daemon_told_to_end_writes_nothing_more
            a_killed_front_end_loses_nothing_acknowledged_and_the_next_is_served
            each_front_end_is_served_by_the_features_it_negotiated
            a_4096_byte_block_is_the_smallest_there_is
            a_read_only_disk_is_read_and_never_written
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
