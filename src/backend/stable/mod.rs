//! Stable writes: the medium reads the same data of a write's buffer, however often it reads the buffer.
//!
//! A guest may change a buffer while its write is in flight: swap, NTFS and databases with direct I/O do. A medium that
//! reads the buffer more than once (both halves of a mirror, a parity, a checksum, a replica across the network) then
//! stores two different blocks, or a block that does not match its checksum. This layer is directly in front of an image.
//! With `copy` it copies each write's data once into the daemon's memory before anything below reads it. With `detect` it
//! copies nothing and counts the writes whose buffer changed. Otherwise its queues are the image's own.
//!
//! The point-in-time copy is in front of this layer, not behind it. It does not read a write that it delays, so the write
//! needs no bounce buffer until it continues; its data is fixed at that moment. (The other way round, delayed writes would
//! occupy the bounce pool for as long as the copy's target takes.) The point-in-time copy reads old data from the image,
//! which only got stable data.

mod copying_queue;
mod counters;
mod detecting_queue;

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;

use log::Level;

use super::bounce_pool::BouncePool;
use super::layer::Layer;
use super::{Backend, IoQueue};
use crate::disk::{Events, ImageStatus, StableWritesStatus};
use copying_queue::CopyingQueue;
use counters::ImageCounters;
use detecting_queue::DetectingQueue;

/// The option `--stable-writes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StableWrites {
    /// Copy if the medium asks for stable buffers.
    #[default]
    Auto,
    /// Copy, unless the medium copies the data itself.
    Copy,
    /// Count the writes whose buffer changes in flight.
    Detect,
    /// Do nothing.
    Off,
}

impl StableWrites {
    /// The value's name on the command line and in the status.
    pub fn name(self) -> &'static str {
        match self {
            StableWrites::Auto => "auto",
            StableWrites::Copy => "copy",
            StableWrites::Detect => "detect",
            StableWrites::Off => "off",
        }
    }
}

impl fmt::Display for StableWrites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for StableWrites {
    type Err = String;

    /// Parses a [`StableWrites::name`]. The error lists the names.
    fn from_str(text: &str) -> Result<Self, String> {
        let all = [StableWrites::Auto, StableWrites::Copy, StableWrites::Detect, StableWrites::Off];
        all.into_iter().find(|one| one.name() == text).ok_or_else(|| "use auto, copy, detect or off".to_string())
    }
}

/// How the medium reads the buffer of a write, and in words how that is known: [`ImageInfo::buffer_use`](super::ImageInfo::buffer_use).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BufferUse {
    /// The medium copies the data before it uses it.
    Copies(String),
    /// The medium may read the buffer more than once, so it asks for buffers that do not change.
    ReadsTwice(String),
    /// No part of the medium is known to read the buffer more than once.
    ReadsOnce(String),
}

/// What the layer does: the option applied to the medium.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Effect {
    Copy,
    Detect,
    Off,
}

/// Decides what the layer does, and says why, for the log and the status.
fn decide(asked: StableWrites, used: &BufferUse, read_only: bool) -> (Effect, String) {
    let (BufferUse::Copies(why) | BufferUse::ReadsTwice(why) | BufferUse::ReadsOnce(why)) = used;
    match (asked, used) {
        _ if read_only => (Effect::Off, "the image is read-only".into()),
        (StableWrites::Detect, _) => (Effect::Detect, why.clone()),
        (StableWrites::Off, BufferUse::ReadsTwice(why)) => {
            let risk = "data that a guest changes while its write is in flight may be stored inconsistently";
            (Effect::Off, format!("as asked, although {why}: {risk}"))
        }
        (StableWrites::Auto, BufferUse::ReadsTwice(why)) => (Effect::Copy, why.clone()),
        (StableWrites::Copy, BufferUse::ReadsTwice(why) | BufferUse::ReadsOnce(why)) => (Effect::Copy, why.clone()),
        (StableWrites::Copy, BufferUse::Copies(why)) => (Effect::Off, format!("not copied a second time: {why}")),
        (StableWrites::Auto | StableWrites::Off, _) => (Effect::Off, why.clone()),
    }
}

/// A back-end that wraps another and makes its writes stable.
pub struct StableBackend {
    image: Arc<dyn Backend>,
    asked: StableWrites,
    effect: Effect,
    why: String,
    bounce_pool: Arc<BouncePool>,
    counters: Arc<ImageCounters>,
}

impl StableBackend {
    /// Wraps `image`. Copies use the memory of `bounce_pool`; a queue that gets none waits for it. With `detect`, `events`
    /// receives an event for a changed buffer. Called when the server is put together.
    pub fn new(
        image: Arc<dyn Backend>,
        asked: StableWrites,
        bounce_pool: Arc<BouncePool>,
        events: Arc<Events>,
    ) -> Self {
        let (effect, why) = decide(asked, &image.info().buffer_use(), image.geometry().read_only);
        let this = StableBackend { image, asked, effect, why, bounce_pool, counters: ImageCounters::new(events) };
        // Without effect, as by default, this line is of use for debugging only.
        let level = if this.effect == Effect::Off && asked == StableWrites::Auto { Level::Debug } else { Level::Info };
        log::log!(level, "stable writes: {} ({asked} was asked for): {}", this.effect_name(), this.why);
        this
    }

    fn effect_name(&self) -> &'static str {
        match self.effect {
            Effect::Copy => "copy",
            Effect::Detect => "detect",
            Effect::Off => "off",
        }
    }

    fn status(&self) -> StableWritesStatus {
        let mut status = self.counters.status();
        status.asked = self.asked.to_string();
        status.in_effect = self.effect_name().into();
        status.why = self.why.clone();
        if self.effect == Effect::Copy {
            let (allocated, most) = self.bounce_pool.allocated();
            (status.memory_bytes, status.most_memory_bytes) = (allocated as u64, most as u64);
            status.shared_memory_limit = self.bounce_pool.limit() as u64;
        }
        status
    }
}

impl Layer for StableBackend {
    fn image(&self) -> &dyn Backend {
        &*self.image
    }

    fn open_layer(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        Ok(match self.effect {
            Effect::Copy => {
                Box::new(CopyingQueue::open(&*self.image, depth, &self.bounce_pool, self.counters.add_queue())?)
            }
            Effect::Detect => Box::new(DetectingQueue::open(&*self.image, depth, &self.counters)?),
            Effect::Off => self.image.open_queue(depth)?,
        })
    }

    fn layer_buffer_use(&self, image: BufferUse) -> BufferUse {
        match self.effect {
            Effect::Copy => BufferUse::Copies("its writes are copied before anything reads them".into()),
            Effect::Detect | Effect::Off => image,
        }
    }

    fn layer_status(&self, image: ImageStatus) -> ImageStatus {
        ImageStatus { stable_writes: Some(self.status()), ..image }
    }
}
