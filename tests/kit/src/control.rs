//! A disk that does what a test tells it, the quiesce socket in front of it, and a client. Shared by the tests of the
//! socket and of the operator's command.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virtioblkd::backend::{Notices, QuiesceRequest};
use virtioblkd::disk::{
    Copies, CopyError, CopyOptions, CopyStatus, Disk, DiskStatus, Event, Events, FailedRequest, HoldFigures,
    ImageSnapshots, ImageStatus, LastError, RingStatus,
};
use virtioblkd::engine::Errno;
use virtioblkd::internal::base::unix_listener::{BindError, bind_unix};
use virtioblkd::internal::control::protocol::return_types::TookOver;
use virtioblkd::internal::control::{Access, DaemonInfo, ImageNotices, Server, Setup, Upgrade};

/// Nothing here takes this long; a test that waits so long has failed.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a quiesce of the image's own store may take, attendant included.
pub const STORE_TIMEOUT: Duration = Duration::from_secs(20);

/// How the fake disk answers a closing of its gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settle {
    /// At once and well.
    Well,
    /// At once, with this error.
    Fail(Errno),
    /// Never: the test does it.
    ByHand,
}

#[derive(Debug)]
struct Gate {
    settle: Settle,
    closed: Option<u64>,
    epochs: Vec<u64>,
    panics: bool,
    image_status: ImageStatus,
}

/// A store that makes snapshots, and what a test wants of it.
#[derive(Default)]
pub struct FakeStore {
    state: Mutex<StoreState>,
    changed: Condvar,
}

#[derive(Default)]
struct StoreState {
    made: Vec<String>,
    fails: bool,
    hangs: bool,
    creating: bool,
}

impl FakeStore {
    pub fn made(&self) -> Vec<String> {
        self.state.lock().unwrap().made.clone()
    }

    pub fn fail(&self, fails: bool) {
        self.state.lock().unwrap().fails = fails;
    }

    /// What is under way, and what comes later, does not end until this is taken back.
    pub fn hang(&self, hangs: bool) {
        self.state.lock().unwrap().hangs = hangs;
        self.changed.notify_all();
    }

    pub fn wait_creating(&self) {
        let state = self.state.lock().unwrap();
        let waited = self.changed.wait_timeout_while(state, WAIT_TIMEOUT, |state| !state.creating).unwrap();
        assert!(!waited.1.timed_out(), "no snapshot is asked for");
    }
}

impl ImageSnapshots for FakeStore {
    fn create(&self, name: &str) -> Result<(), CopyError> {
        let mut state = self.state.lock().unwrap();
        state.creating = true;
        self.changed.notify_all();
        let mut state = self.changed.wait_while(state, |state| state.hangs).unwrap();
        state.creating = false;
        if state.fails {
            return Err(CopyError { code: "store", message: "the pool is full: add space".into() });
        }
        state.made.push(name.to_owned());
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<(), CopyError> {
        let mut state = self.state.lock().unwrap();
        let at = state.made.iter().position(|made| made == name).expect("only what was made is removed");
        state.made.remove(at);
        Ok(())
    }

    fn full_name(&self, name: &str) -> String {
        format!("pool/image@{name}")
    }
}

/// Copies that are as good as complete when they start: too late to cancel, and not over before that was tried twice.
#[derive(Default)]
pub struct LateCopies {
    target: Mutex<String>,
    cancels: AtomicU32,
}

impl LateCopies {
    /// How often somebody tried.
    pub fn cancels(&self) -> u32 {
        self.cancels.load(Ordering::SeqCst)
    }
}

impl Copies for LateCopies {
    fn prepare(&self, options: &CopyOptions) -> Result<String, CopyError> {
        *self.target.lock().unwrap() = options.target.to_str().unwrap().to_owned();
        Ok("copy-1".into())
    }

    fn start(&self, _: &str) -> Result<(), CopyError> {
        std::fs::write(&*self.target.lock().unwrap(), "a copy").unwrap();
        Ok(())
    }

    fn cancel(&self, _: &str) -> Result<(), CopyError> {
        self.cancels.fetch_add(1, Ordering::SeqCst);
        Err(CopyError { code: "busy", message: "it ends just now".into() })
    }

    fn set_bandwidth(&self, _: &str, _: u64) -> Result<(), CopyError> {
        Ok(())
    }

