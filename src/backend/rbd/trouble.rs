//! Why an image cannot be used as it should.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use super::keeper::News;

/// The image's trouble, if it is in one. Asked for every op, so its answers cost a load.
#[derive(Default)]
pub(super) struct Trouble {
    /// Shut out of the cluster, for good.
    fenced: AtomicBool,
    /// Another client has the lock.
    locked_out: AtomicBool,
}

impl Trouble {
    pub(super) fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Acquire)
    }

    /// The cluster refuses us.
    pub(super) fn fenced(&self, image: &str, news: &mpsc::Sender<News>) {
        if !self.fenced.swap(true, Ordering::AcqRel) {
            log::error!("{image}: fenced: {}", FENCED.1);
            tell(news);
        }
    }

    /// A write was refused.
    pub(super) fn locked_out(&self, image: &str, news: &mpsc::Sender<News>) {
        if !self.locked_out.swap(true, Ordering::AcqRel) {
            log::error!("{image}: lock lost: {}", LOCKED_OUT.1);
            tell(news);
        }
    }

    /// The lock was taken, or a flush went through.
    pub(super) fn is_writable_again(&self, news: &mpsc::Sender<News>) {
        if self.locked_out.load(Ordering::Relaxed) && self.locked_out.swap(false, Ordering::AcqRel) {
            tell(news);
        }
    }

    /// One word for programs, and the cause and the mend for people.
    pub(super) fn status(&self) -> Option<(String, String)> {
        let (word, detail) = if self.is_fenced() {
            FENCED
        } else if self.locked_out.load(Ordering::Acquire) {
            LOCKED_OUT
        } else {
            return None;
        };
        Some((word.to_string(), detail.to_string()))
    }
}

const FENCED: (&str, &str) = (
    "fenced",
    "the cluster has shut this client out (blocklisted): another client took the image over, or an operator did it. \
     Nothing more is read or written. If this disk is to have the image, end virtioblkd and start it again, and reset \
     the guest",
);
const LOCKED_OUT: (&str, &str) = (
    "lock-lost",
    "another client has the image's exclusive lock, so nothing is written. See who (rbd lock ls), and end it or this \
     one",
);

fn tell(news: &mpsc::Sender<News>) {
    // Nobody listens before notices are wanted and after they were stopped; the status has it.
    let _ = news.send(News::StateChanged);
}
