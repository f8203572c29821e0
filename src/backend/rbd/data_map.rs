//! Where an image may hold data, so that a copy need not read its holes.
//!
//! librbd asks the cluster what each object stores (`rbd_diff_iterate2` from the beginning of time, without whole objects,
//! including the parent of a clone). The image's object map (`fast-diff`) would be much faster, but it is known to be wrong
//! at times, and a copy must not miss data. A listing is exact at that moment, after librbd has flushed, and stays exact for
//! a range that nothing changes.
//!
//! The cluster may take any time for a listing, and a guest's write may wait for the copy. The listing therefore runs in a
//! thread of its own, for which the caller waits only a moment. A range that is not listed by then counts as data, which
//! costs a read.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::{Errno, Shared};
use crate::base::rate_limit::{IMAGE_LOG, log_limited};

/// How long a caller waits for a listing.
const LISTING_TIMEOUT: Duration = Duration::from_secs(1);

/// How long no listing is started after one that timed out, so that callers do not wait for a slow cluster each time.
const LISTING_PAUSE: Duration = Duration::from_secs(10);

/// How long a caller lists holes before it returns, whether it found data or not.
const MAX_SEARCH_TIME: Duration = Duration::from_millis(100);

/// How long one listing should take. The next one covers more or fewer objects accordingly.
const TARGET_LISTING_TIME: Duration = Duration::from_millis(40);

/// The number of objects in the first listing of a caller that reads the image in order.
const FIRST_OBJECTS: u64 = 16;

/// The most objects in one listing.
const MAX_OBJECTS: u64 = 2048;

/// The smallest object size to calculate with. Smaller objects are listed together.
pub(super) const MIN_OBJECT: u64 = 64 << 10;

/// Data with a smaller hole between is one range, because listing takes longer than reading the hole.
const MIN_HOLE: u64 = 1 << 20;

/// How many bytes count as data where nothing is known. The caller asks again behind them.
const UNKNOWN_BYTES: u64 = 64 << 10;

/// A caller whose next offset is less than this behind the last range reads the image in order; it may round its offsets.
const MAX_SCAN_GAP: u64 = 64 << 20;

/// The listings of one image.
#[derive(Default)]
pub(super) struct DataMap {
    scans: Mutex<Scans>,
    /// A listing runs. Its caller may no longer wait for it.
    listing: Arc<AtomicBool>,
}

/// The positions of a caller, which reads the image in order and, in between, what a guest is about to overwrite.
#[derive(Default)]
struct Scans {
    /// The scan that reads the image in order.
    main: Scan,
    /// A scan that started elsewhere. If the caller continues it, it becomes the main one.
    other: Scan,
    /// The failure was logged.
    failed: bool,
    /// No listing is started before this time.
    not_before: Option<Instant>,
}

#[derive(Clone, Copy)]
struct Scan {
    /// The end of the range that was returned last.
    next: u64,
    /// The number of objects in the next listing.
    objects: u64,
}

impl Default for Scan {
    fn default() -> Self {
        Scan { next: 0, objects: FIRST_OBJECTS }
    }
}

impl Scan {
    /// Whether a call at `offset` continues this scan.
    fn continues_at(&self, offset: u64) -> bool {
        offset.checked_sub(self.next).is_some_and(|ahead| ahead < MAX_SCAN_GAP)
    }

    /// Chooses the size of the next listing, after one that took so long and found data or not.
    fn adapt(&mut self, took: Duration, found: bool) {
        self.objects = match (found, took) {
            (true, _) => FIRST_OBJECTS,
            (false, took) if took < TARGET_LISTING_TIME => (self.objects * 2).min(MAX_OBJECTS),
            (false, took) if took > 2 * TARGET_LISTING_TIME => (self.objects / 2).max(1),
            (false, _) => self.objects,
        };
    }
}

