//! Latency histograms. [`Histogram`] is what a worker records into, with plain stores and no lock; [`LatencyHistogram`] is
//! the same data for clients, in the form of QEMU's `BlockLatencyHistogramInfo`: boundaries in nanoseconds and bins between
//! them. The arithmetic of the bins is pure.
//!
//! Bins grow by powers of two from one microsecond to 67 s, four in each power: 1, 1.25, 1.5, 1.75, 2, 2.5 us and so on. So a
//! value read from a histogram is at most a quarter above the latency that it stands for.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::add;
use crate::engine::Kind;

/// The unit of recorded times: 1024 ticks are a microsecond, so that the bins begin at powers of two.
const TICKS_PER_MICROSECOND: u64 = 1024;
/// The first power of two with bins of its own: one microsecond.
const FIRST_POWER: u32 = TICKS_PER_MICROSECOND.trailing_zeros();
/// Powers of two with bins of their own: up to 2^26 us.
const POWERS: usize = 26;
const BINS_PER_POWER: usize = 4;
/// One bin below the first power, and one above the last.
const BINS: usize = 1 + POWERS * BINS_PER_POWER + 1;

/// A time in ticks.
#[inline]
pub(crate) fn ticks(time: Duration) -> u64 {
    time.as_secs() * (TICKS_PER_MICROSECOND * 1_000_000) + u64::from(time.subsec_nanos()) * 128 / 125
}

/// The time that so many ticks take.
pub(crate) fn duration(ticks: u64) -> Duration {
    Duration::from_nanos(nanoseconds(ticks))
}

fn nanoseconds(ticks: u64) -> u64 {
    (u128::from(ticks) * 125 / 128) as u64
}

/// The bin of a time. A bin includes its upper boundary, as Prometheus' `le` does.
#[inline]
fn bin(ticks: u64) -> usize {
    let below = ticks.saturating_sub(1);
    if below < TICKS_PER_MICROSECOND {
        return 0;
    }
    let power = below.ilog2();
    let quarter = (below >> (power - 2)) & 3;
    (1 + (power - FIRST_POWER) as usize * BINS_PER_POWER + quarter as usize).min(BINS - 1)
}

/// The upper boundary of a bin in nanoseconds. `None`: the last one has none.
fn upper(bin: usize) -> Option<u64> {
    match bin {
        0 => Some(1000),
        bin if bin >= BINS - 1 => None,
        bin => {
            let (power, quarter) = ((bin - 1) / BINS_PER_POWER, (bin - 1) % BINS_PER_POWER);
            Some((250 * (5 + quarter as u64)) << power)
        }
    }
}

/// A histogram that one thread records into and any thread reads.
pub(crate) struct Histogram {
    bins: [AtomicU64; BINS],
    sum: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { bins: [const { AtomicU64::new(0) }; BINS], sum: AtomicU64::new(0) }
    }
}

impl Histogram {
    /// Records a time in [`ticks`]. Only one thread may call this.
    #[inline]
    pub(crate) fn record(&self, ticks: u64) {
        self.record_in(bin(ticks), ticks);
    }

    #[inline]
    fn record_in(&self, bin: usize, ticks: u64) {
        add(&self.bins[bin], 1);
        add(&self.sum, ticks);
    }

    /// The present values, for clients. One that is recorded meanwhile may be in a bin and not in the sum.
    fn read(&self) -> LatencyHistogram {
        let bins = std::array::from_fn(|bin| self.bins[bin].load(Relaxed));
        LatencyHistogram::from_bins(&bins, nanoseconds(self.sum.load(Relaxed)))
    }
}

/// The histograms of one virtqueue.
#[derive(Default)]
pub(crate) struct LatencyCounters {
    /// From a request's pop to its completion, by [`Kind`].
    pub(crate) request: [Histogram; 5],
    /// From an op's hand-over to the back-end until its completion was found, by [`Kind`]; a sync counts as a flush.
    pub(crate) backend: [Histogram; 5],
    /// How long the first blocked write waited at the gate, in the guest's ring.
    pub(crate) held: Histogram,
    /// How long the foremost request of a direction waited for the disk's limits, in the guest's ring.
    pub(crate) limited: Histogram,
}

