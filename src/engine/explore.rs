//! Walks every order of events that a worker could see, over small scripts, the five modes, with and without durable
//! writes and a driver that can flush, with failures that are reported and retained, and asks the oracles of
//! [`super::model`] after every step.
//!
//! States that were seen are not walked again: two paths that lead to equal worlds have the same future. A seen state
//! is remembered by a 64-bit hash; a walk has some 10^6 states at most, so the chance that one of them is mistaken for
//! another is about one in 10^7.
//!
//! `cargo test` walks [`short`] in a few seconds. `VIRTIOBLKD_EXPLORE=long cargo test --lib no_order_of_events` walks
//! [`long`], more than a hundred times as much: a few minutes in a debug build.
//!
//! A violation is printed with the setup and the steps that lead to it. A new promise is a new oracle, and a fault in
//! `tests/engine_faults/faults.rs` that the oracle must find.

use std::collections::HashSet;
use std::fmt;
use std::hash::{BuildHasherDefault, Hash, Hasher};

use super::model::{WorkerStep, World};
use super::oracle::Oracle;
use super::setup::Setup;
use super::{CacheMode, Kind};

/// Scripts of every run, beside all of one and two requests: letters are [`kind`]s, then how many blocks and errors
/// may happen.
const SHORT: [(&str, u8, u8); 9] = [
    ("w", 3, 2),
    ("ww", 2, 0),
    ("wf", 2, 1),
    ("wrf", 1, 0),
    ("wr", 0, 2),
    ("wwf", 0, 1),
    ("fwf", 1, 0),
    ("www", 1, 0),
    ("zwfd", 0, 0),
];

/// Scripts of the long run, beside all of two and three requests.
const LONG: [(&str, u8, u8); 8] = [
    ("wwff", 2, 1),
    ("wfwf", 2, 1),
    ("rwdf", 2, 1),
    ("wzfr", 2, 1),
    ("wwww", 3, 0),
    ("wfwfr", 1, 1),
    ("wwwff", 1, 1),
    ("dwzfw", 2, 0),
];

/// A failed oracle and the steps that lead there.
struct Violation {
    oracle: Oracle,
    setup: Setup,
    trace: Vec<WorkerStep>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?} in {:?}", self.oracle, self.setup)?;
        self.trace.iter().try_for_each(|step| writeln!(f, "    {step:?}"))
    }
}

/// Multiply and rotate: the standard hasher would take most of the time in a debug build.
#[derive(Default)]
struct Mixer(u64);

impl Mixer {
    fn add(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

impl Hasher for Mixer {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.add(u64::from_ne_bytes(word));
        }
    }

    fn write_u8(&mut self, word: u8) {
        self.add(word.into());
    }

    fn write_u32(&mut self, word: u32) {
        self.add(word.into());
    }

    fn write_u64(&mut self, word: u64) {
        self.add(word);
    }

    fn write_usize(&mut self, word: usize) {
        self.add(word as u64);
    }

    fn finish(&self) -> u64 {
        // The upper half is mixed best; the table looks at both ends.
        self.0 ^ self.0 >> 32
    }
}

type Seen = HashSet<u64, BuildHasherDefault<Mixer>>;

/// One walk over everything that may happen in one setup.
struct Walk<'a> {
    setup: &'a Setup,
    /// Stop only where this oracle fails; a step that fails another one ends its path, a state that fails another one
    /// does not. `None`: stop where any fails.
    wanted: Option<&'a str>,
    seen: Seen,
    trace: Vec<WorkerStep>,
    transitions: u64,
}

impl Walk<'_> {
    /// Walks depth first. `Some`: this oracle failed, and `trace` leads there.
    fn walk(&mut self, world: &World) -> Option<Oracle> {
        let mut steps = Vec::new();
        world.steps(self.setup, &mut steps);
        for step in steps {
            let mut next = world.clone();
            self.trace.push(step);
            self.transitions += 1;
            let stepped = next.step(self.setup, step);
            let verdict = stepped.and_then(|()| next.judge(self.setup));
            let failed =
                verdict.err().filter(|oracle| self.wanted.is_none_or(|wanted| wanted == format!("{oracle:?}")));
            if failed.is_some() {
                return failed;
            }
            if stepped.is_ok() && self.is_new(&next) {
                let found = self.walk(&next);
                if found.is_some() {
                    return found;
                }
            }
            self.trace.pop();
        }
        None
    }

    fn is_new(&mut self, world: &World) -> bool {
        let mut hasher = Mixer::default();
        world.hash(&mut hasher);
        self.seen.insert(hasher.finish())
    }
}

