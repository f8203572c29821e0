//! Which reads save the image: runs of clusters, cut into pieces that one read covers.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use super::{Copier, MAX_READ};
use crate::backend::point_in_time::Mutant;
use crate::backend::point_in_time::holes::next_data;

/// The most background reads in flight, which are those that no op waits for. A guest's request queues behind the reads in
/// flight: in `benches/point_in_time.rs`, two reads of 256 KiB copied as fast as four of 512 KiB, and a guest's write took
/// a fifth of the time.
const MAX_BACKGROUND: usize = 8;

/// The most bytes of background reads in flight; see [`MAX_BACKGROUND`].
const MAX_BACKGROUND_BYTES: u64 = 512 << 10;

/// Reads start and end at multiples of this, except at the image's end. It is the largest logical block.
const ALIGN: u64 = 4096;

/// The largest hole that is read together with the data around it, because that is faster than another read.
const MAX_GAP: u64 = 16 << 10;

/// Clusters that become saved together, when all of their data has been read.
pub(super) struct Run {
    pub(super) clusters: Range<u64>,
    /// The number of pieces that are not read yet.
    pub(super) unread: usize,
    /// An op waits for one of the clusters.
    pub(super) urgent: bool,
}

/// The part of a run that one read covers.
pub(super) struct Piece {
    pub(super) run: u64,
    pub(super) bytes: Range<u64>,
}

/// The last result of [`next_data`](crate::backend::Backend::next_data): there is no data from `from` to `start`, and there may be data from `start`
/// to `end`. It stays true for clusters that are not saved, because no op changes them.
#[derive(Default)]
pub(super) struct DataExtent {
    from: u64,
    start: u64,
    end: u64,
}

impl Copier<'_> {
    /// Makes the background runs urgent that hold some of these clusters, because an op waits for them.
    pub(super) fn promote(&mut self, clusters: &Range<u64>) {
        let background = self.runs.iter_mut().filter(|(_, run)| !run.urgent);
        let overlapping =
            background.filter(|(_, run)| run.clusters.start < clusters.end && clusters.start < run.clusters.end);
        for (number, run) in overlapping {
            run.urgent = true;
            let (urgent, others) = self.background_pieces.drain(..).partition(|piece| piece.run == *number);
            self.background_pieces = others;
            let urgent: VecDeque<Piece> = urgent;
            self.urgent_pieces.extend(urgent);
        }
    }

    /// Whether as many background reads are in flight as may be.
    pub(super) fn has_enough_background(&self) -> bool {
        let background = self.reads.values().filter(|piece| !self.runs[&piece.run].urgent);
        let (count, bytes) =
            background.fold((0, 0), |(count, bytes), piece| (count + 1, bytes + piece.bytes.end - piece.bytes.start));
        count >= MAX_BACKGROUND || bytes >= MAX_BACKGROUND_BYTES
    }

    /// Finds the first clusters of a range, `max_bytes` of them at most, that are not saved, are in no run and may hold
    /// data. Marks the clusters before them that hold no data as saved.
    pub(super) fn next_run(&mut self, range: Range<u64>, max_bytes: u64) -> Result<Option<Range<u64>>, String> {
        let cluster = self.copy.cluster;
        let mut at = range.start;
        loop {
            let Some(first) = self.copy.saved.first_clear(at..range.end) else { return Ok(None) };
            at = first;
            if let Some(run) = self.runs.values().find(|run| run.clusters.contains(&at)) {
                at = run.clusters.end;
                continue;
            }
            let data = self.data_from(at * cluster)? / cluster;
            if data > at {
                let empty = at..data.min(self.copy.saved.len());
                let fresh = self.copy.mark_saved(empty);
                self.copy.done.fetch_add(fresh, Relaxed);
                continue;
            }
            let max_end = range.end.min(at + (max_bytes / cluster).max(1));
            let is_unsaved = |cluster: &u64| {
                self.copy.saved.first_clear(*cluster..*cluster + 1).is_some()
                    && !self.runs.values().any(|run| run.clusters.contains(cluster))
            };
            let end = (at + 1..max_end).find(|cluster| !is_unsaved(cluster)).unwrap_or(max_end);
            return Ok(Some(at..end));
        }
    }

    /// Returns the first byte from `at` on that may hold data, or the image's end rounded up to clusters.
    fn data_from(&mut self, at: u64) -> Result<u64, String> {
        if !(self.data.from..self.data.end).contains(&at) {
            let found = next_data(self.image, self.copy.size, at)?;
            let no_data = (self.copy.size.next_multiple_of(self.copy.cluster), u64::MAX);
            let (start, end) = found.unwrap_or(no_data);
            self.data = DataExtent { from: at, start, end };
        }
        Ok(self.data.start.max(at))
    }

    /// Makes a run of some clusters and queues the pieces of it that may hold data.
    pub(super) fn plan(&mut self, clusters: Range<u64>, urgent: bool) -> Result<(), String> {
        let cluster = self.copy.cluster;
        let (mut at, end) = (clusters.start * cluster, (clusters.end * cluster).min(self.copy.size));
        let mut found: Vec<Range<u64>> = Vec::new();
        while at < end {
            let start = self.data_from(at)? / ALIGN * ALIGN;
            if start >= end {
                break;
            }
            let stop = self.data.end.checked_next_multiple_of(ALIGN).unwrap_or(u64::MAX).min(end);
            match found.last_mut() {
                Some(last) if start.saturating_sub(last.end) <= MAX_GAP => last.end = stop,
                _ => found.push(start..stop),
            }
            at = stop;
        }
        self.last_number += 1;
        let run = self.last_number;
        let parts = |found: Range<u64>| {
            let starts = found.clone().step_by(MAX_READ as usize);
            starts.map(move |start| Piece { run, bytes: start..found.end.min(start + MAX_READ) })
        };
        let pieces: Vec<Piece> = found.into_iter().flat_map(parts).collect();
        if pieces.is_empty() {
            let fresh = self.copy.mark_saved(clusters);
            self.copy.done.fetch_add(fresh, Relaxed);
            return Ok(());
        }
        if self.copy.shared.tuning.mutant == Some(Mutant::ReleasesEarly) {
            self.copy.mark_saved(clusters.clone());
        }
        self.runs.insert(run, Run { clusters, unread: pieces.len(), urgent });
        if urgent {
            self.urgent_pieces.extend(pieces)
        } else {
            self.background_pieces.extend(pieces)
        }
        Ok(())
    }
}
