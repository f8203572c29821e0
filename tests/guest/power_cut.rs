//! Power cuts: virtioblkd runs inside a guest whose disk loses what was not flushed, under load, in each of the five
//! modes, on that disk and on a file of an ext4 filesystem there. After every cut each mode has kept exactly what it
//! promises; whoever relies on more is let down, which shows that the judge can find a loss.
//!
//! The host records in one order what the disk was asked, what it answered and what the front-end in the guest was told.
//! Nothing need be switched off then: each point of the record is a cut, and the judge works out what the medium may
//! hold there. Seeds are printed; `VIRTIOBLKD_POWER_SEED` sets the first, `VIRTIOBLKD_POWER=long` takes many more.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::power::disk::{Record, VolatileDisk};
use super::power::judge::{Area, Promise, Verdict, judge_copies, judge_disk, judge_file};
use super::power::load::{self, Plan};
use super::power::said::SECTOR;
use kit::guest;
use kit::guest::qemu::{Qemu, Vm};
use kit::guest::{accelerator, ext4, scratch, tell};
use kit::prng::Prng;
use virtioblkd::engine::cache::CacheMode;

/// The disk, and the part of it or the file that the front-end uses.
const DISK: usize = 32 << 20;
const AREA: u64 = (1 << 20) / SECTOR as u64;

/// The front-end that the guest runs.
#[test]
#[ignore = "not a test by itself: the guests of the other tests run it"]
fn front_end() {
    load::run();
}

/// A guest with virtioblkd, this program and a disk that loses what was not flushed.
struct Laboratory {
    vm: Vm,
    // After the guest: it ends with it.
    disk: VolatileDisk,
    _dir: tempfile::TempDir,
}

impl Laboratory {
    fn start(seed: u64) -> Laboratory {
        let dir = tempfile::tempdir().expect("a directory for the sockets");
        let disk = VolatileDisk::start(dir.path(), DISK, seed);
        let job = [include_str!("serve.sh"), include_str!("power/guest.sh"), kit::guest::qemu::SHELL].concat();
        let programs = [
            ("virtioblkd", guest::server::program("virtioblkd")),
            ("virtioblkctl", guest::server::program("virtioblkctl")),
            ("power_cut", std::env::current_exe().expect("a running program has one")),
        ];
        let qemu = Qemu::new(accelerator(), 384, 2).linux_with_programs(&job, "initramfs.cpio", &programs);
        Laboratory { vm: disk.plug_in(qemu).start_shell(), disk, _dir: dir }
    }

    /// One load from start to end, on what is served as `image` in the guest.
    fn load(&mut self, image: &str, mode: CacheMode, plan: &Plan) -> Record {
        // Copies are made beside a file.
        let copies = if image.starts_with("/mnt/") { "--copy-dir /mnt" } else { "" };
        self.vm.sh(&format!("serve {image} {mode} {copies}"));
        self.disk.begin();
        let plan = serde_json::to_string(plan).expect("a plan is JSON");
        self.vm.sh(&format!("load '{plan}'"));
        self.vm.sh("stop_serving");
        self.disk.end()
    }
}

/// What a front-end does in a mode, what it may rely on there, and what it may not.
struct Case {
    mode: CacheMode,
    flushes: bool,
    promise: Promise,
    too_much: &'static [Promise],
}

const fn case(mode: CacheMode, flushes: bool, promise: Promise, too_much: &'static [Promise]) -> Case {
    Case { mode, flushes, promise, too_much }
}

const CASES: [Case; 7] = [
    case(CacheMode::None, true, Promise::Flushed, &[Promise::Acknowledged]),
    case(CacheMode::Directsync, false, Promise::Acknowledged, &[]),
    case(CacheMode::Writeback, true, Promise::Flushed, &[Promise::Acknowledged]),
    case(CacheMode::Writethrough, false, Promise::Acknowledged, &[]),
    case(CacheMode::Unsafe, true, Promise::Held, &[Promise::Flushed, Promise::Acknowledged]),
    // A driver that cannot flush relies on every acknowledgement.
    case(CacheMode::None, false, Promise::Acknowledged, &[]),
    case(CacheMode::Writeback, false, Promise::Acknowledged, &[]),
];

/// Judges a record by what the case promises, which must hold, and by more than that, which must not.
fn check(case: &Case, place: &str, seed: u64, judge: &mut dyn FnMut(Promise) -> Verdict) -> usize {
    let verdict = judge(case.promise);
    let name = format!("{:12} {place} {}", case.mode.name(), if case.flushes { "flushing" } else { "not flushing" });
    let mut line = format!(
        "{name:36} {:?}: {} cuts, {} promises, {} broken",
        case.promise,
        verdict.cuts,
        verdict.promises,
        verdict.losses.len()
    );
    for promise in case.too_much {
        let losses = judge(*promise).losses.len();
        line += &format!("; judged as {promise:?}: {losses} broken");
        assert!(losses > 0, "{line}, seed {seed}: the judge sees no loss where there must be one");
    }
    tell(&line);
    assert!(verdict.promises > 0, "{line}, seed {seed}: nothing was promised");
    let losses: Vec<String> = verdict.losses.iter().take(5).map(|loss| format!("\n  {loss}")).collect();
    assert!(losses.is_empty(), "{line}, seed {seed}:{}", losses.concat());
    verdict.cuts
}

/// The first seed of the run, and how many rounds of all cases there are.
fn rounds() -> std::ops::Range<u64> {
    let seed = match std::env::var("VIRTIOBLKD_POWER_SEED") {
        Ok(seed) => seed.parse().expect("VIRTIOBLKD_POWER_SEED is a number"),
        Err(_) => std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs(),
    };
    let rounds = if is_long() { 20 } else { 1 };
    tell(&format!("power cuts: seed {seed}"));
    seed..seed + rounds
}

