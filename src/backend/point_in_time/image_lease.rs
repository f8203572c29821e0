//! Whose the image is while a copy reads it. What another host writes passes by our rings, and a block of it that was not
//! saved yet would be in the copy. So a running copy keeps the image when its last user here lets go: a guest that was
//! reset soon comes back. One that has moved waits for it at its target, and no copy makes a guest wait for longer than it
//! would at a write; then the copy fails. Where there was no guest nobody waits, and the copy keeps the image to its end.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::{Copy, Shared};
use crate::backend::Backend;

/// How soon an image is given free after the copy.
const LOOK: Duration = Duration::from_millis(20);

/// Who has the image.
#[derive(Default)]
pub(super) struct ImageLease {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Its last user has a guest.
    guest: bool,
    /// Its users have gone, and a copy keeps it. The number of this time, so that a thread knows its own.
    kept: Option<u64>,
    times: u64,
}

impl ImageLease {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    /// [`Backend::activate`].
    pub(super) fn activate(&self, image: &dyn Backend) -> io::Result<()> {
        let mut state = self.lock();
        if !self.back(&mut state) {
            image.activate()?;
        }
        state.guest = true;
        Ok(())
    }

    /// [`Backend::activate_for_hold`].
    pub(super) fn activate_for_hold(&self, image: &dyn Backend) -> io::Result<bool> {
        let mut state = self.lock();
        if self.back(&mut state) {
            return Ok(true);
        }
        state.guest = false;
        image.activate_for_hold()
    }

    /// Whether a copy had kept it.
    fn back(&self, state: &mut State) -> bool {
        let kept = state.kept.take().is_some();
        self.changed.notify_all();
        kept
    }

    /// [`Backend::deactivate`]: at once, or when the copy of `shared` lets go.
    pub(super) fn deactivate(self: &Arc<Self>, image: &Arc<dyn Backend>, shared: &Shared) {
        let mut state = self.lock();
        let copy = shared.running(shared.delaying.load(Ordering::SeqCst)).filter(|_| image.gives_way());
        let Some(copy) = copy else { return image.deactivate() };
        state.times += 1;
        let time = state.times;
        state.kept = Some(time);
        let timeout = state.guest.then_some(shared.tuning.timeout);
        let (keep, theirs, its) = (Arc::clone(self), Arc::downgrade(image), Arc::clone(&copy));
        let work = move || keep.wait(&theirs, &its, time, timeout);
        if let Err(error) = thread::Builder::new().name("copy-keep".into()).spawn(work) {
            state.kept = None;
            copy.fail(format!("no thread to keep the image for it ({error}); raise the daemon's limits"));
            image.deactivate();
        }
    }

    fn wait(&self, image: &Weak<dyn Backend>, copy: &Copy, time: u64, timeout: Option<Duration>) {
        let start = Instant::now();
        let mut state = self.lock();
        while state.kept == Some(time) && copy.needs_image() {
            if timeout.is_some_and(|timeout| start.elapsed() > timeout) {
                copy.fail(
                    "the guest has left, and may go on elsewhere, where its writes would not be seen. Take the copy again \
                     where it is"
                        .into(),
                );
                break;
            }
            state = self.changed.wait_timeout(state, LOOK).expect("no panic while held").0;
        }
        if state.kept == Some(time) {
            state.kept = None;
            // One that was closed meanwhile is nobody's.
            if let Some(image) = image.upgrade() {
                image.deactivate();
            }
        }
    }
}