    fn status(&self) -> Vec<CopyStatus> {
        let state = if self.cancels() < 2 { "syncing" } else { "completed" };
        let target = self.target.lock().unwrap().clone();
        vec![CopyStatus { copy: "copy-1".into(), target, state: state.into(), ..CopyStatus::default() }]
    }
}

pub struct FakeDisk {
    /// Who makes snapshots of it, if anybody.
    pub store: Mutex<Option<Arc<FakeStore>>>,
    /// Who copies it, if anybody.
    pub copies: OnceLock<LateCopies>,
    /// What failed and is kept.
    pub stopped: Mutex<Option<FailedRequest>>,
    gate: Mutex<Gate>,
    changed: Condvar,
    pub events: Arc<Events>,
}

pub fn figures() -> HoldFigures {
    HoldFigures {
        rings: 2,
        drained: 12,
        drain: Duration::from_micros(1500),
        sync: Duration::from_micros(3250),
        bytes_synced: 8192,
    }
}

impl FakeDisk {
    pub fn set(&self, settle: Settle) {
        self.gate.lock().unwrap().settle = settle;
    }

    /// Answers the closing under way, or an earlier one.
    pub fn settle(&self, epoch: u64, result: Result<HoldFigures, Errno>) {
        self.events.send(Event::HoldSettled { epoch, result });
    }

    pub fn closed(&self) -> Option<u64> {
        self.gate.lock().unwrap().closed
    }

    /// How often the gate was closed.
    pub fn closings(&self) -> usize {
        self.gate.lock().unwrap().epochs.len()
    }

    /// Waits until the gate is closed (or open) and returns the last epoch.
    pub fn wait_closed(&self, closed: bool) -> u64 {
        let gate = self.gate.lock().unwrap();
        let (gate, waited) =
            self.changed.wait_timeout_while(gate, WAIT_TIMEOUT, |gate| gate.closed.is_some() != closed).unwrap();
        assert!(!waited.timed_out(), "the gate should be {}: {gate:?}", if closed { "closed" } else { "open" });
        gate.epochs.last().copied().unwrap_or(0)
    }

    pub fn set_image_status(&self, status: ImageStatus) {
        self.gate.lock().unwrap().image_status = status;
    }

    /// The next `status` panics, as a defect of the disk would.
    pub fn panic_next(&self) {
        self.gate.lock().unwrap().panics = true;
    }
}

impl Disk for FakeDisk {
    fn close_gate(&self, epoch: u64) {
        let mut gate = self.gate.lock().unwrap();
        assert!(gate.closed.is_none(), "closed twice");
        assert!(!gate.epochs.contains(&epoch), "epoch {epoch} reused");
        gate.closed = Some(epoch);
        gate.epochs.push(epoch);
        let settle = gate.settle;
        drop(gate);
        self.changed.notify_all();
        match settle {
            Settle::Well => self.settle(epoch, Ok(figures())),
            Settle::Fail(errno) => self.settle(epoch, Err(errno)),
            Settle::ByHand => {}
        }
    }

    fn open_gate(&self) {
        assert!(self.gate.lock().unwrap().closed.take().is_some(), "opened twice");
        self.changed.notify_all();
    }

    fn continue_io(&self) -> u64 {
        u64::from(self.stopped.lock().unwrap().take().is_some())
    }

    fn stopped_change(&self) -> Option<FailedRequest> {
        self.stopped.lock().unwrap().clone()
    }

    fn copies(&self) -> Option<&dyn Copies> {
        self.copies.get().map(|copies| copies as &dyn Copies)
    }

    fn snapshots(&self) -> Option<Arc<dyn ImageSnapshots>> {
        self.store.lock().unwrap().clone().map(|store| store as Arc<dyn ImageSnapshots>)
    }

