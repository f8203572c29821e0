//! A back-end in front of another, and its queues. A layer implements [`Layer`] and [`LayerQueue`], and of those only the
//! methods whose result it changes. All others are passed on here, once, so that no layer can forget a method that the
//! back-end below implements.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::{
    Backend, BlockingCall, BufferUse, Caller, Completion, Errno, Geometry, ImageEnds, IoQueue, Notices, Op, OpId,
    Source, Wakeups,
};
use crate::disk::{ImageSnapshots, ImageStatus};

/// The part of a [`Backend`] that a layer may change. A type that implements `Layer` is a [`Backend`].
pub trait Layer: Send + Sync {
    /// The back-end below.
    fn image(&self) -> &dyn Backend;

    /// [`Backend::open_queue`].
    fn open_layer(&self, depth: usize) -> io::Result<Box<dyn IoQueue>>;

    /// [`Backend::activate`].
    fn activate_layer(&self) -> io::Result<()> {
        self.image().activate()
    }

    /// [`Backend::activate_for_hold`].
    fn activate_layer_for_hold(&self) -> io::Result<bool> {
        self.image().activate_for_hold()
    }

    /// [`Backend::deactivate`].
    fn deactivate_layer(&self) {
        self.image().deactivate();
    }

    /// [`Backend::describe`], given the description of the back-end below.
    fn layer_description(&self, image: String) -> String {
        image
    }

    /// [`Backend::buffer_use`], given that of the back-end below.
    fn layer_buffer_use(&self, image: BufferUse) -> BufferUse {
        image
    }

    /// [`Backend::image_status`], given that of the back-end below.
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

    fn describe(&self) -> String {
        self.layer_description(self.image().describe())
    }

    fn path(&self) -> Option<&Path> {
        self.image().path()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        self.image().next_data(offset)
    }

    fn ends(&self) -> io::Result<ImageEnds> {
        self.image().ends()
    }

    fn buffer_use(&self) -> BufferUse {
        self.layer_buffer_use(self.image().buffer_use())
    }

    fn sync_failed(&self) -> Option<Errno> {
        self.image().sync_failed()
    }

    fn start_notices(&self, notices: Arc<dyn Notices>) {
        self.image().start_notices(notices);
    }

    fn stop_notices(&self) {
        self.image().stop_notices();
    }

    fn activate(&self) -> io::Result<()> {
        self.activate_layer()
    }

    fn activate_for_hold(&self) -> io::Result<bool> {
        self.activate_layer_for_hold()
    }

    fn gives_way(&self) -> bool {
        self.image().gives_way()
    }

    fn deactivate(&self) {
        self.deactivate_layer();
    }

    fn identity(&self) -> Option<String> {
        self.image().identity()
    }

    fn wait_until_releasable(&self) {
        self.image().wait_until_releasable();
    }

    fn hand_over(&self) {
        self.image().hand_over();
    }

    fn take_over(&self) -> io::Result<()> {
        self.image().take_over()
    }

    fn resize(&self, grow_to: Option<u64>, shrink: bool) -> io::Result<u64> {
        self.image().resize(grow_to, shrink)
    }

    fn image_status(&self) -> ImageStatus {
        self.layer_status(self.image().image_status())
    }

    fn snapshots(&self) -> Option<Arc<dyn ImageSnapshots>> {
        self.image().snapshots()
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

    /// [`IoQueue::has_news`].
    fn layer_has_news(&mut self) -> bool {
        self.inner().has_news()
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

    fn has_news(&mut self) -> bool {
        self.layer_has_news()
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
