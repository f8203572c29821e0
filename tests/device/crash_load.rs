//! A RAM disk with a volatile cache that completes in any order, and a driver that remembers what it was promised.

use std::sync::Arc;
use std::time::Instant;

use kit::front_end::*;
use kit::rig;
use kit::rig::Prng;
use virtioblkd::backend::mem::{CompletionOrder, MemBackend, MemOptions};
use virtioblkd::backend::{DurableWrite, Errno};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::DeviceOptions;

pub(super) const OK: u8 = 0;

pub(super) const IOERR: u8 = 1;

pub(super) const BLOCKS: usize = 64;

pub(super) const BLOCK: usize = 512;

pub(super) const RINGS: usize = 2;

pub(super) const EIO: Errno = Errno(5);

pub(super) const ENOSPC: Errno = Errno(28);

/// A served RAM disk.
pub(super) struct Rig {
    pub(super) memory: Arc<MemBackend>,
    pub(super) rig: rig::Rig,
}

impl Rig {
    pub(super) fn new(mode: CacheMode, durable_write: DurableWrite, order: CompletionOrder) -> Rig {
        let options = MemOptions { order, durable_write, ..MemOptions::new((BLOCKS * BLOCK) as u64) };
        let memory = Arc::new(MemBackend::new(options));
        let options = DeviceOptions { mode, num_queues: 4, queue_size: 256, serial: String::new() };
        Rig { rig: rig::Rig::on(memory.clone(), &options), memory }
    }

    pub(super) fn connect(&self, mask: u64) -> FrontEnd {
        FrontEnd::connect(&self.path, RINGS, 256, mask)
    }
}

impl std::ops::Deref for Rig {
    type Target = rig::Rig;

    fn deref(&self) -> &rig::Rig {
        &self.rig
    }
}

/// When the driver takes a write for durable.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Promise {
    /// As soon as it is acknowledged.
    Acknowledged,
    /// When a flush that was sent after its acknowledgement is acknowledged.
    Flushed,
    /// When an operator's hold has settled since.
    Held,
}

/// What a block may hold.
#[derive(Clone, Default)]
pub(super) struct Block {
    /// Every change sent, oldest first: its number and what it leaves in each eight bytes of the block.
    pub(super) changes: Vec<(u64, u64)>,
    pub(super) acknowledged: u64,
    /// The newest change that was promised to be durable.
    pub(super) promised: u64,
    pub(super) busy: bool,
}

/// A request in a ring.
pub(super) enum Sent {
    /// Changes these blocks.
    Change { number: u64, blocks: std::ops::Range<usize> },
    /// A flush, and what had been acknowledged when it was sent.
    Flush(Vec<u64>),
}

/// A driver that keeps both rings full of writes, write-zeroes, discards and flushes, never two changes of one block
/// at once, and remembers what it may rely on.
pub(super) struct Load {
    pub(super) guest: FrontEnd,
    pub(super) promise: Promise,
    pub(super) prng: Prng,
    pub(super) blocks: Vec<Block>,
    pub(super) sent: [Vec<(u16, Sent)>; RINGS],
    pub(super) last: u64,
    pub(super) answered: u64,
}

impl Load {
    pub(super) fn new(guest: FrontEnd, promise: Promise, seed: u64) -> Load {
        let blocks = vec![Block { changes: vec![(0, 0)], ..Block::default() }; BLOCKS];
        Load { guest, promise, prng: Prng::new(seed), blocks, sent: [vec![], vec![]], last: 0, answered: 0 }
    }

    pub(super) fn send(&mut self, ring: usize) {
        if self.prng.below(8) == 0 {
            let covered = self.blocks.iter().map(|block| block.acknowledged).collect();
            let slot = self.guest.add(ring, FLUSH, 0, &[], 0);
            self.sent[ring].push((slot, Sent::Flush(covered)));
            return;
        }
        let start = self.prng.below(BLOCKS as u64) as usize;
        let end = (start + 1 + self.prng.below(4) as usize).min(BLOCKS);
        if self.blocks[start..end].iter().any(|block| block.busy) {
            return;
        }
        self.last += 1;
        let number = self.last;
        let mut range = (start as u64).to_le_bytes().to_vec();
        range.extend(((end - start) as u32).to_le_bytes());
        range.extend(0u32.to_le_bytes());
        let (slot, content) = match self.prng.below(8) {
            0 => (self.guest.add(ring, WRITE_ZEROES, 0, &range, 0), 0),
            1 => (self.guest.add(ring, DISCARD, 0, &range, 0), u64::from_le_bytes([0xdb; 8])),
            _ => {
                let data = number.to_le_bytes().repeat((end - start) * BLOCK / 8);
                (self.guest.add(ring, OUT, start as u64, &data, 0), number)
            }
        };
        for block in &mut self.blocks[start..end] {
            block.changes.push((number, content));
            block.busy = true;
        }
        self.sent[ring].push((slot, Sent::Change { number, blocks: start..end }));
    }

    pub(super) fn take_answers(&mut self) {
        for ring in 0..RINGS {
            while let Some((head, _)) = self.guest.used(ring) {
                let slot = (head / 4) as u16;
                assert_eq!(self.guest.status(ring, slot), OK);
                self.guest.give_back(ring, slot);
                let at = self.sent[ring].iter().position(|(sent, _)| *sent == slot).expect("answered once");
                let (_, sent) = self.sent[ring].swap_remove(at);
                self.answered += 1;
                self.answer(sent);
            }
        }
    }

    pub(super) fn answer(&mut self, sent: Sent) {
        match sent {
            Sent::Change { number, blocks } => {
                for block in &mut self.blocks[blocks] {
                    block.acknowledged = number;
                    block.busy = false;
                    if self.promise == Promise::Acknowledged {
                        block.promised = number;
                    }
                }
            }
            Sent::Flush(_) if self.promise == Promise::Held => {}
            Sent::Flush(covered) => {
                for (block, covered) in self.blocks.iter_mut().zip(covered) {
                    block.promised = block.promised.max(covered);
                }
            }
        }
    }

    /// Works until so many more requests were answered.
    pub(super) fn work(&mut self, requests: u64) {
        let goal = self.answered + requests;
        let end = Instant::now() + WAIT_TIMEOUT;
        while self.answered < goal {
            for ring in 0..RINGS {
                while self.sent[ring].len() < 12 && self.prng.below(4) > 0 {
                    self.send(ring);
                }
                self.guest.kick(ring);
            }
            self.take_answers();
            assert!(Instant::now() < end, "the rings stand still at {} of {goal}", self.answered);
            std::thread::yield_now();
        }
    }

    /// A hold has settled: whatever was acknowledged is promised.
    pub(super) fn held(&mut self) {
        self.take_answers();
        for block in &mut self.blocks {
            block.promised = block.acknowledged;
        }
    }

    /// The first broken promise in what a crash left, if there is one.
    pub(super) fn broken(&self, image: &[u8]) -> Option<String> {
        for (at, block) in self.blocks.iter().enumerate() {
            let words: Vec<u64> = image[at * BLOCK..(at + 1) * BLOCK]
                .chunks(8)
                .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
                .collect();
            if words.iter().any(|word| *word != words[0]) {
                return Some(format!("block {at} is torn"));
            }
            let fits = |&&(number, content): &&(u64, u64)| number >= block.promised && content == words[0];
            if block.changes.iter().find(fits).is_none() {
                return Some(format!("block {at} holds {:#x}, promised was change {}", words[0], block.promised));
            }
        }
        None
    }
}
