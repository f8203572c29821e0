//! How the models run: many orders of the threads, drawn at random from a seed. A thread that waits looks again and
//! again, so a lost wake-up is a run that does not end, and fails when it has taken [`MAX_STEPS`].

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use shuttle::scheduler::RandomScheduler;
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

/// A fault that can be planted into a hand-off; the models must find each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// The bell is rung before the news is there.
    RingsFirst,
    /// The bell is silenced after the news was taken.
    SilencesLast,
    /// A worker takes one command for each time that it wakes.
    OneCommandAWake,
    /// A ring that starts during a hold starts open.
    JoinsOpen,
    /// A worker that looked for work in vain asks for kicks and sleeps, though something came meanwhile.
    SleepsUnlooking,
    /// A ring that stops during a hold is waited for.
    LeavesUnsettled,
    /// The image is given to others when the last ring stops, whoever holds it.
    GivesHeldImage,
    /// An image that rings left to a hold stays ours when it ends.
    KeepsImage,
    /// A ring that has said that it rests takes what comes.
    RestsInName,
    /// A ring that is let go before it has come to rest comes to rest all the same.
    RestsTooLate,
    /// The gate of a held ring stays open.
    GateStaysOpen,
    /// A worker does not read its ring again when a hold ends.
    ResumeMissed,
    /// An aligned write checks whether a gate is open, and enters after that.
    EntersUnchecked,
    /// The last aligned write that leaves a closed gate wakes no read-modify-write.
    LeavesSilently,
    /// A long unaligned write does not enter the gates of its whole blocks.
    EntersUnseen,
}

thread_local! {
    // All threads of a model are one of the kernel's, so this is all of theirs.
    static PLANTED: Cell<Option<Mutant>> = const { Cell::new(None) };
}

/// Whether this fault is planted.
pub(crate) fn planted(mutant: Mutant) -> bool {
    PLANTED.get() == Some(mutant)
}

/// Orders that each model tries; `make check-deep` wants more (VIRTIOBLKD_ORDERS).
const ORDERS: usize = 1000;
/// A run that ends takes some hundreds.
const MAX_STEPS: usize = 20_000;
const SEED: u64 = 7;

fn run(model: impl Fn() + Send + Sync + 'static) {
    let mut config = Config::new();
    config.max_steps = MaxSteps::FailAfter(MAX_STEPS);
    config.failure_persistence = FailurePersistence::None;
    let orders = std::env::var("VIRTIOBLKD_ORDERS").map_or(ORDERS, |orders| orders.parse().expect("a number"));
    Runner::new(RandomScheduler::new_from_seed(SEED, orders), config).run(model);
}

/// Runs the model, which must hold in every order, and then with each fault, which must break it in some.
pub(crate) fn holds(model: impl Fn() + Clone + Send + Sync + 'static, mutants: &[Mutant]) {
    run(model.clone());
    for &mutant in mutants {
        PLANTED.set(Some(mutant));
        let broken = fails(model.clone());
        PLANTED.set(None);
        assert!(broken, "{mutant:?} was not found");
    }
}

/// Whether some order breaks the model.
fn fails(model: impl Fn() + Send + Sync + 'static) -> bool {
    catch_unwind(AssertUnwindSafe(|| run(model))).is_err()
}
