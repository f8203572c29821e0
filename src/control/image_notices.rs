//! What reaches the control thread besides requests and the disk's events: the image's store speaks from threads of its
//! own that must never block, and so do the threads that wait for it on our behalf.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Notices, QuiesceAsk};
use crate::base::sync::{Bell, Mutex, MutexGuard};
use crate::disk::CopyError;
use crate::engine::Errno;

/// Asks that wait for the control thread at most. A store asks for one at a time; a thread that is so late will not be
/// in time for more.
const MAX_NOTES: usize = 64;

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
    pub(super) closed: bool,
}

/// The queue: any thread puts, the control thread takes.
pub(super) struct Inbox {
    notes: Mutex<Notes>,
    ready: Bell,
}

impl Inbox {
    fn new() -> io::Result<Self> {
        Ok(Inbox { notes: Mutex::default(), ready: Bell::new()? })
    }

    fn lock(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().expect("no panic while held")
    }

    /// Changes what waits for the control thread, and wakes it.
    fn change(&self, change: impl FnOnce(&mut Notes)) {
        self.ready.ring_after(|| {
            change(&mut self.lock());
            true
        });
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
        self.ready.ring();
    }

    /// Adds one; any thread.
    pub(super) fn put(&self, note: Note) {
        self.change(|notes| notes.notes.push_back(note));
    }

    /// Takes everything; the control thread, after the descriptor became readable.
    pub(super) fn take(&self) -> Notes {
        self.ready.silence_before(|| {
            let mut notes = self.lock();
            let closed = notes.closed;
            std::mem::replace(&mut *notes, Notes { closed, ..Notes::default() })
        })
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
        self.inbox.change(|notes| notes.resized = Some(size));
    }

    fn quiesce(&self, ask: QuiesceAsk) {
        let mut refused = None;
        self.inbox.ready.ring_after(|| {
            let mut notes = self.inbox.lock();
            if notes.closed {
                refused = Some((ask, libc::ECANCELED));
            } else if notes.notes.len() >= MAX_NOTES {
                refused = Some((ask, libc::EBUSY));
            } else {
                notes.notes.push_back(Note::Quiesce(ask, Instant::now()));
            }
            refused.is_none()
        });
        if let Some((ask, errno)) = refused {
            ask.answer(Err(Errno(errno)));
        }
    }

    fn unquiesce(&self) {
        self.inbox.change(|notes| {
            // Two in a row say no more than one.
            if !matches!(notes.notes.back(), Some(Note::Unquiesce(_))) {
                notes.notes.push_back(Note::Unquiesce(Instant::now()));
            }
        });
    }

    fn state_changed(&self) {
        self.inbox.change(|notes| notes.state_changed = true);
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
        for _ in 0..MAX_NOTES {
            notices.quiesce(ask());
        }
        assert!(answers.try_recv().is_err(), "they wait");
        notices.quiesce(ask());
        assert_eq!(answers.try_recv(), Ok(Err(Errno(libc::EBUSY))), "one too many");
        notices.unquiesce();
        notices.unquiesce();
        notices.close();
        assert_eq!(answers.try_iter().collect::<Vec<_>>(), [Err(Errno(libc::ECANCELED)); MAX_NOTES]);
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

#[cfg(all(test, feature = "model"))]
mod interleavings {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use super::*;
    use crate::base::sync::interleavings::{Mutant, holds};
    use crate::base::sync::{thread, yield_until_readable};

    /// An ask, a new size and the end, from three threads: the control thread hears of the end, and the ask is answered
    /// once, whether it came before it or after.
    #[test]
    fn nothing_is_slept_over_and_each_ask_is_answered_once() {
        let model = || {
            let notices = ImageNotices::new().unwrap();
            let answers = Arc::new(AtomicU32::new(0));
            let (asking, resizing, closing) = (notices.clone(), notices.clone(), notices.clone());
            let answered = answers.clone();
            let threads = [
                thread::spawn(move || {
                    asking.quiesce(QuiesceAsk::new(move |_| {
                        answered.fetch_add(1, Relaxed);
                    }));
                }),
                thread::spawn(move || resizing.resized(1)),
                thread::spawn(move || closing.close()),
            ];
            let inbox = notices.inbox();
            let (mut size, mut closed) = (None, false);
            while size.is_none() || !closed {
                yield_until_readable(&[inbox.as_fd()], None);
                let taken = inbox.take();
                size = size.or(taken.resized);
                for note in taken.notes {
                    match note {
                        Note::Quiesce(ask, _) => ask.answer(Ok(())),
                        Note::Closed => closed = true,
                        Note::Unquiesce(_) | Note::JobDone(_) => unreachable!("nobody sent it"),
                    }
                }
            }
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(answers.load(Relaxed), 1);
        };
        holds(model, &[Mutant::RingsFirst, Mutant::SilencesLast]);
    }
}
