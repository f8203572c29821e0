//! Claims on blocks, and which of them must wait for which.
//!
//! An op claims some blocks *whole* (it overwrites all of their bytes) and at most two *partly* (a read-modify-write).
//! Two claims exclude each other if one of them is of a part. The earlier one goes first, whether it was granted or
//! waits itself, so a claim waits for earlier claims only, and there is no deadlock and no starvation.
//!
//! A guest chooses how many claims there are, how long and where. Comparing each with all others would cost the square
//! of their number. Here blocks are the leaves of a tree, in which each node covers [`FANOUT`] nodes of the level
//! below. A claim of whole blocks is listed in the few nodes that make up its range. A claim of a part is listed in its
//! leaf and in all nodes above that. So two claims that exclude each other meet in exactly one node, or in the same leaf.
//! Each node lists its claims in the order of arrival. When the earliest of one kind goes, the claims of the other kind
//! up to the next earliest have one reason less to wait. So each claim is visited once for each of its nodes, however
//! many claims there are.
//!
//! Levels above the leaves are kept only from the first claim on that is long enough to be listed there, until no claim is
//! left. A read-modify-write of one block among others of one block costs one node.

use std::collections::HashMap;
use std::collections::hash_map::{Entry, RandomState};
use std::hash::{BuildHasher, Hasher};
use std::ops::Range;

use super::claim_set::ClaimSet;

/// The number of a claim. Later claims have higher numbers.
pub(super) type ClaimId = u64;

/// Binary logarithm of the nodes below one node.
const FANOUT_BITS: u32 = 2;
const FANOUT: u64 = 1 << FANOUT_BITS;

/// Levels of nodes above the leaves. A node of the highest covers 65,536 blocks, 256 MiB of 4 KiB blocks; an op is 1
/// GiB long at most, so it is listed in few of them.
const TOP_LEVEL: u32 = 8;

/// Blocks that one op claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    /// Blocks of which the op overwrites every byte.
    pub(super) whole: Range<u64>,
    /// Blocks of which it overwrites a part: the first, the last.
    pub(super) partial: [Option<u64>; 2],
}

impl Blocks {
    /// Blocks of `1 << block_bits` bytes that an op on these bytes writes.
    #[inline]
    pub(super) fn written(bytes: Range<u64>, block_bits: u32) -> Self {
        let mask = (1 << block_bits) - 1;
        let (first, last) = (bytes.start >> block_bits, bytes.end >> block_bits);
        let head = (bytes.start & mask != 0).then_some(first);
        let tail = (bytes.end & mask != 0).then_some(last).filter(|&tail| head != Some(tail));
        let start = first + u64::from(head.is_some());
        Blocks { whole: start..last.max(start), partial: [head, tail] }
    }

    /// Blocks that lie entirely in these bytes: an op that leaves the rest alone.
    pub(super) fn inside(bytes: Range<u64>, block_bits: u32) -> Self {
        let whole = Self::written(bytes, block_bits).whole;
        Blocks { whole, partial: [None, None] }
    }

    #[inline]
    pub(super) fn has_partial(&self) -> bool {
        self.partial != [None, None]
    }

    pub(super) fn partial(&self) -> impl Iterator<Item = u64> + use<> {
        self.partial.into_iter().flatten()
    }
}

/// All claims, granted and waiting.
#[derive(Default)]
pub(super) struct Claims {
    nodes: HashMap<NodeId, Node, NodeHasher>,
    /// The highest level that is kept.
    level: u32,
    /// Nodes and claims that were visited.
    #[cfg(test)]
    pub(super) steps: u64,
}

/// A node: its number in its level, and the level.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct NodeId(u64);

impl NodeId {
    /// The node of this level above a block.
    fn above(level: u32, block: u64) -> Self {
        Self::new(level, block >> (level * FANOUT_BITS))
    }

    /// Images end below 2^63 bytes and blocks have 512 bytes or more, so four bits are left for the level.
    fn new(level: u32, index: u64) -> Self {
        NodeId(index << 4 | u64::from(level))
    }

    fn level(self) -> u32 {
        (self.0 & 15) as u32
    }

    fn index(self) -> u64 {
        self.0 >> 4
    }
}

#[derive(Default)]
struct Node {
    /// Claims of all of the node's blocks.
    whole: ClaimSet,
    /// Claims of a part of one of its blocks.
    partial: ClaimSet,
}