/// What a run over many setups visited.
#[derive(Default)]
struct Totals {
    setups: u64,
    states: u64,
    transitions: u64,
}

/// Walks every script in every mode, until an oracle fails. `retains`: failures are retained; scripts without failures are
/// then skipped.
fn explore(
    scripts: &[(String, u8, u8)],
    retains: bool,
    wanted: Option<&str>,
    totals: &mut Totals,
) -> Option<Violation> {
    for (letters, blocks, errors) in scripts.iter().filter(|(_, _, errors)| *errors > 0 || !retains) {
        for mode in CacheMode::ALL {
            for (durable_writes, driver_can_flush) in [(false, false), (false, true), (true, false), (true, true)] {
                let script: Vec<Kind> = letters.chars().map(kind).collect();
                let (blocks, errors) = (*blocks, *errors);
                let setup = Setup { mode, durable_writes, driver_can_flush, script, blocks, errors, retains };
                let found = walk(setup, wanted, totals);
                if found.is_some() {
                    return found;
                }
            }
        }
    }
    None
}

fn walk(setup: Setup, wanted: Option<&str>, totals: &mut Totals) -> Option<Violation> {
    let mut walk = Walk { setup: &setup, wanted, seen: Seen::default(), trace: Vec::new(), transitions: 0 };
    let found = walk.walk(&World::new(&setup));
    totals.setups += 1;
    totals.states += walk.seen.len() as u64;
    totals.transitions += walk.transitions;
    let oracle = found?;
    let trace = walk.trace;
    Some(Violation { oracle, setup, trace })
}

fn kind(letter: char) -> Kind {
    match letter {
        'r' => Kind::Read,
        'w' => Kind::Write,
        'f' => Kind::Flush,
        'd' => Kind::Discard,
        'z' => Kind::WriteZeroes,
        _ => panic!("'{letter}' names no kind of request"),
    }
}

/// Every script of one and two requests, and [`SHORT`].
fn short() -> Vec<(String, u8, u8)> {
    let mut scripts = Vec::new();
    scripts.extend(all_of(1).into_iter().map(|letters| (letters, 2, 1)));
    scripts.extend(all_of(2).into_iter().map(|letters| (letters, 1, 1)));
    scripts.extend(SHORT.map(|(letters, blocks, errors)| (letters.to_string(), blocks, errors)));
    scripts
}

/// Every script of two and three requests, [`LONG`], and the short run's.
fn long() -> Vec<(String, u8, u8)> {
    let mut scripts = short();
    scripts.extend((2..=3).flat_map(all_of).map(|letters| (letters, 2, 1)));
    scripts.extend(LONG.map(|(letters, blocks, errors)| (letters.to_string(), blocks, errors)));
    scripts
}

/// Every script of this many requests.
fn all_of(requests: u32) -> Vec<String> {
    (0..requests).fold(vec![String::new()], |heads, _| {
        heads.iter().flat_map(|head| "rwfdz".chars().map(move |letter| format!("{head}{letter}"))).collect()
    })
}

#[test]
fn no_order_of_events_breaks_a_promise() {
    let is_long = std::env::var_os("VIRTIOBLKD_EXPLORE").is_some_and(|how| how == "long");
    let scripts = if is_long { long() } else { short() };
    let mut totals = Totals::default();
    for retains in [false, true] {
        if let Some(violation) = explore(&scripts, retains, None, &mut totals) {
            panic!("{violation}");
        }
    }
    let Totals { setups, states, transitions } = totals;
    println!("{setups} setups, {states} states, {transitions} transitions");
    assert!(states > 10_000, "only {states} states: the explorer walks too little");
}

/// Whether the oracle that `VIRTIOBLKD_ORACLE` names fails for this engine. `tests/engine_faults/main.rs` compiles this
/// module with changed copies of the engine and runs this test on each.
#[test]
#[ignore = "tests/engine_faults/main.rs runs it on engines with a planted fault"]
fn the_wanted_oracle_fails() {
    let oracle = std::env::var("VIRTIOBLKD_ORACLE").expect("VIRTIOBLKD_ORACLE names an oracle");
    let retains = std::env::var("VIRTIOBLKD_RETAIN").is_ok_and(|retain| retain == "yes");
    assert!(explore(&short(), retains, Some(&oracle), &mut Totals::default()).is_some(), "{oracle} never failed");
}
