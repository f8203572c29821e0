//! Keeps the image activated while a copy reads it, so that no other host changes it. Another host's write does not
//! pass through our virtqueues, so a block that it changed before the block was saved would be wrong in the copy. A
//! running copy therefore keeps the image when its last user here releases it.
//!
//! For how long depends on who used the image. A guest that was reset soon comes back. A guest that was migrated waits
//! for the image on its new host, and a copy makes a guest wait there no longer than it may delay a write; after that
//! the copy fails. If no guest used the image, none waits for it, and the copy keeps it to the copy's end.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::{Copy, Shared};
use crate::backend::Backend;

/// How often a lease checks whether its copy still needs the image.
const COPY_CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// Whether a copy keeps the image that its users have released.
#[derive(Default)]
pub(super) struct ImageLease {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The image's last user is, or was, a guest.
    guest: bool,
    /// The lease's number while a copy keeps the image that its users have released. The number lets the lease's thread
    /// recognize its own lease.
    lease: Option<u64>,
    last_lease: u64,
}

impl ImageLease {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    /// [`crate::backend::ImageClaim::activate`], unless a copy has kept the image activated.
    pub(super) fn activate(&self, image: &dyn Backend) -> io::Result<()> {
        let mut state = self.lock();
        if !self.end_lease(&mut state) {
            image.claim().activate()?;
        }
        state.guest = true;
        Ok(())
    }

    /// [`crate::backend::ImageClaim::activate_for_hold`], unless a copy has kept the image activated.
    pub(super) fn activate_for_hold(&self, image: &dyn Backend) -> io::Result<bool> {
        let mut state = self.lock();
        if self.end_lease(&mut state) {
            return Ok(true);
        }
        state.guest = false;
        image.claim().activate_for_hold()
    }

    /// The image has a user again: ends the lease. Returns whether there was one.
    fn end_lease(&self, state: &mut State) -> bool {
        let was_leased = state.lease.take().is_some();
        self.changed.notify_all();
        was_leased
    }

    /// [`crate::backend::ImageClaim::deactivate`]: at once, or when the running copy of `shared` no longer needs the
    /// image.
    pub(super) fn deactivate(self: &Arc<Self>, image: &Arc<dyn Backend>, shared: &Shared) {
        let mut state = self.lock();
        let copy = shared.running(shared.delaying.load(Ordering::SeqCst)).filter(|_| image.claim().gives_way());
        let Some(copy) = copy else { return image.claim().deactivate() };
        state.last_lease += 1;
        let number = state.last_lease;
        state.lease = Some(number);
        let timeout = state.guest.then_some(shared.tuning.timeout);
        let (lease, weak_image, leasing_copy) = (Arc::clone(self), Arc::downgrade(image), Arc::clone(&copy));
        let work = move || lease.wait(&weak_image, &leasing_copy, number, timeout);
        if let Err(error) = thread::Builder::new().name("copy-lease".into()).spawn(work) {
            state.lease = None;
            copy.fail(format!("no thread to keep the image for it ({error}); raise the daemon's limits"));
            image.claim().deactivate();
        }
    }

    /// Waits until the image has a user again, the copy no longer needs it, or `timeout` has passed; deactivates the
    /// image in the last two cases.
    fn wait(&self, image: &Weak<dyn Backend>, copy: &Copy, number: u64, timeout: Option<Duration>) {
        let start = Instant::now();
        let mut state = self.lock();
        while state.lease == Some(number) && copy.needs_image() {
            if timeout.is_some_and(|timeout| start.elapsed() > timeout) {
                copy.fail(
                    "the guest has left and may run on another host, where this daemon cannot see its writes; take the \
                     copy again there"
                        .into(),
                );
                break;
            }
            state = self.changed.wait_timeout(state, COPY_CHECK_INTERVAL).expect("no panic while held").0;
        }
        if state.lease == Some(number) {
            state.lease = None;
            // An image that was closed meanwhile needs no deactivation.
            if let Some(image) = image.upgrade() {
                image.claim().deactivate();
            }
        }
    }
}
