//! Whether a virtqueue pops requests, and how it comes to pause or to stop.
//!
//! A pause is for an upgrade in place, which may still be abandoned: the worker keeps the virtqueue. A stop hands the
//! virtqueue back to the connection's handler.

use super::Worker;
#[cfg(all(test, feature = "model"))]
use crate::base::sync::interleavings::{Mutant, planted};
use crate::base::sync::mpsc::Sender;
use crate::virtio::rings::StopMode;

/// The state of a running virtqueue.
pub(super) enum Lifecycle {
    /// The worker pops requests.
    Serving,
    /// The worker pops nothing new. When nothing is in flight, the virtqueue is paused and the sender gets a message.
    Pausing(Sender<()>),
    /// Nothing is in flight, and the worker pops nothing until [`super::WorkerCommand::Resume`].
    Paused,
    /// The worker pops nothing new, and ends when the virtqueue is drained as the mode requires.
    Stopping(StopMode),
}

impl Worker {
    /// Whether the worker may pop new requests.
    #[inline]
    pub(super) fn is_serving(&self) -> bool {
        matches!(self.lifecycle, Lifecycle::Serving)
    }

    /// Carries out [`super::WorkerCommand::Pause`].
    pub(super) fn pause(&mut self, reached: Sender<()>) {
        // What was popped must not depend on what the next server knows.
        self.admit_aside();
        self.lifecycle = Lifecycle::Pausing(reached);
    }

    /// Carries out [`super::WorkerCommand::Resume`].
    pub(super) fn resume(&mut self, done: &Sender<()>) {
        match self.lifecycle {
            #[cfg(all(test, feature = "model"))]
            Lifecycle::Pausing(_) if planted(Mutant::StopsAfterResume) => {
                self.lifecycle = Lifecycle::Stopping(StopMode::Restartable);
            }
            Lifecycle::Pausing(_) | Lifecycle::Paused => self.lifecycle = Lifecycle::Serving,
            Lifecycle::Serving | Lifecycle::Stopping(_) => {}
        }
        // The handler need not wait for the reply.
        let _ = done.send(());
    }

    /// Carries out [`super::WorkerCommand::Stop`].
    pub(super) fn stop(&mut self, mode: StopMode) {
        self.lifecycle = Lifecycle::Stopping(mode);
        self.stop_limiting();
        if mode == StopMode::Final {
            self.stop_retaining();
        }
    }

    /// Returns whether the virtqueue has stopped. Completes a pause whose last request is done.
    pub(super) fn has_stopped(&mut self) -> bool {
        match self.lifecycle {
            Lifecycle::Serving | Lifecycle::Paused => false,
            Lifecycle::Pausing(_) => {
                if self.is_drained(StopMode::Restartable) {
                    self.reach_pause();
                }
                false
            }
            Lifecycle::Stopping(mode) => self.is_drained(mode),
        }
    }

    fn reach_pause(&mut self) {
        let Lifecycle::Pausing(reached) = std::mem::replace(&mut self.lifecycle, Lifecycle::Paused) else { return };
        // The handler may have stopped waiting.
        let _ = reached.send(());
        #[cfg(all(test, feature = "model"))]
        if planted(Mutant::PopsWhilePaused) {
            self.lifecycle = Lifecycle::Serving;
        }
    }

    fn is_drained(&self, mode: StopMode) -> bool {
        let engine_is_done = match mode {
            StopMode::Restartable => self.engine.is_idle_but_for_retained(),
            StopMode::Final => self.engine.is_idle(),
        };
        engine_is_done && !self.backend.has_backlog() && self.may_leave_resubmissions(mode)
    }
}
