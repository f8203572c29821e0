//! Requests at depth against a model of the disk.

use std::time::Instant;

use super::*;
use crate::driver::Driver;
use crate::driver::load::SIZE;
use crate::prng::Prng;

/// Requests in flight over several rings against a model, in sectors. Two that overlap are never in flight together.
struct Model {
    /// What each sector holds; `None`: discarded, so anything.
    sectors: Vec<Option<u64>>,
    busy: Vec<bool>,
    asked: Vec<Option<Asked>>,
}

#[derive(Clone)]
struct Asked {
    sectors: std::ops::Range<usize>,
    read_to: Option<usize>,
}

/// Bytes of memory that each request has, and the longest transfer.
const ROOM: usize = 40 << 10;

const LONGEST: usize = 64;

impl Model {
    fn send(&mut self, guest: &mut Driver, queue: usize, id: usize, prng: &mut Prng, tag: u64) -> bool {
        let start = prng.below(self.sectors.len() as u64) as usize;
        let end = (start + 1 + prng.below(LONGEST as u64) as usize).min(self.sectors.len());
        if self.busy[start..end].contains(&true) {
            return false;
        }
        let (offset, len) = ((start * 512) as u64, (end - start) * 512);
        let at = id * ROOM + (prng.below(3) * prng.below(512)) as usize;
        let mut read_to = None;
        match prng.below(10) {
            0..=4 => {
                guest.fill(at, &tag.to_le_bytes().repeat(len / 8));
                guest.write(queue, offset, at, len, id as u64);
                self.sectors[start..end].fill(Some(tag));
            }
            5..=7 => {
                guest.fill(at, &vec![0xee; len]);
                guest.read(queue, offset, at, len, id as u64);
                read_to = Some(at);
            }
            8 => {
                guest.write_zeroes(queue, offset, len as u64, tag.is_multiple_of(2), id as u64);
                self.sectors[start..end].fill(Some(0));
            }
            _ => {
                guest.discard(queue, offset, len as u64, id as u64);
                self.sectors[start..end].fill(None);
            }
        }
        self.busy[start..end].fill(true);
        self.asked[id] = Some(Asked { sectors: start..end, read_to });
        true
    }

    fn answered(&mut self, guest: &Driver, id: usize) {
        let asked = self.asked[id].take().expect("answered once");
        self.busy[asked.sectors.clone()].fill(false);
        if let Some(at) = asked.read_to {
            let bytes = guest.fetch(at, asked.sectors.len() * 512);
            self.check(&bytes, asked.sectors);
        }
    }

    fn check(&self, bytes: &[u8], sectors: std::ops::Range<usize>) {
        for (sector, found) in sectors.zip(bytes.chunks(512)) {
            if let Some(tag) = self.sectors[sector] {
                assert!(found == tag.to_le_bytes().repeat(64), "sector {sector} does not hold {tag:#x}");
            }
        }
    }
}

pub fn requests_at_depth_64_over_four_rings_match_a_model(new_store: NewStore) {
    const QUEUES: usize = 4;
    const DEPTH: usize = 64;
    for (seed, mode) in (1u64..).zip(MODES) {
        let served = Served::new(new_store, &["--cache", mode]);
        let mut guest = served.connect(QUEUES, 256, QUEUES * DEPTH * ROOM);
        let sectors = SIZE / 512;
        let mut model =
            Model { sectors: vec![Some(0); sectors], busy: vec![false; sectors], asked: vec![None; QUEUES * DEPTH] };
        let mut prng = Prng::new(seed);
        let (mut sent, mut answered) = (0u64, 0u64);
        let end = Instant::now() + WAIT_TIMEOUT;
        while answered < 3000 {
            for queue in 0..QUEUES {
                for id in queue * DEPTH..(queue + 1) * DEPTH {
                    if sent < 3000
                        && model.asked[id].is_none()
                        && model.send(&mut guest, queue, id, &mut prng, sent + 1)
                    {
                        sent += 1;
                    }
                }
                guest.kick(queue);
                for (id, result) in guest.completed(queue) {
                    assert_eq!(result, 0, "{mode}, seed {seed}");
                    model.answered(&guest, id as usize);
                    answered += 1;
                }
            }
            assert!(Instant::now() < end, "{mode}: {answered} of {sent} were answered");
            std::thread::yield_now();
        }
        assert!(model.asked.iter().all(Option::is_none));
        let total = served.total_at_rest();
        let kinds = ["reads", "writes", "discards", "write-zeroes"];
        let counted: u64 = kinds.iter().map(|kind| total[kind].as_u64().unwrap()).sum();
        assert_eq!((counted, total["errors"].as_u64()), (3000, Some(0)));
        drop(guest);
        model.check(&served.end(), 0..sectors);
    }
}
