//! Where an image may hold data, for copies: its holes need not be read.
//!
//! The cluster is asked, object by object, for what each one stores (`rbd_diff_iterate2` from the beginning of time, without
//! whole objects, the parent of a clone included). The image's object map is not: `fast-diff` reads it in no time, but it
//! is known to be wrong at times, and a copy that misses data is no copy. What is listed is exact at that moment, after
//! librbd has flushed; a range that nothing changes stays so.
//!
//! A listing may take as long as the cluster likes, and a guest's write may wait for the copy. So it runs in a thread of
//! its own and is waited for a moment; what is not known by then counts as data, which costs a read.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::{Errno, Shared};
use crate::base::rate_limit::{IMAGE_LOG, log_limited};

/// How long a caller waits for a listing.
const MAX_WAIT: Duration = Duration::from_secs(1);
/// After one that was not there in time none is tried for so long: a cluster that is slow is not waited for each time.
const PAUSE: Duration = Duration::from_secs(10);
/// How long a caller lists holes before it returns, data or not.
const MAX_SEARCH: Duration = Duration::from_millis(100);
/// One listing should take about as long: the next one covers more, or less.
const LISTING_TIME: Duration = Duration::from_millis(40);
/// Objects in one listing of a caller that goes through the image, at first and at most.
const FIRST_OBJECTS: u64 = 16;
const MAX_OBJECTS: u64 = 2048;
/// The smallest object that is counted with: more are listed together.
pub(super) const MIN_OBJECT: u64 = 64 << 10;
/// Data that lies closer together is one range: listing takes longer than reading so much.
const MIN_HOLE: u64 = 1 << 20;
/// What counts as data where nothing is known, at least: the caller asks again behind it.
const UNKNOWN: u64 = 64 << 10;
/// A caller whose next offset lies so far behind the last range goes through the image. It rounds as it likes.
const SAME_SCAN: u64 = 64 << 20;

/// The state of the listing of one image.
#[derive(Default)]
pub(super) struct DataMap {
    scans: Mutex<Scans>,
    /// A listing that nobody waits for any more still runs.
    late: Arc<AtomicBool>,
}

/// A caller reads the image in order and, between, what a guest is about to overwrite.
#[derive(Default)]
struct Scans {
    /// The one that goes through the image.
    main: Scan,
    /// Begun elsewhere; if it is continued it is the main one.
    other: Scan,
    /// The failure was logged.
    failed: bool,
    /// No listing before.
    not_before: Option<Instant>,
}

#[derive(Clone, Copy)]
struct Scan {
    /// The end of the range that was returned last.
    next: u64,
    objects: u64,
}

impl Default for Scan {
    fn default() -> Self {
        Scan { next: 0, objects: FIRST_OBJECTS }
    }
}

impl Scan {
    fn goes_on_at(&self, offset: u64) -> bool {
        offset.checked_sub(self.next).is_some_and(|ahead| ahead < SAME_SCAN)
    }

    /// After a listing that took so long and found data, or none.
    fn adapt(&mut self, took: Duration, found: bool) {
        self.objects = match (found, took) {
            (true, _) => FIRST_OBJECTS,
            (false, took) if took < LISTING_TIME => (self.objects * 2).min(MAX_OBJECTS),
            (false, took) if took > 2 * LISTING_TIME => (self.objects / 2).max(1),
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
        let goes_on = scans.main.goes_on_at(offset);
        if !goes_on && scans.other.goes_on_at(offset) {
            scans.main = scans.other;
        }
        let in_order = goes_on || scans.main.goes_on_at(offset);
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
            if !in_order || start.elapsed() >= MAX_SEARCH {
                break Some((at, (at + UNKNOWN).min(size)));
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

    /// The first data in a range, if there is any; `None`: that is not known, or not yet.
    fn list(&self, shared: &Arc<Shared>, start: u64, end: u64, scans: &mut Scans) -> Option<Option<(u64, u64)>> {
        if scans.not_before.is_some_and(|not_before| Instant::now() < not_before) {
            return None;
        }
        if self.late.swap(true, Ordering::AcqRel) {
            return None;
        }
        let (sender, listed) = mpsc::channel();
        let (shared_there, late) = (Arc::clone(shared), Arc::clone(&self.late));
        let body = move || {
            let image = &shared_there.image;
            let result = image.is_migrating().and_then(|elsewhere| match elsewhere {
                true => Ok(vec![(start, end)]),
                false => image.list_data(start, end - start, MIN_HOLE),
            });
            drop(shared_there);
            late.store(false, Ordering::Release);
            // Who waited may have given up.
            let _ = sender.send(result);
        };
        let result = match thread::Builder::new().name("rbd-holes".into()).spawn(body) {
            Ok(_) => {
                let result = listed.recv_timeout(MAX_WAIT).ok();
                scans.not_before = result.is_none().then(|| Instant::now() + PAUSE);
                result
            }
            Err(error) => {
                log_limited!(IMAGE_LOG, Warn, "{}: no thread to list its holes: {error}; they are read", shared.name);
                self.late.store(false, Ordering::Release);
                None
            }
        };
        match result? {
            Ok(ranges) => Some(first_range(ranges, start, end)),
            Err(errno) => {
                shared.heed(Err(errno));
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

/// The first of the ranges in a window, joined with those that follow closely. They need not be in order.
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
    fn close_ranges_are_one_in_whatever_order_they_come() {
        const M: u64 = 1 << 20;
        assert_eq!(first_range(Vec::new(), 0, 10 * M), None);
        assert_eq!(first_range(vec![(5 * M, 6 * M), (M, M + 1), (M + 4096, 2 * M)], 0, 10 * M), Some((M, 2 * M)));
        assert_eq!(first_range(vec![(0, 20 * M)], 3 * M, 10 * M), Some((3 * M, 10 * M)), "cut to the window");
        assert_eq!(first_range(vec![(0, M), (11 * M, 12 * M)], 3 * M, 10 * M), None);
        assert_eq!(first_range(vec![(0, M), (3 * M / 2, 2 * M)], 0, 10 * M), Some((0, 2 * M)));
    }
}
