//! What reaches the control thread besides requests and the disk's events: the image's store speaks from threads of its
//! own that must never block, and so do the threads that wait for it on our behalf.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

use crate::backend::{Notices, QuiesceAsk};
use crate::disk::CopyError;
use crate::engine::Errno;

/// Asks that wait for the control thread at most. A store asks for one at a time; a thread that is so late will not be
/// in time for more.
const MOST_NOTES: usize = 64;

/// One thing to be dealt with, in the order in which they came.
pub(super) enum Note {
    /// [`Notices::quiesce`], and when it came.
    Quiesce(QuiesceAsk, Instant),
    /// [`Notices::unquiesce`], and when it came.
    Unquiesce(Instant),
    /// The thread that makes snapshots of the image is done: the snapshot's full name, or what went wrong.
    JobDone(Result<String, CopyError>),
    /// [`ImageNotices::close`]: nothing more comes, and what is not granted yet is refused.
    Closed,
}

/// All that came since the last look.
#[derive(Default)]
pub(super) struct Notes {
    pub(super) notes: VecDeque<Note>,
    /// The image's size, the last that was said.
    pub(super) resized: Option<u64>,
    /// [`Notices::state_changed`], however often.
    pub(super) state_changed: bool,
    closed: bool,
}

/// The queue: any thread puts, the control thread takes.
pub(super) struct Inbox {
    notes: Mutex<Notes>,
    ready: OwnedFd,
}

impl Inbox {
    fn new() -> io::Result<Self> {
        let ready = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Inbox { notes: Mutex::default(), ready })
    }

    fn lock(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().expect("no panic while held")
    }

    fn ring(&self) {
        // A full counter (2^64 - 2) is the only error, and it means "readable".
        let _ = rustix::io::write(&self.ready, &1u64.to_ne_bytes());
    }

    /// [`ImageNotices::close`].
    pub(super) fn close(&self) {
        let unread = {
            let mut notes = self.lock();
            notes.closed = true;
            let unread = std::mem::take(&mut notes.notes);
            notes.notes.push_back(Note::Closed);
            unread
        };
        // Not under the lock: an ask that is dropped is answered.
        for note in unread {
            // The end of a snapshot is news still.
            if let Note::Unquiesce(_) | Note::JobDone(_) = note {
                self.lock().notes.push_back(note);
            }
        }
        self.ring();
    }

    /// Adds one; any thread.
    pub(super) fn put(&self, note: Note) {
        self.lock().notes.push_back(note);
        self.ring();
    }

    /// Takes everything; the control thread, after the descriptor became readable.
    pub(super) fn take(&self) -> Notes {
        // Not readable is fine: somebody else's wake-up was enough.
        let _ = rustix::io::read(&self.ready, &mut [0u8; 8]);
        let mut notes = self.lock();
        let closed = notes.closed;
        std::mem::replace(&mut *notes, Notes { closed, ..Notes::default() })
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

/// The control room's ear at the back-end. No method blocks, and none calls the back-end except by answering an ask.
pub struct ImageNotices {
    inbox: Arc<Inbox>,
}

impl ImageNotices {
    /// For [`super::Server::start`] and [`crate::backend::Backend::start_notices`]. Until the server runs, what comes
    /// waits. Errors: no file descriptor left.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(ImageNotices { inbox: Arc::new(Inbox::new()?) }))
    }

    /// The daemon ends: asks that come later are refused, those not granted yet are refused now or within a turn of the
    /// control thread (ECANCELED). A hold that is granted goes on, for whoever asked relies on it. Called by main or its
    /// helper before [`crate::backend::Backend::stop_notices`].
    pub fn close(&self) {
        self.inbox.close();
    }

    pub(super) fn inbox(&self) -> Arc<Inbox> {
        self.inbox.clone()
    }
}

impl Notices for ImageNotices {
    fn resized(&self, size: u64) {
        self.inbox.lock().resized = Some(size);
        self.inbox.ring();
    }

    fn quiesce(&self, ask: QuiesceAsk) {
        let refused = {
            let mut notes = self.inbox.lock();
            if notes.closed {
                Some((ask, libc::ECANCELED))
            } else if notes.notes.len() >= MOST_NOTES {
                Some((ask, libc::EBUSY))
            } else {
                notes.notes.push_back(Note::Quiesce(ask, Instant::now()));
                None
            }
        };
        match refused {
            Some((ask, errno)) => ask.answer(Err(Errno(errno))),
            None => self.inbox.ring(),
        }
    }

    fn unquiesce(&self) {
        let mut notes = self.inbox.lock();
        // Two in a row say no more than one.
        if !matches!(notes.notes.back(), Some(Note::Unquiesce(_))) {
            notes.notes.push_back(Note::Unquiesce(Instant::now()));
        }
        drop(notes);
        self.inbox.ring();
    }

    fn state_changed(&self) {
        self.inbox.lock().state_changed = true;
        self.inbox.ring();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn nothing_is_left_unanswered_and_nothing_piles_up() {
        let notices = ImageNotices::new().unwrap();
        let (sender, answers) = mpsc::channel();
        let ask = || {
            let sender = sender.clone();
            QuiesceAsk::new(move |result| sender.send(result).unwrap())
        };
        for _ in 0..MOST_NOTES {
            notices.quiesce(ask());
        }
        assert!(answers.try_recv().is_err(), "they wait");
        notices.quiesce(ask());
        assert_eq!(answers.try_recv(), Ok(Err(Errno(libc::EBUSY))), "one too many");
        notices.unquiesce();
        notices.unquiesce();
        notices.close();
        assert_eq!(answers.try_iter().collect::<Vec<_>>(), [Err(Errno(libc::ECANCELED)); MOST_NOTES]);
        notices.quiesce(ask());
        assert_eq!(answers.try_recv(), Ok(Err(Errno(libc::ECANCELED))), "closed");
        let notes: Vec<Note> = notices.inbox().take().notes.into();
        assert!(matches!(notes.as_slice(), [Note::Closed, Note::Unquiesce(_)]));
    }

    #[test]
    fn the_last_size_counts() {
        let notices = ImageNotices::new().unwrap();
        notices.resized(1);
        notices.resized(2);
        notices.state_changed();
        let notes = notices.inbox().take();
        assert_eq!((notes.resized, notes.state_changed), (Some(2), true));
        let notes = notices.inbox().take();
        assert_eq!((notes.resized, notes.state_changed), (None, false));
    }
}