    fn status(&self) -> DiskStatus {
        let panics = std::mem::take(&mut self.gate.lock().unwrap().panics);
        assert!(!panics, "a defect");
        let held = self.closed().is_some();
        let ring = |index| RingStatus {
            index,
            size: 128,
            in_flight: 3,
            held: held && index == 1,
            reads: 1000 * u64::from(index + 1),
            read_bytes: 4_096_000,
            writes: 500,
            written_bytes: 2_048_000,
            flushes: 7,
            syncs: 8,
            ..RingStatus::default()
        };
        DiskStatus {
            image: "raw file '/images/a.raw', O_DIRECT".into(),
            size: 10 << 30,
            logical_block_size: 512,
            cache_mode: "none".into(),
            write_acknowledged: "when the host's device has it".into(),
            guest_flush: "synced".into(),
            guest_sees: "write back".into(),
            connected: true,
            driver_ready: true,
            acked_features: 0x1_3000_6e46,
            rings: vec![ring(0), ring(1)],
            total: RingStatus { reads: 3000, writes: 1000, ..RingStatus::default() },
            image_status: self.gate.lock().unwrap().image_status.clone(),
            last_errors: vec![LastError {
                what: "write at 4096: Input/output error".into(),
                when: 1_700_000_000,
                times: 1,
            }],
            ..DiskStatus::default()
        }
    }
}

/// A served fake disk. Everything ends with it.
pub struct Served {
    pub disk: Arc<FakeDisk>,
    pub path: PathBuf,
    pub quits: Arc<AtomicU32>,
    /// What the image's store would call.
    pub notices: Arc<ImageNotices>,
    /// The sizes that were passed on.
    pub sizes: Arc<Mutex<Vec<u64>>>,
    /// Connections that asked for the hand-over, and whether an attendant was relied on.
    pub handed_over: Arc<Mutex<Vec<(UnixStream, bool)>>>,
    /// A hand-over is under way; and about to be decided.
    pub upgrading: (Arc<AtomicBool>, Arc<AtomicBool>),
    server: Option<Server>,
    attended: bool,
    others: Access,
    max_hold: Option<Duration>,
    _dir: tempfile::TempDir,
}

/// A process that another test has forked, and that has not become a program yet, may have a copy of the listener that was
/// just closed.
fn bind_soon(path: &Path, mode: u32) -> UnixListener {
    let end = Instant::now() + WAIT_TIMEOUT;
    loop {
        match bind_unix(path, mode) {
            Ok(listener) => return listener,
            Err(BindError::InUse(_)) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => panic!("{error}"),
        }
    }
}

impl Served {
    pub fn new() -> Self {
        Self::with_mode(0o600)
    }

    pub fn with_mode(mode: u32) -> Self {
        Self::start(Some(mode), STORE_TIMEOUT)
    }

    /// `mode`: of its socket, `None`: it has none. `store_timeout`: for somebody else's snapshot.
    pub fn start(mode: Option<u32>, store_timeout: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let events = Arc::new(Events::new().unwrap());
        let gate = Mutex::new(Gate {
            settle: Settle::Well,
            closed: None,
            epochs: Vec::new(),
            panics: false,
            image_status: ImageStatus::default(),
        });
        let disk = Arc::new(FakeDisk {
            store: Mutex::default(),
            copies: OnceLock::new(),
            stopped: Mutex::default(),
            gate,
            changed: Condvar::new(),
            events,
        });
        let (quits, sizes, handed_over, upgrading) = Default::default();
        let notices = ImageNotices::new().unwrap();
        let (attended, others, max_hold) = (false, Access::Operate, None);
        let mut served = Served {
            disk,
            path,
            quits,
            notices,
            sizes,
            handed_over,
            upgrading,
            server: None,
            attended,
            others,
            max_hold,
            _dir: dir,
        };
        served.serve(mode, store_timeout);
        served
    }

    /// Another daemon in the place of this one, whose socket others may use for this.
    pub fn let_others(mut self, others: Access) -> Self {
        self.stop();
        self.others = others;
        self.serve(Some(0o666), STORE_TIMEOUT);
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(self.path.parent().unwrap(), open).unwrap();
        self
    }

    fn serve(&mut self, mode: Option<u32>, store_timeout: Duration) {
        self.notices = ImageNotices::new().unwrap();
        let (quits, sizes, handed_over) = (self.quits.clone(), self.sizes.clone(), self.handed_over.clone());
        let upgrade = Upgrade {
            begin: Box::new(move |stream, relied_on| handed_over.lock().unwrap().push((stream, relied_on))),
            is_running: self.upgrading.0.clone(),
            leaving: self.upgrading.1.clone(),
        };
        let setup = Setup {
            disk: self.disk.clone(),
            events: self.disk.events.clone(),
            notices: self.notices.clone(),
            store_timeout,
            attended: self.attended,
            max_hold: self.max_hold,
            resized: Box::new(move |size| sizes.lock().unwrap().push(size)),
            quit: Arc::new(move || {
                quits.fetch_add(1, Ordering::SeqCst);
            }),
            others: self.others,
            info: DaemonInfo { vhost_socket: "/run/vhost.sock".into(), command_line: None },
            upgrade: Some(upgrade),
        };
        let listener = mode.map(|mode| bind_soon(&self.path, mode));
        self.server = Some(Server::start(listener, setup).unwrap());
    }

    /// From now on its image's store makes snapshots.
    pub fn with_store(&self) -> Arc<FakeStore> {
        let store = Arc::new(FakeStore::default());
        *self.disk.store.lock().unwrap() = Some(store.clone());
        store
    }

    pub fn with_copies(&self) -> &LateCopies {
        self.disk.copies.get_or_init(LateCopies::default)
    }

    /// Another daemon in the place of the one that was stopped.
    pub fn restart(&mut self) {
        assert!(self.server.is_none());
        self.disk.gate.lock().unwrap().epochs.clear();
        self.serve(Some(0o600), STORE_TIMEOUT);
    }