impl LatencyCounters {
    /// Records a completed request, and its back-end's share if it has one. Most often the two are the same, in one bin.
    #[inline]
    pub(crate) fn record(&self, kind: Kind, took: u64, backend_took: Option<u64>) {
        let at = bin(took);
        self.request[kind as usize].record_in(at, took);
        match backend_took {
            Some(share) if share == took => self.backend[kind as usize].record_in(at, share),
            Some(share) => self.backend[kind as usize].record(share),
            None => {}
        }
    }

    /// The present values, for clients.
    pub(crate) fn read(&self) -> LatencyStatus {
        let by_kind = |histograms: &[Histogram; 5]| {
            let of = |kind: Kind| histograms[kind as usize].read();
            LatencyByKind {
                read: of(Kind::Read),
                write: of(Kind::Write),
                flush: of(Kind::Flush),
                discard: of(Kind::Discard),
                write_zeroes: of(Kind::WriteZeroes),
            }
        };
        LatencyStatus {
            request: by_kind(&self.request),
            backend: by_kind(&self.backend),
            held: self.held.read(),
            limited: self.limited.read(),
        }
    }
}

/// The latencies of a disk since its first daemon started. They continue over reconnects and upgrades.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct LatencyStatus {
    /// From the pop of a request to its completion.
    pub request: LatencyByKind,
    /// The back-end's share: from the hand-over of an op until its completion was found. `flush` has the syncs: those of
    /// flushes, which several requests may share, and those of the cache policy.
    pub backend: LatencyByKind,
    /// How long a write waited in the guest's ring at the closed gate (a hold, or a failed request that is retained). The
    /// latency of a request does not include this time. Only the first of several waiting writes is counted.
    pub held: LatencyHistogram,
    /// How long a request waited in the guest's ring for the disk's limits (`--throttle`), from the time when it was the
    /// foremost of the reads or of the writes. The latency of a request does not include this time.
    pub limited: LatencyHistogram,
}

impl LatencyStatus {
    /// Adds the latencies of another ring or daemon.
    pub fn accumulate(&mut self, other: &LatencyStatus) {
        self.request.accumulate(&other.request);
        self.backend.accumulate(&other.backend);
        self.held.accumulate(&other.held);
        self.limited.accumulate(&other.limited);
    }
}

/// A histogram for each kind of request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct LatencyByKind {
    /// Reads.
    pub read: LatencyHistogram,
    /// Writes.
    pub write: LatencyHistogram,
    /// Flushes.
    pub flush: LatencyHistogram,
    /// Discards.
    pub discard: LatencyHistogram,
    /// Write-zeroes.
    pub write_zeroes: LatencyHistogram,
}

impl LatencyByKind {
    /// The histograms with the names of their kinds.
    pub fn each(&self) -> [(&'static str, &LatencyHistogram); 5] {
        [
            (Kind::Read.name(), &self.read),
            (Kind::Write.name(), &self.write),
            (Kind::Flush.name(), &self.flush),
            (Kind::Discard.name(), &self.discard),
            (Kind::WriteZeroes.name(), &self.write_zeroes),
        ]
    }

    fn accumulate(&mut self, other: &LatencyByKind) {
        self.read.accumulate(&other.read);
        self.write.accumulate(&other.write);
        self.flush.accumulate(&other.flush);
        self.discard.accumulate(&other.discard);
        self.write_zeroes.accumulate(&other.write_zeroes);
    }
}

/// A histogram as QEMU's `BlockLatencyHistogramInfo` has it. `bins` has one more element than `boundaries`: bin 0 counts times
/// up to the first boundary, the last one those above the last. Adjacent empty bins are merged. Without any time both are
/// empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct LatencyHistogram {
    /// The sum of all times in nanoseconds.
    pub sum_ns: u64,
    /// The boundaries in nanoseconds, ascending. A bin includes its upper one.
    pub boundaries: Vec<u64>,
    /// How many times each bin counted.
    pub bins: Vec<u64>,
}

