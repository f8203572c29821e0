//! A disk that does what a test tells it, with a store that makes snapshots and copies that end late.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

use virtioblkd::disk::{
    Copies, CopyError, CopyOptions, CopyStatus, Disk, DiskStatus, Event, Events, FailedRequest, HoldFigures,
    ImageSnapshots, ImageStatus, LastError, RingStatus,
};
use virtioblkd::engine::Errno;

use super::WAIT_TIMEOUT;

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
    pub(super) fn new() -> FakeDisk {
        let gate = Gate {
            settle: Settle::Well,
            closed: None,
            epochs: Vec::new(),
            panics: false,
            image_status: ImageStatus::default(),
        };
        FakeDisk {
            store: Mutex::default(),
            copies: OnceLock::new(),
            stopped: Mutex::default(),
            gate: Mutex::new(gate),
            changed: Condvar::new(),
            events: Arc::new(Events::new().unwrap()),
        }
    }

    /// Another daemon numbers its closings anew.
    pub(super) fn forget_epochs(&self) {
        self.gate.lock().unwrap().epochs.clear();
    }

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
