//! A disk that does what a test tells it, the control socket in front of it, and a client. Shared by the tests of the
//! socket and of the operator's command.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use serde_json::json;
use virtioblkd::backend::{Notices, QuiesceRequest};
use virtioblkd::engine::Errno;
use virtioblkd::internal::base::unix_listener::{BindError, bind_unix};
use virtioblkd::internal::control::protocol::return_types::TookOver;
use virtioblkd::internal::control::{Access, DaemonInfo, ImageNotices, Server, Setup, Upgrade};

mod client;
mod disk;
pub mod schema;

pub use client::Client;
pub use disk::{FakeDisk, FakeStore, LateCopies, Settle, figures};

/// Nothing here takes this long; a test that waits so long has failed.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a quiesce of the image's own store may take, attendant included.
pub const STORE_TIMEOUT: Duration = Duration::from_secs(20);

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
        let disk = Arc::new(FakeDisk::new());
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
        self.disk.forget_epochs();
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