fn is_long() -> bool {
    std::env::var("VIRTIOBLKD_POWER").is_ok_and(|value| value == "long")
}

fn plan(case: &Case, seed: u64, salt: u64) -> Plan {
    Plan { seed, salt, sectors: AREA, requests: 1000, flushes: case.flushes, holds: 3, copies: None }
}

#[test]
fn each_mode_keeps_what_it_promises_on_a_disk() {
    let rounds = rounds();
    let mut laboratory = Laboratory::start(rounds.start);
    let mut cuts = 0;
    for seed in rounds {
        for (nth, case) in (0..).zip(&CASES) {
            let plan = plan(case, seed, seed << 8 | nth);
            let record = laboratory.load("/dev/vda", case.mode, &plan);
            let area = Area { salt: plan.salt, sectors: plan.sectors };
            cuts += check(case, "disk", seed, &mut |promise| judge_disk(&record, promise, area));
        }
    }
    tell(&format!("{cuts} cuts judged on a disk"));
}

#[test]
fn each_mode_keeps_what_it_promises_on_a_file() {
    let (rounds, dir) = (rounds(), scratch());
    let each = if is_long() { 60 } else { 12 };
    let mut laboratory = Laboratory::start(rounds.start);
    let mut cuts = 0;
    for seed in rounds {
        for (nth, case) in (0..).zip(&CASES) {
            let plan = plan(case, seed, seed << 8 | nth);
            laboratory.vm.sh(&format!("make_file {}", AREA as usize * SECTOR));
            let record = laboratory.load("/mnt/disk.img", case.mode, &plan);
            laboratory.vm.sh("umount /mnt");
            let area = Area { salt: plan.salt, sectors: plan.sectors };
            cuts += check(case, "file", seed, &mut |promise| {
                let recover = |medium: &[u8]| {
                    ext4::read_file(&recovered(dir.path(), medium), "disk.img").expect("a file that was synced")
                };
                judge_file(&record, promise, area, each, &mut Prng::new(seed), recover)
            });
        }
    }
    tell(&format!("{cuts} cuts judged on a file"));
}

/// No promise survives a kernel under the server that drops flushes and reports success, an operator's quiesce in
/// `unsafe` included: each of the promises above is kept by flushes that reach the disk.
#[test]
fn where_flushes_are_dropped_below_the_server_every_promise_breaks() {
    let seed = rounds().start;
    let mut laboratory = Laboratory::start(seed);
    laboratory.vm.sh("lie");
    for (nth, case) in (0..).zip(&CASES) {
        let plan = Plan { requests: 200, holds: 1, ..plan(case, seed, seed << 8 | nth) };
        let record = laboratory.load("/dev/vda", case.mode, &plan);
        let area = Area { salt: plan.salt, sectors: plan.sectors };
        let losses = judge_disk(&record, case.promise, area).losses.len();
        tell(&format!("{} over dropped flushes, {:?}: {losses} broken", case.mode.name(), case.promise));
        assert!(losses > 0, "{}, seed {seed}: the judge sees no loss where there must be one", case.mode.name());
    }
}

/// A snapshot by `copy:` that was reported is there after a cut, and whole; one that was not is not there under its
/// name. A copy by cp, which syncs nothing, is judged as well: it must not be as good.
#[test]
fn a_copy_that_has_its_name_is_whole() {
    let (seed, dir) = (rounds().start, scratch());
    let mut laboratory = Laboratory::start(seed);
    // What cp wrote would be written back in its time, and sooner than it is looked for on a slow machine.
    laboratory.vm.sh("echo 0 >/proc/sys/vm/dirty_writeback_centisecs");
    let case = &CASES[2];
    let cuts = if is_long() { 300 } else { 20 };
    let mut wrong = ["copy:/mnt/copy-N", "exec:cp /mnt/disk.img /mnt/copy-N"].map(|to| {
        let plan = Plan { copies: Some(to.into()), ..plan(case, seed, seed << 8) };
        laboratory.vm.sh(&format!("make_file {}", AREA as usize * SECTOR));
        let record = laboratory.load("/mnt/disk.img", case.mode, &plan);
        laboratory.vm.sh("umount /mnt");
        let wrong = judge_copies(&record, cuts, &mut Prng::new(seed), |medium| {
            let image = recovered(dir.path(), medium);
            (1..=plan.holds).map(|copy| ext4::read_file(&image, &format!("copy-{copy}"))).collect()
        });
        tell(&format!("{to}: {cuts} cuts, {} copies missing or not whole", wrong.len()));
        wrong
    });
    assert!(!wrong[1].is_empty(), "seed {seed}: the judge sees no loss where there must be one");
    wrong[0].truncate(5);
    assert!(wrong[0].is_empty(), "seed {seed}: {}", wrong[0].join("\n"));
}

/// A medium after the power came back: its filesystem has replayed the journal.
fn recovered(dir: &Path, medium: &[u8]) -> PathBuf {
    let image = dir.join("cut.img");
    let file = File::create(&image).and_then(|file| file.set_len(medium.len() as u64).map(|()| file));
    let file = file.expect("room for an image");
    const CHUNK: usize = 64 << 10;
    for (nth, chunk) in medium.chunks(CHUNK).enumerate() {
        if chunk != &[0; CHUNK][..chunk.len()] {
            file.write_all_at(chunk, (nth * CHUNK) as u64).expect("room for an image");
        }
    }
    ext4::recover(&image);
    image
}