impl DataMap {
    /// [`crate::backend::Backend::next_data`] for an image of `size` bytes, in objects of `object` bytes.
    pub(super) fn next(&self, shared: &Arc<Shared>, offset: u64, size: u64, object: u64) -> Option<(u64, u64)> {
        if offset >= size {
            return None;
        }
        let mut scans = self.scans.lock().expect("no panic while held");
        let continues = scans.main.continues_at(offset);
        if !continues && scans.other.continues_at(offset) {
            scans.main = scans.other;
        }
        let in_order = continues || scans.main.continues_at(offset);
        let mut scan = if in_order { scans.main } else { Scan { next: 0, objects: 1 } };
        let start = Instant::now();
        let mut at = offset;
        let range = loop {
            let end = (at / object + scan.objects).saturating_mul(object).min(size);
            let began = Instant::now();
            match self.list(shared, at, end, &mut scans) {
                None => break Some((at, (at + object).min(size))),
                Some(Some((first, last))) => {
                    scan.adapt(began.elapsed(), true);
                    break Some((first, last));
                }
                Some(None) => scan.adapt(began.elapsed(), false),
            }
            at = end;
            if at >= size {
                break None;
            }
            if !in_order || start.elapsed() >= MAX_SEARCH_TIME {
                break Some((at, (at + UNKNOWN_BYTES).min(size)));
            }
        };
        scan.next = range.map_or(size, |(_, end)| end);
        if in_order {
            scans.main = scan;
        } else {
            scans.other = Scan { objects: FIRST_OBJECTS, ..scan };
        }
        range
    }

    /// Lists a range. Returns its first data, `Some(None)` if it holds none, and `None` if that is not known.
    fn list(&self, shared: &Arc<Shared>, start: u64, end: u64, scans: &mut Scans) -> Option<Option<(u64, u64)>> {
        if scans.not_before.is_some_and(|not_before| Instant::now() < not_before) {
            return None;
        }
        if self.listing.swap(true, Ordering::AcqRel) {
            return None;
        }
        let (sender, listed) = mpsc::channel();
        let (thread_shared, listing) = (Arc::clone(shared), Arc::clone(&self.listing));
        let body = move || {
            let image = &thread_shared.image;
            let result = image.is_migrating().and_then(|is_migrating| match is_migrating {
                true => Ok(vec![(start, end)]),
                false => image.list_data(start, end - start, MIN_HOLE),
            });
            drop(thread_shared);
            listing.store(false, Ordering::Release);
            // The caller may no longer wait.
            let _ = sender.send(result);
        };
        let result = match thread::Builder::new().name("rbd-holes".into()).spawn(body) {
            Ok(_) => {
                let result = listed.recv_timeout(LISTING_TIMEOUT).ok();
                scans.not_before = result.is_none().then(|| Instant::now() + LISTING_PAUSE);
                result
            }
            Err(error) => {
                log_limited!(IMAGE_LOG, Warn, "{}: no thread to list its holes: {error}; they are read", shared.name);
                self.listing.store(false, Ordering::Release);
                None
            }
        };
        match result? {
            Ok(ranges) => Some(first_range(ranges, start, end)),
            Err(errno) => {
                shared.record_result(Err(errno));
                if !std::mem::replace(&mut scans.failed, true) {
                    let name = &shared.name;
                    log_limited!(
                        IMAGE_LOG,
                        Warn,
                        "{name}: its holes cannot be listed ({}): they are read",
                        super::io_error(errno)
                    );
                }
                Some(Some((start, end))).filter(|_| errno != Errno(libc::ESHUTDOWN))
            }
        }
    }
}

/// Returns the first of the ranges in a window, joined with those that follow closely. The ranges need not be in order.
fn first_range(mut ranges: Vec<(u64, u64)>, start: u64, end: u64) -> Option<(u64, u64)> {
    ranges.retain(|range| range.0 < end && range.1 > start);
    ranges.sort_unstable();
    let mut ranges = ranges.into_iter().map(|(from, to)| (from.max(start), to.min(end)));
    let (first, mut last) = ranges.next()?;
    for (from, to) in ranges {
        if from.saturating_sub(last) >= MIN_HOLE {
            break;
        }
        last = last.max(to);
    }
    Some((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_ranges_are_joined_in_any_order() {
        const M: u64 = 1 << 20;
        assert_eq!(first_range(Vec::new(), 0, 10 * M), None);
        assert_eq!(first_range(vec![(5 * M, 6 * M), (M, M + 1), (M + 4096, 2 * M)], 0, 10 * M), Some((M, 2 * M)));
        assert_eq!(first_range(vec![(0, 20 * M)], 3 * M, 10 * M), Some((3 * M, 10 * M)), "cut to the window");
        assert_eq!(first_range(vec![(0, M), (11 * M, 12 * M)], 3 * M, 10 * M), None);
        assert_eq!(first_range(vec![(0, M), (3 * M / 2, 2 * M)], 0, 10 * M), Some((0, 2 * M)));
    }
}
