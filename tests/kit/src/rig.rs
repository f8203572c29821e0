//! A device in process on any back-end, served to one front-end after another.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use virtioblkd::backend::{Backend, Errno};
use virtioblkd::disk::{Disk, DiskStatus, Event, Events, HoldFigures};
use virtioblkd::internal::rings::Rings;
use virtioblkd::virtio::{Device, DeviceOptions, SessionEnd, Tuning};

pub use crate::prng::Prng;
use crate::wait::WAIT_TIMEOUT;

/// A served disk.
pub struct Rig {
    pub device: Arc<Device>,
    pub disk: Arc<Rings>,
    pub events: Arc<Events>,
    pub path: PathBuf,
    server: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Rig {
    pub fn on(backend: Arc<dyn Backend>, options: &DeviceOptions) -> Rig {
        Self::tuned(backend, options, &Tuning::default())
    }

    pub fn tuned(backend: Arc<dyn Backend>, options: &DeviceOptions, tuning: &Tuning) -> Rig {
        let events = Arc::new(Events::new().unwrap());
        let device = Device::with_tuning(backend, options, events.clone(), tuning);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let served = device.clone();
        let server = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if matches!(served.serve(stream.unwrap()).unwrap(), SessionEnd::ShuttingDown) {
                    return;
                }
            }
        });
        Rig { disk: device.disk(), device, events, path, server: Some(server), _dir: dir }
    }

    pub fn status(&self) -> DiskStatus {
        self.disk.status()
    }

    /// Waits for an event that `want` picks something from; others are dropped.
    pub fn event<T>(&self, mut want: impl FnMut(Event) -> Option<T>) -> T {
        let end = Instant::now() + WAIT_TIMEOUT;
        loop {
            for event in self.events.take().events {
                if let Some(found) = want(event) {
                    return found;
                }
            }
            assert!(Instant::now() < end, "the event did not come");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Closes the gate and waits for what comes of it.
    pub fn hold(&self, epoch: u64) -> Result<HoldFigures, Errno> {
        self.disk.close_gate(epoch);
        self.event(|event| match event {
            Event::HoldSettled { epoch: of, result } if of == epoch => Some(result),
            _ => None,
        })
    }

    /// Waits until the front-end's leaving is complete; why it left.
    pub fn disconnected(&self) -> String {
        self.event(|event| if let Event::Disconnected(why) = event { Some(why) } else { None })
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // A test that has failed may leave requests that nobody answers any more: waiting for them would hide its failure.
        if std::thread::panicking() {
            return;
        }
        self.device.shutdown();
        // Wakes the accept loop; a failed connect means that it has ended.
        let _ = std::os::unix::net::UnixStream::connect(&self.path);
        self.server.take().unwrap().join().unwrap();
    }
}
