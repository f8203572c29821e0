//! What a back-end reports without being asked, to the rest of the daemon: the image was resized, another client is
//! about to take a snapshot of it, its state changed. A network image reports these; a file reports nothing.

use crate::engine::Errno;

/// Receives a back-end's notices. A thread of the back-end calls the methods, which must not block and must not call
/// the back-end.
pub trait Notices: Send + Sync {
    /// [`super::Geometry::size`] is now `size` bytes. May be called when nothing changed.
    fn resized(&self, size: u64);

    /// Another client is about to take a snapshot of the image and waits until the disk is quiet.
    fn quiesce(&self, request: QuiesceRequest);

    /// The snapshot was taken or given up. May be called without a `quiesce`, and after one that was refused.
    fn unquiesce(&self);

    /// [`super::ImageInfo::image_status`] changed, so that an event can be sent.
    fn state_changed(&self);
}

/// Delivers the result of a [`QuiesceRequest`] to the client.
type Reply = Box<dyn FnOnce(Result<(), Errno>) + Send>;

/// A request to quiesce the disk. It gets exactly one reply: by [`QuiesceRequest::reply`], or ECANCELED when it is
/// dropped.
pub struct QuiesceRequest {
    reply: Option<Reply>,
}

impl QuiesceRequest {
    /// Any thread calls `reply`, once. It must not block.
    pub fn new(reply: impl FnOnce(Result<(), Errno>) + Send + 'static) -> Self {
        QuiesceRequest { reply: Some(Box::new(reply)) }
    }

    /// Replies. `Ok` means that nothing that changes the image is in flight and everything acknowledged is durable.
    pub fn reply(mut self, result: Result<(), Errno>) {
        if let Some(reply) = self.reply.take() {
            reply(result);
        }
    }
}

impl Drop for QuiesceRequest {
    fn drop(&mut self) {
        if let Some(reply) = self.reply.take() {
            reply(Err(Errno(libc::ECANCELED)));
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
            QuiesceRequest::new(move |result| sender.send(result).unwrap())
        };
        ask(&sender).reply(Ok(()));
        drop(ask(&sender));
        drop(sender);
        assert_eq!(answers.iter().collect::<Vec<_>>(), [Ok(()), Err(Errno(libc::ECANCELED))]);
    }
}
