//! The health of an image: why it cannot be used as it should.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc;

use super::watch_event::WatchEvent;
use super::{Errno, queue};

/// Flag: the cluster has shut this client out, for ever.
const FENCED: u8 = 1;
/// Flag: this client does not have the lock that writes need.
const LOCKED_OUT: u8 = 2;
/// Flag: writes need the lock, and the image no longer has the feature exclusive-lock.
const UNLOCKABLE: u8 = 4;

/// The reasons why the image cannot be used, as flags. Every op checks them, so a check is one atomic load.
#[derive(Default)]
pub(super) struct ImageHealth {
    flags: AtomicU8,
}

impl ImageHealth {
    fn has(&self, flag: u8) -> bool {
        self.flags.load(Ordering::Acquire) & flag != 0
    }

    /// Sets a flag. Returns whether it was clear before.
    fn set(&self, flag: u8) -> bool {
        self.flags.fetch_or(flag, Ordering::AcqRel) & flag == 0
    }

    /// Clears flags. Returns whether one of them was set.
    fn clear(&self, flags: u8) -> bool {
        self.has(flags) && self.flags.fetch_and(!flags, Ordering::AcqRel) & flags != 0
    }

    /// Whether the cluster has shut this client out.
    pub(super) fn is_fenced(&self) -> bool {
        self.has(FENCED)
    }

    /// Whether writes are known to fail because this client does not have the lock.
    pub(super) fn is_locked_out(&self) -> bool {
        self.has(LOCKED_OUT | UNLOCKABLE)
    }

    /// Checks whether librbd may get an op. `changes`: the op changes the image.
    pub(super) fn check(&self, changes: bool) -> Result<(), Errno> {
        match self.flags.load(Ordering::Acquire) {
            0 => Ok(()),
            flags if flags & FENCED != 0 => Err(queue::FENCED),
            flags if changes && flags & UNLOCKABLE != 0 => Err(queue::LOCKED_OUT),
            _ => Ok(()),
        }
    }

    /// Records and logs that the cluster has shut this client out.
    pub(super) fn fenced(&self, image: &str, events: &mpsc::Sender<WatchEvent>) {
        if self.set(FENCED) {
            log::error!("{image}: fenced: {}", FENCED_TEXT.1);
            report_change(events);
        }
    }

    /// Records and logs that librbd refused a write, or that another client has the lock.
    pub(super) fn locked_out(&self, image: &str, events: &mpsc::Sender<WatchEvent>) {
        if !self.has(UNLOCKABLE) && self.set(LOCKED_OUT) {
            log::error!("{image}: lock lost: {}", LOCKED_OUT_TEXT.1);
            report_change(events);
        }
    }

    /// Records and logs that the image no longer has the feature exclusive-lock and must not be written without it.
    /// From now on librbd gets no op that changes the image, because it would carry the op out.
    pub(super) fn unlockable(&self, image: &str, events: &mpsc::Sender<WatchEvent>) {
        if self.set(UNLOCKABLE) {
            log::error!("{image}: lock lost: {}", UNLOCKABLE_TEXT.1);
            report_change(events);
        }
    }

    /// Records that the lock was taken, or can be taken again before the image is used.
    pub(super) fn locked_again(&self, events: &mpsc::Sender<WatchEvent>) {
        if self.clear(LOCKED_OUT | UNLOCKABLE) {
            report_change(events);
        }
    }

    /// Records that a flush succeeded, so writes are possible again.
    pub(super) fn writable_again(&self, events: &mpsc::Sender<WatchEvent>) {
        if self.clear(LOCKED_OUT) {
            report_change(events);
        }
    }

    /// Returns a word for programs, and the cause and the fix for people. `None`: the image can be used.
    pub(super) fn status(&self) -> Option<(String, String)> {
        let (word, detail) = match self.flags.load(Ordering::Acquire) {
            0 => return None,
            flags if flags & FENCED != 0 => FENCED_TEXT,
            flags if flags & UNLOCKABLE != 0 => UNLOCKABLE_TEXT,
            _ => LOCKED_OUT_TEXT,
        };
        Some((word.to_string(), detail.to_string()))
    }
}

const FENCED_TEXT: (&str, &str) = (
    "fenced",
    "the cluster has shut this client out (blocklisted): another client took the image over, or an operator did it. \
     Nothing more is read or written. If this disk is to have the image, end virtioblkd and start it again, and reset \
     the guest",
);
const LOCKED_OUT_TEXT: (&str, &str) = (
    "lock-lost",
    "this client does not have the image's exclusive lock, so nothing is written. See which client has it (rbd lock \
     ls), and end that one or this one",
);
const UNLOCKABLE_TEXT: (&str, &str) = (
    "lock-lost",
    "the image's feature exclusive-lock was disabled, so nothing keeps other hosts from writing it, and --rbd-lock \
     exclusive allows no write without the lock. Enable it again (rbd feature enable IMAGE exclusive-lock): the lock is \
     then taken again if no other client has it",
);

/// Makes the watch thread report that the state changed. Any thread may call it.
pub(super) fn report_change(events: &mpsc::Sender<WatchEvent>) {
    // No thread receives it before notices are started and after they are stopped; the status shows the state anyway.
    let _ = events.send(WatchEvent::StateChanged);
}
