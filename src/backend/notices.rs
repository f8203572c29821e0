//! What a back-end reports without being asked, to the rest of the daemon: the image was resized, another client is
//! about to take a snapshot of it, its state changed. A network image reports these; a file reports nothing.

use crate::engine::Errno;

/// Receives a back-end's notices. A thread of the back-end calls the methods, which must not block and must not call
/// the back-end.
pub trait Notices: Send + Sync {
    /// [`super::Geometry::size`] is now `size` bytes. May be called when nothing changed.
    fn resized(&self, size: u64);

    /// Another client is about to take a snapshot of the image and waits until the disk is quiet.
    fn quiesce(&self, ask: QuiesceAsk);

    /// The snapshot was taken or given up. May be called without a `quiesce`, and after one that was refused.
    fn unquiesce(&self);

    /// [`super::ImageInfo::image_status`] changed, so that an event can be sent.
    fn state_changed(&self);
}

/// Delivers the result of a [`QuiesceAsk`] to the client.
type Answer = Box<dyn FnOnce(Result<(), Errno>) + Send>;

/// A request to quiesce the disk. It gets exactly one reply: by [`QuiesceAsk::answer`], or ECANCELED when it is
/// dropped.
pub struct QuiesceAsk {
    answer: Option<Answer>,
}

impl QuiesceAsk {
    /// Any thread calls `answer`, once. It must not block.
    pub fn new(answer: impl FnOnce(Result<(), Errno>) + Send + 'static) -> Self {
        QuiesceAsk { answer: Some(Box::new(answer)) }
    }

    /// Replies. `Ok` means that nothing that changes the image is in flight and everything acknowledged is durable.
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
    fn a_quiesce_request_gets_exactly_one_reply() {
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
