//! Runs the models: each in many orders of its threads, drawn at random from a seed. A thread that waits polls. So a
//! lost wake-up is a run that does not end; it fails after [`MAX_STEPS`].

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use shuttle::scheduler::RandomScheduler;
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

/// A fault that can be planted into a hand-off between threads. The models must find each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// A thread notifies before it has posted the message.
    NotifyBeforeMessage,
    /// A thread clears the notifier after it has taken the messages.
    ClearAfterTake,
    /// A worker takes one command each time it wakes up, and leaves the others.
    OneCommandPerWakeUp,
    /// A ring that starts during a hold starts with its gate open.
    StartsUnblocked,
    /// A worker that polled in vain enables kicks and sleeps, without a check for requests that came before that.
    SleepsWithoutCheck,
    /// A hold waits for a ring that has stopped.
    HoldAwaitsStoppedRing,
    /// The image is released when the last ring stops, although a hold is on.
    ReleasesHeldImage,
    /// The image is not released when the hold ends that outlasted the rings.
    NeverReleasesImage,
    /// A ring that has reported that it is paused pops requests.
    PopsWhilePaused,
    /// A ring that is resumed before it has paused stops all the same.
    StopsAfterResume,
    /// A ring's gate stays open during a hold.
    GateStaysOpen,
    /// A worker does not read its ring when a hold ends.
    IgnoresResume,
    /// An aligned write checks whether a gate is open, and enters after that.
    EntersUnchecked,
    /// The last aligned write that leaves a closed gate wakes no read-modify-write.
    LeavesSilently,
    /// A long unaligned write does not enter the gates of its whole blocks.
    EntersUnseen,
}

thread_local! {
    // All threads of a model run in one thread of the kernel, so they share this.
    static PLANTED: Cell<Option<Mutant>> = const { Cell::new(None) };
}

/// Whether this fault is planted.
pub(crate) fn planted(mutant: Mutant) -> bool {
    PLANTED.get() == Some(mutant)
}

/// How many orders each model is run in, unless VIRTIOBLKD_ORDERS says otherwise (`make check-deep`).
const ORDERS: usize = 1000;
/// The most steps of a run. A run that ends takes a few hundred.
const MAX_STEPS: usize = 20_000;
const SEED: u64 = 7;

/// The stack of a model's thread in bytes; shuttle's default is 60 KiB. A worker of the device needs more than that in a
/// build without optimization, and an overflow ends the tests by SIGSEGV.
const STACK_SIZE: usize = 1 << 20;

fn run(model: impl Fn() + Send + Sync + 'static) {
    let mut config = Config::new();
    config.max_steps = MaxSteps::FailAfter(MAX_STEPS);
    config.failure_persistence = FailurePersistence::None;
    config.stack_size = STACK_SIZE;
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