impl Node {
    fn is_empty(&self) -> bool {
        self.whole.is_empty() && self.partial.is_empty()
    }
}

impl Claims {
    /// Adds a claim on parts of blocks, later than all others. Returns how many reasons it has to wait:
    /// [`Claims::remove_parts`] and [`Claims::remove_whole`] of other claims take them away.
    pub(super) fn insert_parts(&mut self, id: ClaimId, blocks: &Blocks) -> usize {
        let mut reasons = 0;
        for key in self.nodes_of_parts(blocks) {
            let node = self.node(key);
            // The first and the last block have nodes in common.
            if node.partial.insert(id) {
                reasons += usize::from(!node.whole.is_empty());
                reasons += usize::from(key.level() == 0 && node.partial.has_more_than_one());
            }
        }
        reasons
    }

    /// Adds a claim on whole blocks. Returns how many reasons it has to wait, as [`Claims::insert_parts`] does.
    pub(super) fn insert_whole(&mut self, id: ClaimId, blocks: &Blocks) -> usize {
        let mut reasons = 0;
        for key in nodes_of(&blocks.whole) {
            self.keep_levels(key.level());
            let node = self.node(key);
            node.whole.insert(id);
            reasons += usize::from(!node.partial.is_empty());
        }
        reasons
    }

    /// Removes a claim on parts, granted or not. Appends to `freed` the claims that have one reason less to wait, each as
    /// often as it has.
    pub(super) fn remove_parts(&mut self, id: ClaimId, blocks: &Blocks, freed: &mut Vec<ClaimId>) {
        for key in self.nodes_of_parts(blocks) {
            self.remove(key, |node| {
                if let Some(next) = node.partial.remove(id) {
                    freed.extend(node.whole.range(id..next));
                    if key.level() == 0 {
                        freed.extend(node.partial.first());
                    }
                }
            });
        }
        self.count_steps(freed.len());
    }

    /// Removes a claim on whole blocks. Appends to `freed` as [`Claims::remove_parts`] does.
    pub(super) fn remove_whole(&mut self, id: ClaimId, blocks: &Blocks, freed: &mut Vec<ClaimId>) {
        let before = freed.len();
        for key in nodes_of(&blocks.whole) {
            self.remove(key, |node| {
                if let Some(next) = node.whole.remove(id) {
                    freed.extend(node.partial.range(id..next));
                }
            });
        }
        self.count_steps(freed.len() - before);
    }

    /// Removes a claim from a node, and the node if it was the last one there.
    fn remove(&mut self, key: NodeId, remove: impl FnOnce(&mut Node)) {
        self.count_steps(1);
        let Entry::Occupied(mut node) = self.nodes.entry(key) else { return };
        remove(node.get_mut());
        if node.get().is_empty() {
            node.remove();
            if self.nodes.is_empty() {
                self.level = 0;
            }
        }
    }

    /// Keeps all levels up to this one from now on: the claims of parts get their nodes there.
    fn keep_levels(&mut self, level: u32) {
        while self.level < level {
            self.level += 1;
            let leaves = self.nodes.iter().filter(|(key, node)| key.level() == 0 && !node.partial.is_empty());
            let parts: Vec<(u64, Vec<ClaimId>)> =
                leaves.map(|(key, node)| (key.index(), node.partial.range(0..ClaimId::MAX).collect())).collect();
            for (block, claims) in parts {
                self.count_steps(claims.len());
                let node = self.node(NodeId::above(self.level, block));
                claims.into_iter().for_each(|id| _ = node.partial.insert(id));
            }
        }
    }

    /// The nodes that list the claims of parts of blocks: their leaves, and all kept nodes above those.
    fn nodes_of_parts(&self, blocks: &Blocks) -> impl Iterator<Item = NodeId> + use<> {
        let top = self.level;
        blocks.partial().flat_map(move |block| (0..=top).map(move |level| NodeId::above(level, block)))
    }

    fn node(&mut self, key: NodeId) -> &mut Node {
        self.count_steps(1);
        self.nodes.entry(key).or_default()
    }

    fn count_steps(&mut self, steps: usize) {
        #[cfg(test)]
        {
            self.steps += steps as u64;
        }
        #[cfg(not(test))]
        let _ = steps;
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }
}