    /// Somebody else begins a snapshot; the answer comes out of the channel.
    pub fn store_asks(&self) -> mpsc::Receiver<Result<(), Errno>> {
        let (sender, answer) = mpsc::channel();
        // Nobody listens any more: the test is over.
        self.notices.quiesce(QuiesceRequest::new(move |result| {
            let _ = sender.send(result);
        }));
        answer
    }

    pub fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
        stream.set_write_timeout(Some(WAIT_TIMEOUT)).unwrap();
        stream
    }

    /// A client that has read the greeting.
    pub fn greeted(&self) -> Client {
        let mut client = Client::new(self.raw());
        assert!(client.line()["QMP"]["version"]["qemu"].is_object());
        client
    }

    /// A client that has read the greeting, as soon as a place is free: the server may not have seen yet that an
    /// earlier connection has ended.
    pub fn greeted_soon(&self) -> Client {
        let end = Instant::now() + WAIT_TIMEOUT;
        loop {
            let mut client = Client::new(self.raw());
            if client.line()["QMP"].is_object() {
                return client;
            }
            assert!(Instant::now() < end, "no place becomes free");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A client that has negotiated.
    pub fn client(&self) -> Client {
        let mut client = self.greeted();
        assert_eq!(client.ask("qmp_capabilities", json!({})), Ok(json!({})));
        client
    }

    /// From its next start on, its holders together may hold it for so long (`--max-hold`).
    pub fn bound_holds(&mut self, max_hold: Duration) {
        self.max_hold = Some(max_hold);
    }

    /// From its next start on, somebody must attend it.
    pub fn must_be_attended(&mut self) {
        self.attended = true;
    }

    /// As after a hand-over from a process that relied on an attendant, or did not.
    pub fn took_over(&self, figures: TookOver, misses: bool) {
        let listener = bind_soon(&self.path, 0o600);
        self.server.as_ref().unwrap().take_over(Some(listener), figures, misses).unwrap();
    }

    pub fn stop(&mut self) {
        self.server.take().unwrap().stop();
    }
}

/// A QMP client that keeps the events it meets.
pub struct Client {
    pub reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Client {
    pub fn new(stream: UnixStream) -> Self {
        Client { reader: BufReader::new(stream), events: VecDeque::new() }
    }

    /// A client that has read the greeting and negotiated, on a connection that it reads no longer than a test is patient.
    pub fn negotiated(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a timeout");
        let mut client = Client::new(stream);
        client.line();
        client.ask("qmp_capabilities", json!({})).expect("negotiated");
        client
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.reader.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    /// The next line, whatever it is. An ended connection is a failure.
    pub fn line(&mut self) -> Value {
        let mut line = String::new();
        assert!(self.reader.read_line(&mut line).unwrap() > 0, "the server closed the connection");
        assert!(line.ends_with("\r\n"), "{line}");
        serde_json::from_str(&line).unwrap()
    }

    /// The next reply; events on the way are kept.
    pub fn reply(&mut self) -> Value {
        loop {
            let line = self.line();
            if line.get("event").is_none() {
                return line;
            }
            self.events.push_back(line);
        }
    }

    /// Asks and waits. `Err` is the error's code.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        self.send(json!({"execute": command, "arguments": arguments}).to_string());
        let mut reply = self.reply();
        match reply["error"]["code"].as_str() {
            Some(code) => Err(code.to_owned()),
            None => Ok(reply["return"].take()),
        }
    }

    /// `copy-prepare`; the copy's name. A busy machine may be taken for a target that hangs: then it is asked for again.
    pub fn prepare_copy(&mut self, arguments: Value) -> String {
        let end = Instant::now() + WAIT_TIMEOUT;
        loop {
            match self.ask("copy-prepare", arguments.clone()) {
                Ok(prepared) => return prepared["copy"].as_str().unwrap().to_owned(),
                Err(code) => assert!(code == "target" && Instant::now() < end, "{code}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// `quiesce`; its token.
    pub fn quiesce(&mut self, arguments: Value) -> String {
        self.ask("quiesce", arguments).unwrap()["token"].as_str().unwrap().to_owned()
    }

    /// The next event, which must be this one; its data.
    pub fn event(&mut self, name: &str) -> Value {
        let mut event = self.events.pop_front().unwrap_or_else(|| self.line());
        assert_eq!(event["event"], name, "{event}");
        assert!(event["timestamp"]["seconds"].as_u64().unwrap() > 1_600_000_000);
        event["data"].take()
    }

    /// The server closes the connection and sends no more than what it owes.
    pub fn ends(&mut self) {
        let mut line = String::new();
        assert_eq!(self.reader.read_line(&mut line).unwrap(), 0, "{line}");
    }
}
