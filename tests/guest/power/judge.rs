//! The judge: takes a record as power cuts at every point of it, and finds where a promise is broken.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;

use super::disk::{Event, Record};
use super::said::{Found, Kind, SECTOR, Said, read};
use kit::prng::Prng;

/// When the front-end takes a change for durable.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Promise {
    /// As soon as it is acknowledged.
    Acknowledged,
    /// When a flush that was sent after its acknowledgement is acknowledged.
    Flushed,
    /// When an operator's quiesce has succeeded since, or the server has ended in order.
    Held,
}

/// What was written to a sector, oldest first, each with its write.
type Versions = Vec<(u64, Box<[u8]>)>;

/// A medium under a volatile cache, at one point of a record.
pub struct Medium {
    durable: Vec<u8>,
    /// By sector: what may have replaced the durable bytes.
    pending: BTreeMap<u64, Versions>,
    /// Writes that were done, and flushes that arrived, each with the point of the record.
    done: HashMap<u64, usize>,
    flushes: HashMap<u64, usize>,
}

impl Medium {
    /// Before the first event of `record`.
    pub fn new(record: &Record) -> Medium {
        let durable = record.start.clone();
        Medium { durable, pending: BTreeMap::new(), done: HashMap::new(), flushes: HashMap::new() }
    }

    /// The event at point `at` happens.
    pub fn apply(&mut self, at: usize, event: &Event) {
        match event {
            Event::Write { id, first, data } => {
                for index in 0..data.len() {
                    let bytes = data.sector(index).into();
                    self.pending.entry(first + index).or_default().push((*id, bytes));
                }
            }
            Event::WriteDone(id) => {
                self.done.insert(*id, at);
            }
            Event::Flush(id) => {
                self.flushes.insert(*id, at);
            }
            Event::FlushDone(id) => {
                // A flush from before the record covers nothing of it.
                if let Some(arrived) = self.flushes.remove(id) {
                    self.flush(arrived);
                }
            }
            Event::Said(_) => {}
        }
    }

    /// The writes done before point `arrived` are durable: the newest of a sector, and with it none that is older.
    fn flush(&mut self, arrived: usize) {
        let (durable, done) = (&mut self.durable, &self.done);
        self.pending.retain(|sector, versions| {
            let covered = |(id, _): &(u64, Box<[u8]>)| done.get(id).is_some_and(|at| *at < arrived);
            if let Some(newest) = versions.iter().rposition(covered) {
                durable[*sector as usize * SECTOR..][..SECTOR].copy_from_slice(&versions[newest].1);
                versions.drain(..=newest);
            }
            !versions.is_empty()
        });
    }

    /// Whatever a cut may leave in a sector.
    pub fn possible(&self, sector: u64) -> impl Iterator<Item = &[u8]> {
        let durable = &self.durable[sector as usize * SECTOR..][..SECTOR];
        let pending = self.pending.get(&sector).into_iter().flatten();
        std::iter::once(durable).chain(pending.map(|(_, bytes)| &**bytes))
    }

    /// What the disk was told last, in every sector.
    fn newest(&self) -> Vec<u8> {
        let mut medium = self.durable.clone();
        for (sector, versions) in &self.pending {
            if let Some((_, bytes)) = versions.last() {
                medium[*sector as usize * SECTOR..][..SECTOR].copy_from_slice(bytes);
            }
        }
        medium
    }

    /// One of the media that a cut may leave: nothing that was not flushed, all of it, or any part.
    pub fn cut(&self, prng: &mut Prng) -> Vec<u8> {
        let mut medium = self.durable.clone();
        let kept = prng.one_of(&[0, 5, 50, 95, 100]);
        for (sector, versions) in &self.pending {
            if prng.below(100) < kept {
                let version = if kept == 100 { versions.len() - 1 } else { prng.below(versions.len() as u64) as usize };
                medium[*sector as usize * SECTOR..][..SECTOR].copy_from_slice(&versions[version].1);
            }
        }
        medium
    }
}

/// What was changed in a sector, and what of it was promised.
#[derive(Clone, Default)]
struct Sector {
    /// In the order of their numbers, which is the order of their effects.
    changes: Vec<(u64, Kind)>,
    acknowledged: u64,
    promised: u64,
}

/// What the front-end may rely on, at one point of a record.
pub struct Promises {
    promise: Promise,
    sectors: Vec<Sector>,
    changes: HashMap<u64, Range<u64>>,
    /// For each flush under way, by sector: what had been acknowledged when it was sent.
    flushes: HashMap<u64, Vec<u64>>,
}

impl Promises {
    /// Before the front-end's first word.
    pub fn new(promise: Promise, sectors: u64) -> Promises {
        let sectors = vec![Sector::default(); sectors as usize];
        Promises { promise, sectors, changes: HashMap::new(), flushes: HashMap::new() }
    }

