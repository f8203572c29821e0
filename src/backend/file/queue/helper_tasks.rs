//! The ops of one queue that its helper threads work on.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::super::helper_threads::HelperThreads;
use super::super::mail::Mailbox;
use super::PendingOp;
use crate::backend::uring::Transfer;

/// A queue's helper threads, which start when the first op needs one, and the ops that they work on.
#[derive(Default)]
pub(super) struct HelperTasks {
    threads: Option<HelperThreads>,
    /// By the key of their task.
    ops: HashMap<u64, PendingOp>,
    last_key: u64,
}

impl HelperTasks {
    /// Starts a thread if there is none. Fails when no thread can be started.
    pub(super) fn start(&mut self, file: &Arc<OwnedFd>, mailbox: &Arc<Mailbox>) -> io::Result<()> {
        if self.threads.is_none() {
            self.threads = Some(HelperThreads::start(Arc::clone(file), Arc::clone(mailbox))?);
        }
        Ok(())
    }

    /// Has a thread make a discard for `op`. Called after [`HelperTasks::start`] succeeded.
    pub(super) fn discard(&mut self, op: PendingOp, offset: u64, len: u64) {
        let key = self.insert(op);
        self.threads().discard(key, offset, len);
    }

    /// Has a thread make a transfer for `op`. Called after [`HelperTasks::start`] succeeded.
    pub(super) fn transfer(&mut self, op: PendingOp, transfer: Transfer) {
        let key = self.insert(op);
        self.threads().transfer(key, transfer);
    }

    /// Takes the op whose task a thread has finished.
    pub(super) fn take(&mut self, key: u64) -> PendingOp {
        self.ops.remove(&key).expect("a helper thread reports each task once")
    }

    fn threads(&mut self) -> &mut HelperThreads {
        self.threads.as_mut().expect("the caller has started a thread")
    }

    fn insert(&mut self, op: PendingOp) -> u64 {
        self.last_key += 1;
        self.ops.insert(self.last_key, op);
        self.last_key
    }
}
