//! Whether the image is ours to use: [`Backend::activate`] before the first ring runs, [`Backend::deactivate`] after the
//! last one has stopped for good, or after the operator's hold that outlasts it ([`crate::virtio::rings::image_users`]). Pauses (a change of
//! the memory table, a ring set up anew) keep it.
//!
//! An image that cannot be had (another host holds its lock) keeps the rings from running, and the guest waits. Status
//! and an event say so, and the vhost-user thread tries again every [`RETRY_INTERVAL`] until it succeeds or the front-end stops
//! the rings: whatever front-end it is, the guest goes on by itself once the image is free. To run the ring and fail
//! its requests instead would cost the guest its filesystem for what passes by itself, such as a migration's hand-over.
//!
//! [`Backend::activate`]: crate::backend::Backend::activate
//! [`Backend::deactivate`]: crate::backend::Backend::deactivate

use std::cell::{Cell, RefCell};
use std::time::Duration;

use crate::base::rate_limit::{FRONT_END_LOG, log_limited};
use crate::virtio::rings::Rings;

/// How long until a refused image is tried again.
pub(in crate::virtio) const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// One connection's claim to the image. Owned by the handler; the vhost-user thread.
#[derive(Default)]
pub(in crate::virtio) struct Activation {
    active: Cell<bool>,
    /// Why it was refused last; told once for each cause.
    refused: RefCell<Option<String>>,
}

impl Activation {
    /// Claims the image for a ring that is about to run, if that was not done. `false`: it is refused, and the ring must
    /// not run. Blocks as long as the back-end does.
    pub(in crate::virtio) fn claim(&self, rings: &Rings) -> bool {
        if self.active.get() {
            return true;
        }
        match rings.claim_for_rings() {
            Ok(()) => {
                self.active.set(true);
                // It may have grown while nobody used it.
                rings.resized(rings.backend().geometry().size);
                if self.refused.take().is_some() {
                    log_limited!(FRONT_END_LOG, Info, "{} is ours now: the guest goes on", rings.backend().describe());
                    rings.image_refused(None);
                }
            }
            Err(error) => {
                let why = error.to_string();
                if self.refused.replace(Some(why.clone())).as_ref() != Some(&why) {
                    log_limited!(
                        FRONT_END_LOG,
                        Error,
                        "the guest waits for its image, which is tried again every second: {why}"
                    );
                    rings.image_refused(Some(why));
                }
            }
        }
        self.active.get()
    }

    /// The last ring has stopped and what it acknowledged is synced: others may have the image.
    pub(in crate::virtio) fn release(&self, rings: &Rings) {
        if self.active.take() {
            rings.no_rings_run();
        }
        if self.refused.take().is_some() {
            rings.image_refused(None);
        }
    }

    /// Rings wait for the image.
    pub(in crate::virtio) fn is_refused(&self) -> bool {
        self.refused.borrow().is_some()
    }
}
