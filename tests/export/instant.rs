//! The reader of an instant, without NBD: two rings overwrite the disk while three threads read it.

use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;

use kit::backend::Prng;
use virtioblkd::backend::point_in_time::{InstantReader, Mutant, Tuning};
use virtioblkd::disk::Copies;
use virtioblkd::engine::CacheMode;

use super::world::*;

/// Reads random ranges, many at once, and compares them. The error says what was wrong.
fn read_randomly(reader: &InstantReader, held: &[u8], seed: u64, reads: usize) -> Result<(), String> {
    let (mut prng, mut begun) = (Prng::new(seed), VecDeque::new());
    let mut finish = |(at, len, read): (u64, u64, _)| {
        let data = reader.finish(read).map_err(|error| format!("{error:?}"))?;
        same(&data, &held[at as usize..(at + len) as usize], at)
    };
    for _ in 0..reads {
        let len = 1 + prng.below(256 << 10);
        let at = prng.below(SIZE - len);
        begun.push_back((at, len, reader.begin(at..at + len)));
        if begun.len() == 24 {
            finish(begun.pop_front().expect("just pushed"))?;
        }
    }
    begun.into_iter().try_for_each(&mut finish)
}

/// What is said to be a hole reads as zeroes.
fn check_holes(reader: &InstantReader, held: &[u8]) -> Result<u64, String> {
    let (mut at, mut holes) = (0, 0);
    while at < SIZE {
        let extents = reader.status(at..SIZE).map_err(|error| format!("{error:?}"))?;
        assert!(!extents.is_empty() && extents.iter().all(|extent| extent.len > 0));
        for extent in extents {
            let bytes = &held[at as usize..(at + extent.len) as usize];
            if extent.hole {
                holes += extent.len;
                same(bytes, &vec![0; bytes.len()], at).map_err(|why| format!("in a hole, {why}"))?;
            }
            at += extent.len;
        }
    }
    assert_eq!(at, SIZE);
    Ok(holes)
}

/// One round. The error is what a reader saw that was not the instant's.
fn round(world: &World, seed: u64, reads: usize) -> Result<u64, String> {
    let (name, reader, held) = world.instant();
    let stop = AtomicBool::new(false);
    let (seen, ops) = thread::scope(|scope| {
        let disk = &*world.disk;
        let guests = [1, 2].map(|ring| {
            let stop = &stop;
            scope.spawn(move || overwrite(disk, seed * 10 + ring, stop))
        });
        let readers = [3, 4, 5].map(|nth| {
            let (reader, held) = (&reader, &held);
            scope.spawn(move || read_randomly(reader, held, seed * 10 + nth, reads))
        });
        let mut seen: Vec<Result<(), String>> = vec![check_holes(&reader, &held).map(drop)];
        seen.extend(readers.map(|reader| reader.join().expect("a reader")));
        stop.store(true, Relaxed);
        (seen, guests.map(|guest| guest.join().expect("a guest")).iter().sum())
    });
    seen.into_iter().collect::<Result<(), String>>()?;
    // Once more, all of it, now that most of it was overwritten.
    for at in (0..SIZE).step_by(256 << 10) {
        let end = SIZE.min(at + (256 << 10));
        let data = reader.finish(reader.begin(at..end)).map_err(|error| format!("{error:?}"))?;
        same(&data, &held[at as usize..end as usize], at)?;
    }
    check_holes(&reader, &held)?;
    world.disk.cancel(&name).expect("it runs");
    Ok(ops)
}

#[test]
fn what_is_read_is_the_image_at_the_instant() {
    // For a long run: VIRTIOBLKD_EXPORT_ROUNDS=1000 cargo test --release --test export instant::.
    let rounds = std::env::var("VIRTIOBLKD_EXPORT_ROUNDS").map_or(8, |rounds| rounds.parse().expect("a number"));
    for seed in 0..rounds {
        let memory = if seed % 3 == 0 { 2 * CLUSTER as usize } else { Tuning::default().memory };
        let world = World::mem(seed, Tuning { memory, ..Tuning::default() });
        let ops = round(&world, seed, 40).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        assert!(ops > 0, "the guest did nothing");
    }
}

#[test]
fn holes_are_those_of_the_instant() {
    for mode in [CacheMode::None, CacheMode::Writeback] {
        let (world, _dir) = World::file(mode);
        let (name, reader, held) = world.instant();
        let before = check_holes(&reader, &held).unwrap();
        assert!(before >= 2 << 20, "{before} bytes of holes: they are found");
        // The guest fills the holes, and makes new ones.
        let mut driver = kit::backend::Driver::new(&*world.disk, 1);
        driver.write(2 << 20, &[7; 1 << 16]).unwrap();
        driver.run(virtioblkd::backend::Op::Discard { offset: 0, len: 1 << 19 }).unwrap();
        let after = check_holes(&reader, &held).unwrap();
        assert_eq!(after, before, "neither is of the instant");
        world.disk.cancel(&name).unwrap();
        round(&world, 3, 40).unwrap();
    }
}

#[test]
fn every_planted_fault_is_found() {
    for mutant in [Mutant::SavesNothing, Mutant::ForgetsRanges, Mutant::ReleasesEarly, Mutant::LooksOnce] {
        let found = (0..200).find_map(|seed| {
            let world = World::mem(seed, Tuning { mutant: Some(mutant), ..Tuning::default() });
            round(&world, seed, 60).err().map(|why| (seed, why))
        });
        let (seed, why) = found.unwrap_or_else(|| panic!("{mutant:?} was not found"));
        eprintln!("{mutant:?} was found in round {seed}: {why}");
    }
}
