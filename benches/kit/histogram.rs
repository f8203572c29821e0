//! Records the times of many requests in little memory.

use std::time::Duration;

/// Each power of two has half as many buckets as this, so a time is known to within 3 %.
const FINE: u64 = 64;

/// The number of requests for each range of times. As in HdrHistogram, buckets have equal widths within a power of two, and
/// the width doubles with the next power.
#[derive(Clone, Default)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Histogram {
    pub fn record(&mut self, time: Duration) {
        let bucket = bucket(u64::try_from(time.as_nanos()).expect("less than centuries"));
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
        self.total += 1;
    }

    /// The time that this share of the requests did not exceed, in microseconds; 0 if there were none.
    pub fn quantile(&self, share: f64) -> f64 {
        let mut left = ((self.total as f64 * share).ceil() as u64).max(1);
        for (bucket, &count) in self.counts.iter().enumerate() {
            if count >= left {
                return end_of(bucket) as f64 / 1e3;
            }
            left -= count;
        }
        0.0
    }
}

fn bucket(nanoseconds: u64) -> usize {
    let doublings = u64::from((nanoseconds / FINE).checked_ilog2().map_or(0, |log| log + 1));
    // Below `FINE` a bucket is one nanosecond wide. Above, each power of two has `FINE / 2` buckets.
    (if doublings == 0 { nanoseconds } else { FINE / 2 * doublings + (nanoseconds >> doublings) }) as usize
}

/// The longest time of a bucket, in nanoseconds.
fn end_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < FINE {
        return bucket;
    }
    let doublings = (bucket - FINE / 2) / (FINE / 2);
    ((bucket - FINE / 2 * doublings + 1) << doublings) - 1
}
