//! What the tests of the RBD back-end over a stub of librbd share: a listener for its notices, and its status.

use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use kit::backend::WAIT_TIMEOUT;
use virtioblkd::backend::rbd::RbdBackend;
use virtioblkd::backend::{Backend, Errno, IoBuf, Notices, Op, QuiesceRequest};

pub(super) const EIO: Errno = Errno(libc::EIO);

pub(super) const EROFS: Errno = Errno(libc::EROFS);

pub(super) const ESHUTDOWN: Errno = Errno(libc::ESHUTDOWN);

/// What a back-end said.
#[derive(Debug, PartialEq)]
pub(super) enum Said {
    Resized(u64),
    Quiesce,
    Unquiesce,
    StateChanged,
}

/// Keeps what is said, and the questions until somebody answers.
pub(super) struct Listener {
    pub(super) said: Mutex<mpsc::Sender<Said>>,
    pub(super) asks: Mutex<Vec<QuiesceRequest>>,
}

impl Listener {
    pub(super) fn start(disk: &RbdBackend) -> (Arc<Listener>, mpsc::Receiver<Said>) {
        let (sender, said) = mpsc::channel();
        let listener = Arc::new(Listener { said: Mutex::new(sender), asks: Mutex::default() });
        disk.store().start_notices(listener.clone());
        (listener, said)
    }

    pub(super) fn say(&self, what: Said) {
        self.said.lock().unwrap().send(what).unwrap();
    }

    pub(super) fn ask(&self) -> QuiesceRequest {
        self.asks.lock().unwrap().pop().expect("somebody asked")
    }
}

impl Notices for Listener {
    fn resized(&self, size: u64) {
        self.say(Said::Resized(size));
    }

    fn quiesce(&self, ask: QuiesceRequest) {
        self.asks.lock().unwrap().push(ask);
        self.say(Said::Quiesce);
    }

    fn unquiesce(&self) {
        self.say(Said::Unquiesce);
    }

    fn state_changed(&self) {
        self.say(Said::StateChanged);
    }
}

pub(super) fn hears(said: &mpsc::Receiver<Said>, what: Said) {
    assert_eq!(said.recv_timeout(WAIT_TIMEOUT).expect("something is said"), what);
}

pub(super) fn hears_nothing_more(said: &mpsc::Receiver<Said>) {
    assert_eq!(said.recv_timeout(Duration::from_millis(50)).ok(), None);
}

pub(super) fn trouble(disk: &RbdBackend) -> Option<String> {
    let status = disk.info().image_status();
    assert_eq!(status.trouble.is_some(), status.trouble_detail.is_some());
    status.trouble
}

pub(super) fn write_op(offset: u64) -> Op {
    Op::Write { offset, buf: IoBuf::owned(4096, 4096, 0), durable: false }
}
