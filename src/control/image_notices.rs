//! The queue of what reaches the control thread besides requests and the disk's events. The image's store calls from
//! threads of its own that must never block; so do our threads that wait for the store.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Notices, QuiesceRequest};
use crate::base::sync::{Bell, Mutex, MutexGuard};
use crate::disk::CopyError;
use crate::engine::Errno;

/// The most asks that wait for the control thread. A store asks for one at a time; a control thread that is so late will
/// not answer more of them in time.
const MAX_NOTICES: usize = 64;

/// One item of the queue. Items are handled in the order in which they came.
pub(super) enum ImageNotice {
    /// [`Notices::quiesce`], and when it came.
    Quiesce(QuiesceRequest, Instant),
    /// [`Notices::unquiesce`], and when it came.
    Unquiesce(Instant),
    /// The thread that makes snapshots of the image is done: the snapshot's full name, or what went wrong.
    SnapshotDone(Result<String, CopyError>),
    /// [`ImageNotices::close`]: no ask follows, and what is not granted yet is to be refused.
    Closed,
}

/// All that came since the last [`NoticeInbox::take`].
#[derive(Default)]
pub(super) struct PendingNotices {
    pub(super) queue: VecDeque<ImageNotice>,
    /// The image's size, as reported last.
    pub(super) resized: Option<u64>,
    /// [`Notices::state_changed`], however often.
    pub(super) state_changed: bool,
    pub(super) closed: bool,
}

/// The queue: any thread puts, the control thread takes.
pub(super) struct NoticeInbox {
    pending: Mutex<PendingNotices>,
    ready: Bell,
}

impl NoticeInbox {
    fn new() -> io::Result<Self> {
        Ok(NoticeInbox { pending: Mutex::default(), ready: Bell::new()? })
    }

    fn lock(&self) -> MutexGuard<'_, PendingNotices> {
        self.pending.lock().expect("no panic while held")
    }

    /// Changes what waits for the control thread, and wakes it.
    fn change(&self, change: impl FnOnce(&mut PendingNotices)) {
        self.ready.ring_after(|| {
            change(&mut self.lock());
            true
        });
    }

    /// [`ImageNotices::close`].
    pub(super) fn close(&self) {
        let unread = {
            let mut pending = self.lock();
            pending.closed = true;
            let unread = std::mem::take(&mut pending.queue);
            pending.queue.push_back(ImageNotice::Closed);
            unread
        };
        // Without the lock: dropping an ask answers it, which calls the back-end.
        for notice in unread {
            // The end of a snapshot still counts.
            if let ImageNotice::Unquiesce(_) | ImageNotice::SnapshotDone(_) = notice {
                self.lock().queue.push_back(notice);
            }
        }
        self.ready.ring();
    }

    /// Adds an item; any thread.
    pub(super) fn put(&self, notice: ImageNotice) {
        self.change(|pending| pending.queue.push_back(notice));
    }

    /// Takes everything; the control thread, after the descriptor became readable.
    pub(super) fn take(&self) -> PendingNotices {
        self.ready.silence_before(|| {
            let mut pending = self.lock();
            let closed = pending.closed;
            std::mem::replace(&mut *pending, PendingNotices { closed, ..PendingNotices::default() })
        })
    }
}

impl AsFd for NoticeInbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

/// What the back-end calls to reach the control thread. No method blocks, and none calls the back-end except by answering
/// an ask.
pub struct ImageNotices {
    inbox: Arc<NoticeInbox>,
}

impl ImageNotices {
    /// For [`super::Server::start`] and [`crate::backend::ImageStore::start_notices`]. Until the server runs, the queue
    /// keeps what comes. Errors: no file descriptor left.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(ImageNotices { inbox: Arc::new(NoticeInbox::new()?) }))
    }

    /// The daemon ends: asks that come later are refused, those not granted yet are refused now or within a turn of the
    /// control thread (ECANCELED). A hold that is granted goes on, because the host that asked relies on it. Called by main
    /// or its helper before [`crate::backend::ImageStore::stop_notices`].
    pub fn close(&self) {
        self.inbox.close();
    }

    pub(super) fn inbox(&self) -> Arc<NoticeInbox> {
        self.inbox.clone()
    }
}

