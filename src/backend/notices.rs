//! What a back-end says of its own accord, and how the rest of the daemon listens: the image was resized, somebody is
//! about to take a snapshot of it, its state changed. A file says nothing; a network image does.

use crate::engine::Errno;

/// Listens to a back-end. Every method is called from a thread of the back-end's, must not block and must not call the
/// back-end.
pub trait Notices: Send + Sync {
    /// [`super::Geometry::size`] is now this, in bytes. May come when nothing changed.
    fn resized(&self, size: u64);

    /// Somebody outside is about to take a snapshot of the image and waits until the disk is held still.
    fn quiesce(&self, ask: QuiesceAsk);

    /// The snapshot was taken or given up. May come without a quiesce, and after one that was refused.
    fn unquiesce(&self);

    /// [`super::Backend::image_status`] changed: for an event.
    fn state_changed(&self);
}

/// How the answer to a [`QuiesceAsk`] travels back.
type Answer = Box<dyn FnOnce(Result<(), Errno>) + Send>;

/// A request to hold the disk still, answered exactly once: by [`QuiesceAsk::answer`], or with ECANCELED when it is
/// dropped.
pub struct QuiesceAsk {
    answer: Option<Answer>,
}

impl QuiesceAsk {
    /// `answer` is called once, from any thread. It must not block.
    pub fn new(answer: impl FnOnce(Result<(), Errno>) + Send + 'static) -> Self {
        QuiesceAsk { answer: Some(Box::new(answer)) }
    }

    /// `Ok`: nothing that changes the image is in flight, and everything acknowledged is durable.
    pub fn answer(mut self, result: Result<(), Errno>) {
        if let Some(answer) = self.answer.take() {
            answer(result);
        }
    }
}

impl Drop for QuiesceAsk {
    fn drop(&mut self) {
        if let Some(answer) = self.answer.take() {
            answer(Err(Errno(libc::ECANCELED)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn an_ask_is_answered_exactly_once() {
        let (sender, answers) = mpsc::channel();
        let ask = |sender: &mpsc::Sender<_>| {
            let sender = sender.clone();
            QuiesceAsk::new(move |result| sender.send(result).unwrap())
        };
        ask(&sender).answer(Ok(()));
        drop(ask(&sender));
        drop(sender);
        assert_eq!(answers.iter().collect::<Vec<_>>(), [Ok(()), Err(Errno(libc::ECANCELED))]);
    }
}
