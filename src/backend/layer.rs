//! A back-end in front of another, and its queues. A layer implements [`Layer`] and [`LayerQueue`], and of those only the
//! methods whose result it changes. All others are passed on here, once, so that no layer can forget a method that the
//! back-end below implements.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use super::{
    Backend, BlockingCall, BufferUse, Caller, Completion, Errno, Geometry, ImageClaim, ImageEnds, ImageInfo,
    ImageStore, ImageUpgrade, IoQueue, Op, OpId, Source, Wakeups,
};
use crate::disk::ImageStatus;

/// The part of a [`Backend`] that a layer may change. A type that implements `Layer` is a [`Backend`].
pub trait Layer: Send + Sync {
    /// The back-end below.
    fn image(&self) -> &dyn Backend;

    /// [`Backend::open_queue`].
    fn open_layer(&self, depth: usize) -> io::Result<Box<dyn IoQueue>>;

    /// [`Backend::claim`].
    fn layer_claim(&self) -> &dyn ImageClaim {
        self.image().claim()
    }

    /// [`Backend::describe`], given the description of the back-end below.
    fn layer_description(&self, image: String) -> String {
        image
    }

    /// [`ImageInfo::buffer_use`], given that of the back-end below.
    fn layer_buffer_use(&self, image: BufferUse) -> BufferUse {
        image
    }

    /// [`ImageInfo::image_status`], given that of the back-end below.
    fn layer_status(&self, image: ImageStatus) -> ImageStatus {
        image
    }
}

impl<L: Layer> Backend for L {
    fn geometry(&self) -> Geometry {
        self.image().geometry()
    }

    fn open_queue(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        self.open_layer(depth)
    }

    fn sync(&self) -> io::Result<()> {
        self.image().sync()
    }

    fn sync_failed(&self) -> Option<Errno> {
        self.image().sync_failed()
    }

    fn describe(&self) -> String {
        self.layer_description(self.image().describe())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.image().next_data(offset)
    }

    fn resize(&self, grow_to: Option<u64>, shrink: bool) -> io::Result<u64> {
        self.image().resize(grow_to, shrink)
    }

    fn info(&self) -> &dyn ImageInfo {
        self
    }

    fn claim(&self) -> &dyn ImageClaim {
        self.layer_claim()
    }

    fn for_upgrade(&self) -> &dyn ImageUpgrade {
        self.image().for_upgrade()
    }

    fn store(&self) -> &dyn ImageStore {
        self.image().store()
    }
}

impl<L: Layer> ImageInfo for L {
    fn path(&self) -> Option<&Path> {
        self.image().info().path()
    }

    fn ends(&self) -> io::Result<ImageEnds> {
        self.image().info().ends()
    }

    fn buffer_use(&self) -> BufferUse {
        self.layer_buffer_use(self.image().info().buffer_use())
    }

    fn image_status(&self) -> ImageStatus {
        self.layer_status(self.image().info().image_status())
    }
}

/// The part of an [`IoQueue`] that a layer's queue may change. A type that implements `LayerQueue` is an [`IoQueue`].
pub trait LayerQueue: Send {
    /// The queue of the back-end below.
    fn inner(&mut self) -> &mut dyn IoQueue;

    /// [`IoQueue::push`].
    fn layer_push(&mut self, op: Op, id: OpId) -> Result<(), Op>;

    /// [`IoQueue::submit`].
    fn layer_submit(&mut self) -> io::Result<()> {
        self.inner().submit()
    }

    /// [`IoQueue::reap`].
    fn layer_reap(&mut self, out: &mut Vec<Completion>) {
        self.inner().reap(out);
    }

    /// [`IoQueue::watch`].
    fn layer_watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.inner().watch(source, fd)
    }

    /// [`IoQueue::has_completions`].
    fn layer_has_completions(&mut self) -> bool {
        self.inner().has_completions()
    }

    /// [`IoQueue::wait`].
    fn layer_wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        self.inner().wait(timeout)
    }
}

impl<Q: LayerQueue> IoQueue for Q {
    fn push(&mut self, op: Op, id: OpId) -> Result<(), Op> {
        self.layer_push(op, id)
    }

    fn submit(&mut self) -> io::Result<()> {
        self.layer_submit()
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.layer_reap(out);
    }

    fn watch(&mut self, source: Source, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.layer_watch(source, fd)
    }

    fn has_completions(&mut self) -> bool {
        self.layer_has_completions()
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Wakeups> {
        self.layer_wait(timeout)
    }

    fn caller(&mut self) -> Option<Box<dyn Caller>> {
        self.inner().caller()
    }

    fn next_call(&mut self) -> Option<BlockingCall> {
        self.inner().next_call()
    }

    fn call_made(&mut self, call: BlockingCall) {
        self.inner().call_made(call);
    }

    fn change_thread(&mut self) -> io::Result<()> {
        self.inner().change_thread()
    }
}