impl Notices for ImageNotices {
    fn resized(&self, size: u64) {
        self.inbox.change(|pending| pending.resized = Some(size));
    }

    fn quiesce(&self, request: QuiesceRequest) {
        let mut refused = None;
        self.inbox.ready.ring_after(|| {
            let mut pending = self.inbox.lock();
            if pending.closed {
                refused = Some((request, libc::ECANCELED));
            } else if pending.queue.len() >= MAX_NOTICES {
                refused = Some((request, libc::EBUSY));
            } else {
                pending.queue.push_back(ImageNotice::Quiesce(request, Instant::now()));
            }
            refused.is_none()
        });
        if let Some((request, errno)) = refused {
            request.reply(Err(Errno(errno)));
        }
    }

    fn unquiesce(&self) {
        self.inbox.change(|pending| {
            // Two in a row mean no more than one.
            if !matches!(pending.queue.back(), Some(ImageNotice::Unquiesce(_))) {
                pending.queue.push_back(ImageNotice::Unquiesce(Instant::now()));
            }
        });
    }

    fn state_changed(&self) {
        self.inbox.change(|pending| pending.state_changed = true);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn every_ask_is_answered_and_the_queue_is_bounded() {
        let notices = ImageNotices::new().unwrap();
        let (sender, answers) = mpsc::channel();
        let ask = || {
            let sender = sender.clone();
            QuiesceRequest::new(move |result| sender.send(result).unwrap())
        };
        for _ in 0..MAX_NOTICES {
            notices.quiesce(ask());
        }
        assert!(answers.try_recv().is_err(), "the asks wait");
        notices.quiesce(ask());
        assert_eq!(answers.try_recv(), Ok(Err(Errno(libc::EBUSY))), "one too many");
        notices.unquiesce();
        notices.unquiesce();
        notices.close();
        assert_eq!(answers.try_iter().collect::<Vec<_>>(), [Err(Errno(libc::ECANCELED)); MAX_NOTICES]);
        notices.quiesce(ask());
        assert_eq!(answers.try_recv(), Ok(Err(Errno(libc::ECANCELED))), "closed");
        let queue: Vec<ImageNotice> = notices.inbox().take().queue.into();
        assert!(matches!(queue.as_slice(), [ImageNotice::Closed, ImageNotice::Unquiesce(_)]));
    }

    #[test]
    fn only_the_last_size_is_reported() {
        let notices = ImageNotices::new().unwrap();
        notices.resized(1);
        notices.resized(2);
        notices.state_changed();
        let pending = notices.inbox().take();
        assert_eq!((pending.resized, pending.state_changed), (Some(2), true));
        let pending = notices.inbox().take();
        assert_eq!((pending.resized, pending.state_changed), (None, false));
    }
}

#[cfg(all(test, feature = "model"))]
mod interleavings {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use super::*;
    use crate::base::sync::interleavings::{Mutant, holds};
    use crate::base::sync::{thread, yield_until_readable};

    /// An ask, a new size and the end, from three threads: the control thread sees the end, and the ask is answered once,
    /// whether it came before the end or after.
    #[test]
    fn no_item_is_missed_and_each_ask_is_answered_once() {
        let model = || {
            let notices = ImageNotices::new().unwrap();
            let answers = Arc::new(AtomicU32::new(0));
            let (asking, resizing, closing) = (notices.clone(), notices.clone(), notices.clone());
            let answered = answers.clone();
            let threads = [
                thread::spawn(move || {
                    asking.quiesce(QuiesceRequest::new(move |_| {
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
                for notice in taken.queue {
                    match notice {
                        ImageNotice::Quiesce(request, _) => request.reply(Ok(())),
                        ImageNotice::Closed => closed = true,
                        ImageNotice::Unquiesce(_) | ImageNotice::SnapshotDone(_) => unreachable!("no thread sent it"),
                    }
                }
            }
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(answers.load(Relaxed), 1);
        };
        holds(model, &[Mutant::BellBeforeMessage, Mutant::SilenceAfterTake]);
    }
}
