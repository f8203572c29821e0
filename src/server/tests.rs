//! Tests of the daemon's end and of the change of front-ends, with disks that fail or are slow. Each test raises signals in
//! its own thread, which is the only one that blocks and reads them.

use std::io::{Read, Write};
use std::sync::Condvar;
use std::sync::Mutex;

use nix::sys::signal::raise;

use super::socket::FrontSocket;
use super::*;

/// A latch at which a call of the disk waits until the test opens it.
#[derive(Default)]
struct Latch {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Latch {
    fn opened() -> Self {
        Latch { open: Mutex::new(true), changed: Condvar::new() }
    }

    fn pass(&self) {
        let open = self.open.lock().unwrap();
        drop(self.changed.wait_while(open, |open| !*open).unwrap());
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

/// A disk that serves by reading until the front-end hangs up.
struct Disk {
    serve_returns: Latch,
    shutdown_returns: Latch,
    sync_returns: Latch,
    sync_fails: bool,
    /// The calls in their order.
    calls: Mutex<Vec<&'static str>>,
}

impl Disk {
    fn new() -> Self {
        Disk {
            serve_returns: Latch::opened(),
            shutdown_returns: Latch::opened(),
            sync_returns: Latch::opened(),
            sync_fails: false,
            calls: Mutex::default(),
        }
    }

    fn record(&self, call: &'static str) {
        self.calls.lock().unwrap().push(call);
    }

    fn wait_for(&self, call: &'static str) {
        while self.calls.lock().unwrap().last() != Some(&call) {
            thread::yield_now();
        }
    }
}

impl Served for Disk {
    fn serve(&self, mut stream: UnixStream) -> io::Result<SessionEnd> {
        self.record("serve");
        stream.read_to_end(&mut Vec::new())?;
        self.serve_returns.pass();
        self.record("left");
        Ok(SessionEnd::Left)
    }

    fn shutdown(&self) {
        self.shutdown_returns.pass();
        self.record("shutdown");
    }

    fn sync(&self) -> io::Result<()> {
        self.record("sync");
        self.sync_returns.pass();
        if self.sync_fails { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }

    fn describe(&self) -> String {
        "disk.img".to_string()
    }

    fn in_flight(&self) -> u64 {
        3
    }

    fn facts(&self) -> Option<DiskFacts> {
        None
    }

    fn sync_ahead(&self) -> io::Result<()> {
        unimplemented!("no test takes over")
    }

    fn hand_over(&self, _: Duration) -> Result<HandedOver, HandOverError> {
        unimplemented!("no test takes over")
    }

    fn take_over(&self) -> io::Result<()> {
        unimplemented!("no test takes over")
    }

    fn release_image(&self) {
        unimplemented!("no test takes over")
    }

    fn restore_session(&self, _: SavedSession, _: &Steps) -> io::Result<SessionEnd> {
        unimplemented!("no test takes over")
    }
}

fn server(disk: &Arc<Disk>) -> Server {
    let signals = Signals::block().unwrap();
    let requests = HandOverRequests::new().unwrap();
    Server {
        served: Arc::clone(disk) as Arc<dyn Served>,
        signals,
        quit: new_notifier().unwrap(),
        requests,
        end_signals: 0,
    }
}

/// Binds a socket in a temporary directory.
fn socket() -> (tempfile::TempDir, FrontSocket) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let socket = socket::prepare(&crate::config::Listen::Path { path, mode: 0o600, group: None }).unwrap().bind();
    (directory, socket.unwrap())
}

/// Starts a server and serves until `request_end` has effect.
fn assert_drains_then_syncs(request_end: impl FnOnce(&Server)) {
    let disk = Arc::new(Disk::new());
    let mut server = server(&disk);
    request_end(&server);
    let (_directory, socket) = socket();
    let mut front_ends = FrontEnds::new(Arc::clone(&server.served)).unwrap();
    let ending = server.serve(&DaemonFiles::of(socket), &mut front_ends).unwrap();
    assert!(matches!(ending, Ending::Requested));
    server.end().unwrap();
    assert_eq!(*disk.calls.lock().unwrap(), ["shutdown", "sync"]);
}

#[test]
fn a_signal_drains_then_syncs() {
    assert_drains_then_syncs(|_| raise(Signal::SIGTERM).unwrap());
}

#[test]
fn quit_drains_then_syncs() {
    assert_drains_then_syncs(|server| server.quit.notify());
}

#[test]
fn a_failed_final_sync_is_an_error_that_names_the_image() {
    let disk = Arc::new(Disk { sync_fails: true, ..Disk::new() });
    let message = server(&disk).end().unwrap_err().to_string();
    for part in ["disk.img", "final sync failed", "os error 5"] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn a_second_signal_ends_at_once_and_says_what_was_not_drained() {
    let disk = Arc::new(Disk { shutdown_returns: Latch::default(), ..Disk::new() });
    let mut server = server(&disk);
    raise(Signal::SIGINT).unwrap();
    raise(Signal::SIGTERM).unwrap();
    let (_directory, socket) = socket();
    let mut front_ends = FrontEnds::new(Arc::clone(&server.served)).unwrap();
    let ending = server.serve(&DaemonFiles::of(socket), &mut front_ends).unwrap();
    assert!(matches!(ending, Ending::Requested));
    let message = server.end().unwrap_err().to_string();
    for part in ["again", "disk.img", "neither drained (3 requests in flight) nor synced"] {
        assert!(message.contains(part), "{message}");
    }
    disk.shutdown_returns.open();
}

#[test]
fn a_second_signal_during_the_final_sync_says_that_the_sync_had_not_finished() {
    let disk = Arc::new(Disk { sync_returns: Latch::default(), ..Disk::new() });
    let mut server = server(&disk);
    server.end_signals = 1;
    let main = nix::sys::pthread::pthread_self();
    let second_signal = {
        let disk = Arc::clone(&disk);
        thread::spawn(move || {
            disk.wait_for("sync");
            nix::sys::pthread::pthread_kill(main, Signal::SIGTERM).unwrap();
        })
    };
    let message = server.end().unwrap_err().to_string();
    assert!(message.contains("drained, but the final sync had not finished"), "{message}");
    second_signal.join().unwrap();
    disk.sync_returns.open();
}

#[test]
fn a_second_sighup_does_not_interrupt_the_end() {
    if crate::base::signals::hangups_are_ignored() {
        // Under nohup(1) the daemon ignores SIGHUP, so there is nothing to test.
        println!("SKIPPED: SIGHUP is ignored");
        return;
    }
    let disk = Arc::new(Disk { sync_returns: Latch::default(), ..Disk::new() });
    let mut server = server(&disk);
    raise(Signal::SIGHUP).unwrap();
    let (_directory, socket) = socket();
    let mut front_ends = FrontEnds::new(Arc::clone(&server.served)).unwrap();
    let ending = server.serve(&DaemonFiles::of(socket), &mut front_ends).unwrap();
    assert!(matches!(ending, Ending::Requested));
    raise(Signal::SIGHUP).unwrap();
    let end_of_sync = {
        let disk = Arc::clone(&disk);
        thread::spawn(move || {
            disk.wait_for("sync");
            disk.sync_returns.open();
        })
    };
    server.end().unwrap();
    end_of_sync.join().unwrap();
}

fn wait_until_ready(front_ends: &FrontEnds, socket: &FrontSocket) {
    let mut sources = Vec::new();
    front_ends.watch(socket, &mut sources);
    wait(&mut sources, None).unwrap();
}

#[test]
fn the_next_front_end_waits_while_the_last_is_drained() {
    let disk = Arc::new(Disk { serve_returns: Latch::default(), ..Disk::new() });
    let (directory, socket) = socket();
    let path = directory.path().join("s");
    let mut front_ends = FrontEnds::new(Arc::clone(&disk) as Arc<dyn Served>).unwrap();
    let connect = || {
        let stream = UnixStream::connect(&path).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    };
    let open =
        |mut stream: &UnixStream| stream.read(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);

    let first = connect();
    front_ends.poll(&socket).unwrap();
    disk.wait_for("serve");
    let turned_away = connect();
    front_ends.poll(&socket).unwrap();
    assert!(open(&first) && !open(&turned_away));

    drop(first);
    // The hang-up may be late: the child of another test has the connection open between its fork and its exec.
    wait_until_ready(&front_ends, &socket);
    let second = connect();
    front_ends.poll(&socket).unwrap();
    front_ends.poll(&socket).unwrap();
    assert!(open(&second), "neither served nor turned away");
    assert_eq!(*disk.calls.lock().unwrap(), ["serve"]);

    disk.serve_returns.open();
    disk.wait_for("left");
    wait_until_ready(&front_ends, &socket);
    front_ends.poll(&socket).unwrap();
    disk.wait_for("serve");
    assert_eq!(*disk.calls.lock().unwrap(), ["serve", "left", "serve"]);
    assert!(open(&second));
}

#[test]
fn a_front_end_that_just_hung_up_does_not_turn_the_next_away() {
    let disk = Arc::new(Disk::new());
    let mut front_ends = FrontEnds::new(Arc::clone(&disk) as Arc<dyn Served>).unwrap();
    let (first, ours) = UnixStream::pair().unwrap();
    front_ends.sort_in(ours);
    disk.wait_for("serve");
    first.shutdown(std::net::Shutdown::Both).unwrap();
    // Accepted before the end of the first was noticed.
    let (second, ours) = UnixStream::pair().unwrap();
    second.set_nonblocking(true).unwrap();
    front_ends.sort_in(ours);
    let read = (&second).read(&mut [0]);
    assert!(read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock), "it was turned away");
    let (_directory, socket) = socket();
    disk.wait_for("left");
    wait_until_ready(&front_ends, &socket);
    front_ends.poll(&socket).unwrap();
    disk.wait_for("serve");
}

/// This variable in the environment makes the test's process panic.
const PANIC: &str = "VIRTIOBLKD_TEST_PANIC";

#[test]
fn a_panic_in_any_thread_ends_the_process() {
    use std::os::unix::process::ExitStatusExt;
    if std::env::var_os(PANIC).is_some() {
        crate::base::logging::start(log::LevelFilter::Info);
        abort_on_panic();
        // Without the hook the join would return an error and the test would pass.
        assert!(thread::spawn(|| panic!("a ring's thread")).join().is_err());
        return;
    }
    let name = "server::tests::a_panic_in_any_thread_ends_the_process";
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture"]).env(PANIC, "1");
    let child = command.output().unwrap();
    assert_eq!(child.status.signal(), Some(libc::SIGABRT), "{}", String::from_utf8_lossy(&child.stdout));
    assert!(String::from_utf8_lossy(&child.stderr).contains("a ring's thread"));
    // The abort does not wait for the reader of the log either: standard error is a full socket that nothing reads.
    let (_reader, log) = UnixStream::pair().unwrap();
    log.set_nonblocking(true).unwrap();
    while (&log).write(&[0; 256]).is_ok() {}
    log.set_nonblocking(false).unwrap();
    let status = command.stdout(std::process::Stdio::null()).stderr(std::os::fd::OwnedFd::from(log)).status().unwrap();
    assert_eq!(status.signal(), Some(libc::SIGABRT));
}
