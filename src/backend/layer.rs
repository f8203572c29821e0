//! A back-end in front of another. What a layer does not say itself it passes on: all of it is here, once, so that no
//! layer can forget a question that the image below has an answer to.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::{Backend, BufferUse, Errno, Geometry, ImageEnds, IoQueue, Notices};
use crate::disk::{ImageSnapshots, ImageStatus};

/// What a layer says itself. Whoever implements it is a [`Backend`].
pub trait Layer: Send + Sync {
    /// What is below.
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

    /// [`Backend::describe`], made of the image's.
    fn layer_description(&self, image: String) -> String {
        image
    }

    /// [`Backend::buffer_use`], made of the image's.
    fn layer_buffer_use(&self, image: BufferUse) -> BufferUse {
        image
    }

    /// [`Backend::image_status`], made of the image's.
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