/// The nodes that make up a range of blocks, as high as possible: fewer than twice [`FANOUT`] of each level.
fn nodes_of(blocks: &Range<u64>) -> impl Iterator<Item = NodeId> + use<> {
    let Range { mut start, mut end } = *blocks;
    let levels = if start < end { 0..TOP_LEVEL + 1 } else { 0..0 };
    levels.flat_map(move |level| {
        let (mut head, mut tail) = (start..end, end..end);
        if level < TOP_LEVEL {
            head.end = start.next_multiple_of(FANOUT).min(end);
            tail.start = (end - end % FANOUT).max(head.end);
            (start, end) = (head.end.div_ceil(FANOUT), tail.start / FANOUT);
            end = end.max(start);
        }
        head.chain(tail).map(move |index| NodeId::new(level, index))
    })
}

/// Hashes a node by two multiplications with a random factor: a guest that chooses blocks cannot make them collide.
struct NodeHasher(u64);

impl Default for NodeHasher {
    fn default() -> Self {
        NodeHasher(RandomState::new().build_hasher().finish() | 1)
    }
}

impl BuildHasher for NodeHasher {
    type Hasher = Product;

    fn build_hasher(&self) -> Product {
        Product { factor: self.0, hash: 0 }
    }
}

struct Product {
    factor: u64,
    hash: u64,
}

impl Product {
    /// The two halves of the product with the factor, combined.
    #[inline]
    fn fold(&self, value: u64) -> u64 {
        let product = u128::from(value) * u128::from(self.factor);
        (product >> 64) as u64 ^ product as u64
    }
}

impl Hasher for Product {
    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("a node is one u64");
    }

    #[inline]
    fn write_u64(&mut self, node: u64) {
        // After one multiplication, the lowest bits of blocks at regular distances are those of an arithmetic sequence, which
        // has few values for some factors. The table uses the lowest and the highest bits.
        self.hash = self.fold(self.fold(node));
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.hash
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::prng::Prng;

    #[test]
    fn the_blocks_of_a_write_are_whole_or_partial() {
        let written = |bytes: Range<u64>| {
            let Blocks { whole, partial } = Blocks::written(bytes, 12);
            (whole, partial)
        };
        assert_eq!(written(4096..12288), (1..3, [None, None]));
        assert_eq!(written(512..1024), (1..1, [Some(0), None]));
        assert_eq!(written(0..512), (0..0, [None, Some(0)]));
        assert_eq!(written(3584..4096), (1..1, [Some(0), None]));
        assert_eq!(written(3584..4608), (1..1, [Some(0), Some(1)]));
        assert_eq!(written(512..16896), (1..4, [Some(0), Some(4)]));
        assert_eq!(Blocks::inside(512..16896, 12), Blocks { whole: 1..4, partial: [None, None] });
        assert!(Blocks::inside(512..1024, 12).whole.is_empty());
    }

    #[test]
    fn the_nodes_of_a_range_cover_it_once() {
        let blocks_of = |key: NodeId| {
            let bits = key.level() * FANOUT_BITS;
            key.index() << bits..(key.index() + 1) << bits
        };
        for (start, end) in [(0, 0), (5, 6), (3, 40), (0, 16), (1, 255), (15, 17), (250, 70_000), (65_536, 262_144)] {
            let mut covered: Vec<u64> = nodes_of(&(start..end)).flat_map(blocks_of).collect();
            covered.sort();
            assert_eq!(covered, (start..end).collect::<Vec<_>>(), "{start}..{end}");
            assert!(nodes_of(&(start..end)).count() <= 50, "{start}..{end}");
        }
    }

    /// Blocks in a row, and blocks that are multiples of a power of two, fall into different places of a table.
    #[test]
    fn the_nodes_of_regular_blocks_do_not_collide() {
        for (stride, seed) in
            [1, 16, 4096, 1 << 20].into_iter().flat_map(|stride| (0..100).map(move |seed| (stride, seed)))
        {
            let mut random = Prng::new(seed);
            let hasher = NodeHasher(random.below(1 << 32) << 32 | random.below(1 << 32) | 1);
            let places: std::collections::HashSet<u64> =
                (0..1024).map(|block| hasher.hash_one(NodeId::new(0, block * stride)) % 65_536).collect();
            // 1,016 by chance.
            assert!(places.len() > 900, "stride {stride}, seed {seed}: {} places for 1024 nodes", places.len());
        }
    }
}