impl LatencyHistogram {
    fn from_bins(counts: &[u64; BINS], sum_ns: u64) -> Self {
        let (mut boundaries, mut bins) = (Vec::new(), Vec::new());
        for (at, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let lower = at.checked_sub(1).and_then(upper);
            if let Some(lower) = lower.filter(|lower| boundaries.last() != Some(lower)) {
                boundaries.push(lower);
                bins.push(0);
            }
            bins.push(count);
            boundaries.extend(upper(at));
        }
        if !bins.is_empty() && bins.len() == boundaries.len() {
            bins.push(0);
        }
        LatencyHistogram { sum_ns, boundaries, bins }
    }

    /// The count of each bin that this program has. Another version's boundaries count in the bin that includes them.
    fn to_bins(&self) -> [u64; BINS] {
        let mut counts = [0_u64; BINS];
        for (at, count) in self.bins.iter().enumerate() {
            let bin = self.boundaries.get(at).map_or(BINS - 1, |ns| bin(ns.saturating_mul(128) / 125));
            counts[bin] = counts[bin].wrapping_add(*count);
        }
        counts
    }

    /// How many times were recorded.
    pub fn count(&self) -> u64 {
        self.bins.iter().fold(0, |sum, count| sum.wrapping_add(*count))
    }

    /// Adds the times of another histogram.
    pub fn accumulate(&mut self, other: &LatencyHistogram) {
        self.combine(other, u64::wrapping_add);
    }

    /// The times since `earlier`, a histogram of the same disk. After the disk's counters began anew: all times.
    pub fn since(&self, earlier: &LatencyHistogram) -> LatencyHistogram {
        if earlier.count() > self.count() {
            return self.clone();
        }
        let mut difference = self.clone();
        difference.combine(earlier, u64::saturating_sub);
        difference
    }

    fn combine(&mut self, other: &LatencyHistogram, with: fn(u64, u64) -> u64) {
        let (mut counts, others) = (self.to_bins(), other.to_bins());
        counts.iter_mut().zip(others).for_each(|(count, other)| *count = with(*count, other));
        *self = Self::from_bins(&counts, with(self.sum_ns, other.sum_ns));
    }

    /// The count of times up to each of `boundaries` (ascending, in nanoseconds): the buckets of a Prometheus histogram. A
    /// boundary that is none of the bins' counts the bins that end below it.
    pub fn cumulative(&self, boundaries: &[u64]) -> Vec<u64> {
        let up_to = |limit: &u64| {
            let ends = self.boundaries.iter().take_while(|boundary| *boundary <= limit).count();
            self.bins.iter().take(ends).fold(0_u64, |sum, count| sum.wrapping_add(*count))
        };
        boundaries.iter().map(up_to).collect()
    }