    /// Takes a word of the front-end. Returns the sectors of which more is promised than before.
    pub fn hear(&mut self, said: &Said) -> Vec<u64> {
        match said {
            Said::Sent(number, kind, sectors) => {
                for sector in sectors.clone() {
                    self.sectors[sector as usize].changes.push((*number, *kind));
                }
                self.changes.insert(*number, sectors.clone());
            }
            Said::Acknowledged(number) => {
                let sectors = self.changes.remove(number).expect("sent before it was acknowledged");
                for sector in sectors.clone() {
                    self.sectors[sector as usize].acknowledged = *number;
                }
                if self.promise == Promise::Acknowledged {
                    return sectors.filter(|sector| self.promise_up_to(*sector, *number)).collect();
                }
            }
            Said::FlushSent(number) => {
                self.flushes.insert(*number, self.acknowledged());
            }
            Said::FlushAcknowledged(number) => {
                let covered = self.flushes.remove(number).expect("sent before it was acknowledged");
                if self.promise != Promise::Held {
                    return self.promise_all(&covered);
                }
            }
            Said::Held | Said::Stopped => return self.promise_all(&self.acknowledged()),
            Said::Copied(_) | Said::Ended => {}
        }
        Vec::new()
    }

    fn acknowledged(&self) -> Vec<u64> {
        self.sectors.iter().map(|sector| sector.acknowledged).collect()
    }

    fn promise_all(&mut self, covered: &[u64]) -> Vec<u64> {
        let sectors = 0..covered.len() as u64;
        sectors.filter(|sector| self.promise_up_to(*sector, covered[*sector as usize])).collect()
    }

    fn promise_up_to(&mut self, sector: u64, number: u64) -> bool {
        let sector = &mut self.sectors[sector as usize];
        let more = number > sector.promised;
        sector.promised = sector.promised.max(number);
        more
    }

    /// Whether a sector may hold what was found in it. `is_old`: what it holds is what it held at the start.
    fn allows(&self, sector: u64, found: Found, is_old: bool) -> bool {
        let Sector { changes, promised, .. } = &self.sectors[sector as usize];
        let may_be = |wanted: Kind| changes.iter().any(|(number, kind)| number >= promised && *kind == wanted);
        let was_written = |wanted: u64| changes.contains(&(wanted, Kind::Write));
        if is_old && *promised == 0 {
            return true;
        }
        // A discard may leave what was there, of whatever age.
        let discarded = may_be(Kind::Discard);
        match found {
            Found::Change(number) => was_written(number) && (number >= *promised || discarded),
            Found::Zeroes => may_be(Kind::Zeroes) || discarded,
            Found::Other => is_old && discarded,
        }
    }

    /// The loss, when a sector holds after a cut what it may not hold.
    fn loss(&self, at: usize, sector: u64, found: Found, is_old: bool) -> Option<Loss> {
        let promised = self.sectors[sector as usize].promised;
        (!self.allows(sector, found, is_old)).then_some(Loss { at, sector, found, promised })
    }
}

/// A promise that a cut breaks.
pub struct Loss {
    /// The point of the record.
    at: usize,
    sector: u64,
    found: Found,
    promised: u64,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Loss { at, sector, found, promised } = self;
        write!(f, "cut at {at}: sector {sector} may hold {found:?}, promised was change {promised}")
    }
}

/// What came of a record.
#[derive(Default)]
pub struct Verdict {
    /// Cuts that were judged.
    pub cuts: usize,
    /// Times that more was promised of a sector.
    pub promises: usize,
    pub losses: Vec<Loss>,
}

/// A load's place, as the judge needs it.
#[derive(Clone, Copy)]
pub struct Area {
    pub salt: u64,
    pub sectors: u64,
}

/// Judges a load on the disk itself: a cut at every point, and of each all parts of the cache that it may keep. As a
/// sector keeps its promise or not whatever becomes of the others, all parts are judged by judging each sector's
/// versions; and a sector can only begin to fail where it changes or where more is promised of it.
pub fn judge_disk(record: &Record, promise: Promise, area: Area) -> Verdict {
    let mut medium = Medium::new(record);
    let mut promises = Promises::new(promise, area.sectors);
    let mut verdict = Verdict { cuts: record.events.len(), ..Verdict::default() };
    for (at, event) in record.events.iter().enumerate() {
        medium.apply(at, event);
        let sectors = match event {
            Event::Write { first, data, .. } => (*first..area.sectors.min(first + data.len())).collect(),
            Event::Said(said) => {
                let more = promises.hear(said);
                verdict.promises += more.len();
                more
            }
            _ => Vec::new(),
        };
        for sector in sectors {
            let old = &record.start[sector as usize * SECTOR..][..SECTOR];
            for bytes in medium.possible(sector) {
                let found = read(area.salt, sector, bytes);
                verdict.losses.extend(promises.loss(at, sector, found, bytes == old));
            }
        }
    }
    verdict
}

