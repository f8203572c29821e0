//! The fuzz targets on the inputs that were kept (fuzz/corpus), and on mutations of these: the same story at each run, a
//! few seconds. VIRTIOBLKD_FUZZ_ROUNDS asks for more. What searches by coverage is `make fuzz`.

#[path = "../../fuzz/src/lib.rs"]
mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use kit::prng::Prng;

/// The longest input that is made.
const LONGEST: usize = 4096;

fn kept(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut paths: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let inputs: Vec<_> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(!inputs.is_empty(), "nothing in {}", folder.display());
    inputs
}

/// Runs the target on what was kept, and on `rounds` mutations.
fn replay(target: &str, rounds: u64, run: fn(&[u8])) {
    let inputs = kept(target);
    let try_one = |input: &[u8]| {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(input))) {
            eprintln!("{target}: printf '{}' >input; keep it in fuzz/corpus/{target} once mended", hex(input));
            std::panic::resume_unwind(panic);
        }
    };
    inputs.iter().for_each(|input| try_one(input));
    let rounds = std::env::var("VIRTIOBLKD_FUZZ_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(rounds);
    let mut prng = Prng::new(rounds);
    for _ in 0..rounds {
        try_one(&mutated(&mut prng, &inputs));
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect()
}

/// One input, or the start of one and the end of another, with a few bytes changed.
fn mutated(prng: &mut Prng, inputs: &[Vec<u8>]) -> Vec<u8> {
    let some = |prng: &mut Prng| &inputs[prng.below(inputs.len() as u64) as usize];
    let mut made = some(prng).clone();
    if prng.below(3) == 0 {
        let other = some(prng);
        made.truncate(prng.below(made.len() as u64 + 1) as usize);
        made.extend_from_slice(&other[prng.below(other.len() as u64 + 1) as usize..]);
    }
    for _ in 0..prng.below(8) {
        let at = prng.below(made.len() as u64 + 1) as usize;
        match prng.below(6) {
            0 => {
                let more = prng.below(16) as usize;
                made.splice(at..at, prng.bytes(more));
            }
            1 => drop(made.drain(at..(at + prng.below(16) as usize).min(made.len()))),
            2 => {
                let end = (at + 1 + prng.below(64) as usize).min(made.len());
                let part = made[at..end].to_vec();
                made.splice(at..at, part);
            }
            kind => {
                if let Some(byte) = made.get_mut(at) {
                    *byte = match kind {
                        3 => prng.one_of(&[0, 1, 0x7f, 0x80, 0xff]),
                        4 => *byte ^ 1 << prng.below(8),
                        _ => prng.below(256) as u8,
                    };
                }
            }
        }
    }
    made.truncate(LONGEST);
    made
}

#[test]
fn chains() {
    let understood: Vec<u64> = kept("chain").iter().map(|input| targets::chain::run(input)).collect();
    assert!(understood.iter().sum::<u64>() >= 7, "{understood:?}");
    replay("chain", 20_000, |input| {
        targets::chain::run(input);
    });
}

#[test]
fn the_configuration_space() {
    replay("config_space", 20_000, targets::config_space::run);
}

#[test]
fn control_requests() {
    replay("control", 10_000, targets::control::run);
}

#[test]
fn nbd_clients() {
    replay("nbd", 20_000, targets::nbd::run);
}

#[test]
fn options() {
    replay("options", 1_000, targets::options::run);
}

#[test]
fn vhost_user_messages() {
    replay("vhost_user", 500, |input| {
        targets::vhost_user::run(input);
    });
    // A ring ran, and served what was in it.
    assert!(kept("vhost_user").iter().any(|input| targets::vhost_user::run(input) > 0));
}

/// The harness itself: a target that is wrong is found out.
#[test]
#[should_panic(expected = "found")]
fn a_target_that_panics_is_found() {
    replay("control", 10_000, |input| assert!(!input.contains(&0x80), "found"));
}