    /// The time that this share of all times does not exceed (0.5: the median), as the upper boundary of its bin; above the
    /// last boundary: that boundary. `None`: nothing was recorded.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let count = self.count();
        let wanted = ((count as f64 * share).ceil() as u64).max(1);
        let mut sum = 0_u64;
        for (at, bin) in self.bins.iter().enumerate() {
            sum = sum.wrapping_add(*bin);
            if sum >= wanted {
                return self.boundaries.get(at).or(self.boundaries.last()).map(|ns| Duration::from_nanos(*ns));
            }
        }
        None
    }

    /// The mean. `None`: nothing was recorded.
    pub fn mean(&self) -> Option<Duration> {
        self.sum_ns.checked_div(self.count()).map(Duration::from_nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(times: &[Duration]) -> LatencyHistogram {
        let histogram = Histogram::default();
        times.iter().for_each(|time| histogram.record(ticks(*time)));
        histogram.read()
    }

    #[test]
    fn each_time_is_in_the_bin_between_its_boundaries() {
        let mut lower = 0;
        for at in 0..BINS - 1 {
            let boundary = upper(at).unwrap();
            assert!(boundary > lower, "bin {at}");
            let width = boundary - lower;
            assert!(at == 0 || width * 5 <= boundary, "bin {at}: at most a quarter above what it stands for");
            for (ns, expected) in [(lower + 1 + width / 2, at), (boundary, at), (boundary + 2, at + 1)] {
                assert_eq!(bin(ticks(Duration::from_nanos(ns))), expected, "{ns} ns");
            }
            lower = boundary;
        }
        assert_eq!(upper(BINS - 1), None);
        assert_eq!((bin(0), bin(u64::MAX)), (0, BINS - 1));
        assert_eq!(upper(BINS - 2), Some(1000 << POWERS));
    }

    #[test]
    fn ticks_and_times_are_converted_without_loss_of_a_microsecond() {
        for time in [0, 1, 999, 1000, 123_456_789_012, 86_400_000_000_000].map(Duration::from_nanos) {
            let back = duration(ticks(time));
            assert!(back <= time && time - back < Duration::from_nanos(3), "{time:?}: {back:?}");
        }
    }

    #[test]
    fn a_histogram_for_clients_has_the_form_of_qemu_and_merges_empty_bins() {
        assert_eq!(recorded(&[]), LatencyHistogram::default());
        let us = Duration::from_micros;
        let some = recorded(&[us(0), us(1), us(100), us(100), Duration::from_secs(100)]);
        assert_eq!(some.boundaries, [1000, 96_000, 112_000, 67_108_864_000]);
        assert_eq!(some.bins, [2, 0, 2, 0, 1]);
        assert_eq!(some.count(), 5);
        assert_eq!(some.sum_ns / 1000, 100_000_201);
        assert_eq!(recorded(&[us(2)]).bins, [0, 1, 0]);
    }

    #[test]
    fn histograms_are_added_and_subtracted_exactly() {
        let us = |times: &[u64]| recorded(&times.iter().copied().map(Duration::from_micros).collect::<Vec<_>>());
        let (one, other) = (us(&[0, 3, 70_000_000]), us(&[3, 5, 900]));
        let mut both = one.clone();
        both.accumulate(&other);
        let all = us(&[0, 3, 70_000_000, 3, 5, 900]);
        assert_eq!((&both.bins, &both.boundaries), (&all.bins, &all.boundaries));
        assert_eq!(both.since(&one).bins, other.bins);
        assert_eq!(both.since(&both).count(), 0);
        assert_eq!(one.since(&both), one, "the counters began anew");
    }

    #[test]
    fn quantiles_and_buckets_are_read_from_a_histogram() {
        let times: Vec<Duration> = (1..=100).map(Duration::from_micros).collect();
        let some = recorded(&times);
        assert_eq!(some.quantile(0.5), Some(Duration::from_micros(56)));
        assert_eq!(some.quantile(0.99), Some(Duration::from_micros(112)));
        assert_eq!(some.quantile(0.0), Some(Duration::from_micros(1)));
        assert_eq!(recorded(&[]).quantile(0.5), None);
        assert_eq!(recorded(&[]).mean(), None);
        assert_eq!(some.cumulative(&[500, 1000, 64_000, 1_000_000]), [0, 1, 64, 100]);
        let above = recorded(&[Duration::from_secs(1000)]);
        assert_eq!(above.quantile(0.5), Some(Duration::from_nanos(67_108_864_000)));
        assert_eq!(above.cumulative(&[67_108_864_000]), [0]);
    }

    #[test]
    fn a_histogram_of_another_version_is_read_without_a_panic() {
        let strange = LatencyHistogram { sum_ns: u64::MAX, boundaries: vec![u64::MAX, 1], bins: vec![u64::MAX; 7] };
        let mut sum = strange.clone();
        sum.accumulate(&strange);
        let _ = (sum.since(&strange), strange.quantile(0.5), strange.cumulative(&[5]), strange.mean());
    }
}