/// Judges a load on a file: at `cuts` points `recover` makes the file of one of the media that a cut there may leave.
/// Its sectors were zeroes at the start.
pub fn judge_file(
    record: &Record,
    promise: Promise,
    area: Area,
    cuts: usize,
    prng: &mut Prng,
    mut recover: impl FnMut(&[u8]) -> Vec<u8>,
) -> Verdict {
    let mut promises = Promises::new(promise, area.sectors);
    let mut verdict = Verdict { cuts, ..Verdict::default() };
    let points = points(record, cuts, prng);
    walk(record, points, prng, &mut |at, step| match step {
        Step::Said(said) => verdict.promises += promises.hear(said).len(),
        Step::Cut(medium) => {
            let file = recover(&medium);
            assert_eq!(file.len(), area.sectors as usize * SECTOR, "cut at {at}: the file's size");
            for (sector, bytes) in (0..).zip(file.chunks(SECTOR)) {
                let found = read(area.salt, sector, bytes);
                verdict.losses.extend(promises.loss(at, sector, found, found == Found::Zeroes));
            }
        }
    });
    verdict
}

/// Judges copies of the disk, made during a load on a file: one that was reported to be complete is there, and one that
/// is there is complete. `recover` makes the copies, by number from 1, of a medium. Returns what is wrong.
pub fn judge_copies(
    record: &Record,
    cuts: usize,
    prng: &mut Prng,
    mut recover: impl FnMut(&[u8]) -> Vec<Option<Vec<u8>>>,
) -> Vec<String> {
    let ends: Vec<usize> =
        (0..record.events.len()).filter(|at| matches!(record.events[*at], Event::Said(Said::Copied(_)))).collect();
    // What the disk was told last is what a copy is when nothing is lost.
    let mut medium = Medium::new(record);
    record.events.iter().enumerate().for_each(|(at, event)| medium.apply(at, event));
    let whole = recover(&medium.newest());
    assert!(whole.len() == ends.len() && whole.iter().all(Option::is_some), "copies are missing without a cut");
    // About the ends something may go wrong; most of the record has nothing to do with them.
    let near = |prng: &mut Prng| (prng.one_of(&ends) + prng.below(60) as usize).saturating_sub(20);
    let mut points: Vec<usize> = (0..cuts).map(|_| near(prng).min(record.events.len() - 1)).collect();
    points.sort_unstable_by(|a, b| b.cmp(a));
    let (mut reported, mut wrong) = (0, Vec::new());
    walk(record, points, prng, &mut |at, step| match step {
        Step::Said(said) => reported += u64::from(matches!(said, Said::Copied(_))),
        Step::Cut(medium) => {
            for (number, (found, whole)) in (1..).zip(recover(&medium).iter().zip(&whole)) {
                match found {
                    None if number <= reported => wrong.push(format!("cut at {at}: copy {number} is not there")),
                    Some(_) if found != whole => wrong.push(format!("cut at {at}: copy {number} is not whole")),
                    _ => {}
                }
            }
        }
    });
    wrong
}

/// What [`walk`] comes upon.
enum Step<'a> {
    Said(&'a Said),
    /// One of the media that a cut may leave here.
    Cut(Vec<u8>),
}

/// Goes through a record and cuts at `points`, the last one first.
fn walk(record: &Record, mut points: Vec<usize>, prng: &mut Prng, visit: &mut dyn FnMut(usize, Step<'_>)) {
    let mut medium = Medium::new(record);
    for (at, event) in record.events.iter().enumerate() {
        medium.apply(at, event);
        if let Event::Said(said) = event {
            visit(at, Step::Said(said));
        }
        while points.last() == Some(&at) {
            points.pop();
            visit(at, Step::Cut(medium.cut(prng)));
        }
    }
}

/// Points of a record, the last one first: half of them anywhere, half where something was just acknowledged.
fn points(record: &Record, count: usize, prng: &mut Prng) -> Vec<usize> {
    let is_answer = |event: &Event| {
        matches!(event, Event::Said(Said::Acknowledged(_) | Said::FlushAcknowledged(_) | Said::Held | Said::Stopped))
    };
    let answers: Vec<usize> = (0..record.events.len()).filter(|at| is_answer(&record.events[*at])).collect();
    let mut points: Vec<usize> = (0..count)
        .map(|nth| if nth % 2 == 0 { prng.below(record.events.len() as u64) as usize } else { prng.one_of(&answers) })
        .collect();
    points.sort_unstable_by(|a, b| b.cmp(a));
    points
}
