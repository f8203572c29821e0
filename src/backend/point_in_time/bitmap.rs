//! Which clusters of the image are saved: one bit each, set by the copier and read by the virtqueues' threads without a
//! lock.

use std::collections::TryReserveError;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// One bit for each cluster. Bits are set and never cleared.
pub(super) struct Bitmap {
    words: Box<[AtomicU64]>,
    len: u64,
}

impl Bitmap {
    /// Creates `len` bits, all clear. Fails when there is no memory for them.
    pub(super) fn new(len: u64) -> Result<Self, TryReserveError> {
        let count = len.div_ceil(64) as usize;
        let mut words = Vec::new();
        words.try_reserve_exact(count)?;
        words.resize_with(count, AtomicU64::default);
        Ok(Bitmap { words: words.into_boxed_slice(), len })
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Sets a range and returns how many of its bits were clear. A thread that sees a bit set also sees what this thread
    /// did before it set the bit.
    pub(super) fn set(&self, range: Range<u64>) -> u64 {
        let mut fresh = 0;
        for (word, mask) in masks(range) {
            fresh += u64::from((mask & !self.words[word].fetch_or(mask, Ordering::Release)).count_ones());
        }
        fresh
    }

    /// Returns the first clear bit of a range; `None` when all are set.
    pub(super) fn first_clear(&self, range: Range<u64>) -> Option<u64> {
        masks(range).find_map(|(word, mask)| {
            let clear = mask & !self.words[word].load(Ordering::Acquire);
            (clear != 0).then(|| word as u64 * 64 + u64::from(clear.trailing_zeros()))
        })
    }

    /// Returns the first set bit of a range; `None` when all are clear.
    pub(super) fn first_set(&self, range: Range<u64>) -> Option<u64> {
        masks(range).find_map(|(word, mask)| {
            let set = mask & self.words[word].load(Ordering::Acquire);
            (set != 0).then(|| word as u64 * 64 + u64::from(set.trailing_zeros()))
        })
    }

    /// Returns the last clear bit of a range; `None` when all are set.
    pub(super) fn last_clear(&self, range: Range<u64>) -> Option<u64> {
        masks(range).rev().find_map(|(word, mask)| {
            let clear = mask & !self.words[word].load(Ordering::Acquire);
            (clear != 0).then(|| word as u64 * 64 + u64::from(clear.ilog2()))
        })
    }
}

/// The words that a range of bits touches, and which bits of each.
fn masks(range: Range<u64>) -> impl DoubleEndedIterator<Item = (usize, u64)> {
    let Range { start, end } = range;
    let words = if start < end { start / 64..(end - 1) / 64 + 1 } else { 0..0 };
    words.map(move |word| {
        let from = start.saturating_sub(word * 64);
        let to = (end - word * 64).min(64);
        (word as usize, (u64::MAX << from) & (u64::MAX >> (64 - to)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_may_cross_words() {
        let bits = Bitmap::new(300).unwrap();
        assert!(Bitmap::new(1 << 62).is_err(), "more memory than there is");
        assert_eq!(bits.len(), 300);
        assert_eq!(bits.first_clear(0..300), Some(0));
        assert_eq!(bits.first_set(0..300), None);
        assert_eq!(bits.set(5..5), 0);
        assert_eq!(bits.set(3..130), 127);
        assert_eq!(bits.set(0..64), 3);
        assert_eq!(bits.set(0..130), 0);
        assert_eq!(bits.first_clear(0..300), Some(130));
        assert_eq!(bits.first_clear(7..130), None);
        assert_eq!(bits.first_clear(9..9), None);
        assert_eq!(bits.first_set(129..300), Some(129));
        assert_eq!(bits.first_set(130..300), None);
        assert_eq!(bits.set(131..300), 169);
        assert_eq!(bits.first_clear(0..300), Some(130));
        assert_eq!(bits.first_clear(131..300), None);
        assert_eq!(bits.last_clear(0..300), Some(130));
        assert_eq!(bits.last_clear(0..130), None);
        assert_eq!(bits.last_clear(9..9), None);
    }
}
