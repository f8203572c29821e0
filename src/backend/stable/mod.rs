//! Stable writes: what the medium reads of a write's buffer is the same however often it reads it.
//!
//! A guest may change a buffer while its write is under way: swap, NTFS and databases past their cache do. A medium that
//! reads the buffer more than once (both halves of a mirror, a parity, a checksum, a replica across the network) then
//! stores two different blocks, or a block that its own checksum does not fit. This layer stands directly in front of
//! an image. With `copy` it copies each write's data once into memory of ours before anything below sees it; with
//! `detect` it copies nothing and counts the writes whose buffer changed; otherwise it is not there at all: its queues
//! are the image's own.
//!
//! The point-in-time copy stands in front of this layer, not behind it. A write that it delays is not read while it
//! waits, so it needs no memory of ours until it goes on; its data is fixed when it is let go. (The other way round,
//! delayed writes would hold the pool's memory for as long as the copy's target takes.) What the copy saves it reads
//! from the image, which only ever got stable data.

mod copy;
mod detect;
mod status;

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;

use log::Level;

use super::bounce_pool::BouncePool;
use super::layer::Layer;
use super::{Backend, IoQueue};
use crate::disk::{Events, ImageStatus, StableWritesStatus};
use copy::CopyingQueue;
use detect::DetectingQueue;
use status::Tallies;

/// `--stable-writes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StableWrites {
    /// Copy exactly where the medium asks for stable buffers.
    #[default]
    Auto,
    /// Copy, except where the medium copies itself.
    Copy,
    /// Count what changes under way.
    Detect,
    /// Nothing.
    Off,
}

impl StableWrites {
    /// Its name on the command line and in the status.
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

    /// Errors say what is allowed.
    fn from_str(text: &str) -> Result<Self, String> {
        let all = [StableWrites::Auto, StableWrites::Copy, StableWrites::Detect, StableWrites::Off];
        all.into_iter().find(|one| one.name() == text).ok_or_else(|| "use auto, copy, detect or off".to_string())
    }
}

/// How what is below an image reads the buffer of a write, and how that is known: [`Backend::buffer_use`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BufferUse {
    /// It copies the data before it does anything else with it.
    Copies(String),
    /// It may read it more than once: it asks for buffers that stay as they are.
    ReadsTwice(String),
    /// Nothing is known that would read it more than once.
    ReadsOnce(String),
}

/// What is done: `asked` applied to the medium.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Effect {
    Copy,
    Detect,
    Off,
}

fn decide(asked: StableWrites, used: &BufferUse, read_only: bool) -> (Effect, String) {
    let (BufferUse::Copies(why) | BufferUse::ReadsTwice(why) | BufferUse::ReadsOnce(why)) = used;
    match (asked, used) {
        _ if read_only => (Effect::Off, "the image is read-only".into()),
        (StableWrites::Detect, _) => (Effect::Detect, why.clone()),
        (StableWrites::Off, BufferUse::ReadsTwice(why)) => {
            (Effect::Off, format!("as asked, although {why}: what a guest changes under way may be stored two ways"))
        }
        (StableWrites::Auto, BufferUse::ReadsTwice(why)) => (Effect::Copy, why.clone()),
        (StableWrites::Copy, BufferUse::ReadsTwice(why) | BufferUse::ReadsOnce(why)) => (Effect::Copy, why.clone()),
        (StableWrites::Copy, BufferUse::Copies(why)) => (Effect::Off, format!("not copied a second time: {why}")),
        (StableWrites::Auto | StableWrites::Off, _) => (Effect::Off, why.clone()),
    }
}

/// An image whose writes are stable. Wraps any back-end.
pub struct StableBackend {
    image: Arc<dyn Backend>,
    asked: StableWrites,
    effect: Effect,
    why: String,
    depot: Arc<BouncePool>,
    tallies: Arc<Tallies>,
}

impl StableBackend {
    /// Wraps `image`. Copies are made in `depot`'s memory; a queue waits for memory rather than exceed it. What `detect`
    /// sees is told to `events`. Called by whoever puts the parts together.
    pub fn new(image: Arc<dyn Backend>, asked: StableWrites, depot: Arc<BouncePool>, events: Arc<Events>) -> Self {
        let (effect, why) = decide(asked, &image.buffer_use(), image.geometry().read_only);
        let this = StableBackend { image, asked, effect, why, depot, tallies: Tallies::new(events) };
        // The default that changes nothing is no news.
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
        let mut status = self.tallies.status();
        status.asked = self.asked.to_string();
        status.in_effect = self.effect_name().into();
        status.why = self.why.clone();
        if self.effect == Effect::Copy {
            let (allocated, most) = self.depot.allocated();
            (status.memory_bytes, status.most_memory_bytes) = (allocated as u64, most as u64);
            status.shared_memory_limit = self.depot.limit() as u64;
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
            Effect::Copy => Box::new(CopyingQueue::open(&*self.image, depth, &self.depot, self.tallies.open())?),
            Effect::Detect => Box::new(DetectingQueue::open(&*self.image, depth, &self.tallies)?),
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
