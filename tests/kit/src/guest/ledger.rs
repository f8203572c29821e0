//! What a guest said that it keeps: the host's side of `life.sh`'s `keep`. A round's number is said when its eight
//! blocks were written and synced, so from then on each of them holds it, or a later round's.

use std::path::Path;

use super::{Vm, oracle};

const BLOCKS: u64 = 512;
const BLOCK: u64 = 4096;
const BLOCKS_A_ROUND: u64 = 8;
/// Rounds that may have begun after the last one that was heard of: a reset loses what was being said.
const UNHEARD: u64 = 3;

/// Bytes of the disk that a ledger takes.
pub const SIZE: u64 = BLOCKS * BLOCK;

/// One ledger.
pub struct Ledger {
    name: &'static str,
    device: &'static str,
    offset: u64,
    /// By block: the round that it holds at least.
    kept: Vec<u64>,
    /// The last round that was heard of.
    last: u64,
}

impl Ledger {
    /// Nothing kept yet. `name`: one word, for its lines; `offset`: where on the device it begins.
    pub fn new(name: &'static str, device: &'static str, offset: u64) -> Ledger {
        Ledger { name, device, offset, kept: vec![0; BLOCKS as usize], last: 0 }
    }

    /// Starts it, or starts it again after the guest was.
    pub fn start(&mut self, vm: &mut Vm) {
        vm.sh(&self.line());
    }

    /// The line of shell that starts it, or starts it again.
    pub fn line(&mut self) -> String {
        let Ledger { name, device, offset, .. } = self;
        // No round twice, or a block of the first life would pass for one of the second.
        self.last += UNHEARD + 1;
        format!("keep {device} {name} {offset} {}", self.last)
    }

    /// Takes notice of the lines that are its own. What was cut off by a reset is a smaller number, which is kept, too.
    pub fn hear(&mut self, lines: &[String]) {
        let start = format!("@kept {} ", self.name);
        for round in lines.iter().filter_map(|line| line.strip_prefix(&start)?.parse().ok()) {
            for block in Ledger::blocks_of(round) {
                self.kept[block] = self.kept[block].max(round);
            }
            self.last = self.last.max(round);
        }
    }

    fn blocks_of(round: u64) -> impl Iterator<Item = usize> {
        let first = round * BLOCKS_A_ROUND;
        (first..first + BLOCKS_A_ROUND).map(|block| (block * 37 % BLOCKS) as usize)
    }

    /// The image holds all that was kept, and nothing that was never written. Returns how many blocks were.
    pub fn check(&self, image: &Path) -> usize {
        let bytes = oracle::read_at(image, self.offset, SIZE as usize);
        for (block, bytes) in bytes.chunks(BLOCK as usize).enumerate() {
            // A block may be written in part when a server dies; a sector is not.
            for sector in bytes.chunks(512) {
                let round = u64::from_le_bytes(sector[..8].try_into().expect("eight bytes"));
                assert!(sector.chunks(8).all(|word| word == &sector[..8]), "{}: block {block} is mixed", self.name);
                let kept = self.kept[block];
                assert!(round >= kept, "{}: block {block} was of round {kept} and is of {round}", self.name);
                let its_own = round == 0 || Ledger::blocks_of(round).any(|of_it| of_it == block);
                assert!(its_own && round <= self.last + UNHEARD, "{}: block {block} has {round}", self.name);
            }
        }
        self.kept.iter().filter(|round| **round > 0).count()
    }
}
