//! The queue through which the image's back-end, and our threads that wait for the image's store, notify the control
//! thread. The back-end's threads must never block, so putting a notice into the queue never blocks.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Notices, QuiesceRequest};
use crate::base::sync::{EventNotifier, Mutex, MutexGuard};
use crate::disk::CopyError;
use crate::engine::Errno;

/// The most notices that wait for the control thread. A store sends one quiesce request at a time, and a control thread
/// that is so late would not reply to more of them in time.
const MAX_NOTICES: usize = 64;

/// A notice for the control thread, which handles notices in the order of their arrival.
pub(super) enum ImageNotice {
    /// The back-end called [`Notices::quiesce`] at this time.
    Quiesce(QuiesceRequest, Instant),
    /// The back-end called [`Notices::unquiesce`] at this time.
    Unquiesce(Instant),
    /// The thread that makes or removes snapshots of the image has finished: the snapshot's full name, or the error.
    SnapshotDone(Result<String, CopyError>),
    /// [`ImageNotices::close`] was called: no quiesce request follows, and one that is not granted yet must be refused.
    Closed,
}

/// The notices since the last [`NoticeInbox::take`].
#[derive(Default)]
pub(super) struct PendingNotices {
    pub(super) queue: VecDeque<ImageNotice>,
    /// The image's size in bytes, as [`Notices::resized`] reported it last.
    pub(super) resized: Option<u64>,
    /// [`Notices::state_changed`] was called at least once.
    pub(super) state_changed: bool,
    /// [`ImageNotices::close`] was called, now or earlier.
    pub(super) closed: bool,
}

/// The queue of notices. Any thread puts notices in, and the control thread takes them out.
pub(super) struct NoticeInbox {
    pending: Mutex<PendingNotices>,
    ready: EventNotifier,
}

impl NoticeInbox {
    fn new() -> io::Result<Self> {
        Ok(NoticeInbox { pending: Mutex::default(), ready: EventNotifier::new()? })
    }

    fn lock(&self) -> MutexGuard<'_, PendingNotices> {
        self.pending.lock().expect("no panic while held")
    }

    /// Changes the pending notices and wakes the control thread.
    fn change(&self, change: impl FnOnce(&mut PendingNotices)) {
        self.ready.notify_after(|| {
            change(&mut self.lock());
            true
        });
    }

    /// See [`ImageNotices::close`].
    pub(super) fn close(&self) {
        let unread = {
            let mut pending = self.lock();
            pending.closed = true;
            let unread = std::mem::take(&mut pending.queue);
            pending.queue.push_back(ImageNotice::Closed);
            unread
        };
        // Without the lock: dropping a quiesce request replies to it, which calls the back-end.
        for notice in unread {
            // The end of a snapshot must still be handled.
            if let ImageNotice::Unquiesce(_) | ImageNotice::SnapshotDone(_) = notice {
                self.lock().queue.push_back(notice);
            }
        }
        self.ready.notify();
    }

    /// Adds a notice. Any thread may call it.
    pub(super) fn put(&self, notice: ImageNotice) {
        self.change(|pending| pending.queue.push_back(notice));
    }

    /// Takes all notices. Called by the control thread when [`NoticeInbox::as_fd`] is readable.
    pub(super) fn take(&self) -> PendingNotices {
        self.ready.clear_before(|| {
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

/// The receiver of the back-end's notices, which passes them to the control thread. No method blocks, and none calls
/// the back-end except by replying to a quiesce request.
pub struct ImageNotices {
    inbox: Arc<NoticeInbox>,
}

impl ImageNotices {
    /// Creates the receiver for [`super::Server::start`] and [`crate::backend::ImageStore::start_notices`]. Until the
    /// server runs, notices wait in the queue. Fails when no file descriptor is left.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(ImageNotices { inbox: Arc::new(NoticeInbox::new()?) }))
    }

    /// Refuses quiesce requests (ECANCELED), because the daemon ends: later ones at once, and those that are not
    /// granted yet within a turn of the control thread. A hold that is granted continues, because the host that
    /// requested it relies on it. Called by the thread that ends the daemon, before
    /// [`crate::backend::ImageStore::stop_notices`].
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
        self.inbox.ready.notify_after(|| {
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
            // Two in a row mean the same as one.
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
    fn every_quiesce_request_gets_a_reply_and_the_queue_is_bounded() {
        let notices = ImageNotices::new().unwrap();
        let (sender, answers) = mpsc::channel();
        let ask = || {
            let sender = sender.clone();
            QuiesceRequest::new(move |result| sender.send(result).unwrap())
        };
        for _ in 0..MAX_NOTICES {
            notices.quiesce(ask());
        }
        assert!(answers.try_recv().is_err(), "the requests wait");
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

    /// Three threads send a quiesce request, a new size and the end: the control thread sees the end, and the request
    /// gets one reply, whether it came before the end or after.
    #[test]
    fn no_notice_is_missed_and_each_quiesce_request_gets_one_reply() {
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
        holds(model, &[Mutant::NotifyBeforeMessage, Mutant::ClearAfterTake]);
    }
}
