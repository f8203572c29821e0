//! Claims the image for a session: [`ImageClaim::activate`] before the first ring runs, and [`ImageClaim::deactivate`] after the
//! last one has stopped for good, or after the operator's hold that outlasts it ([`crate::virtio::rings::image_users`]).
//! The claim outlives pauses (a change of the memory table, a ring set up anew).
//!
//! When the image is refused (another host holds its lock), the rings do not run, and the guest waits. Status and an event
//! say so. The vhost-user thread retries every [`RETRY_INTERVAL`] until it succeeds or the front-end stops the rings. So the
//! guest continues by itself once the image is free, with any front-end. To run the rings and fail their requests would cost
//! the guest its filesystem for something temporary, such as the hand-over of a migration.
//!
//! [`ImageClaim::activate`]: crate::backend::ImageClaim::activate
//! [`ImageClaim::deactivate`]: crate::backend::ImageClaim::deactivate

use std::cell::{Cell, RefCell};
use std::time::Duration;

use crate::base::rate_limit::{FRONT_END_LOG, log_limited};
use crate::virtio::rings::Rings;

/// How long until a refused image is claimed again.
pub(in crate::virtio) const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// One session's claim to the image. The handler owns it.
#[derive(Default)]
pub(in crate::virtio) struct Activation {
    active: Cell<bool>,
    /// Why the image was refused last. Each reason is reported once.
    refused: RefCell<Option<String>>,
}

impl Activation {
    /// Claims the image for a ring that is about to run, unless the session has it. Returns `false` when it is refused: then
    /// the ring must not run. Blocks as long as the back-end does.
    pub(in crate::virtio) fn claim(&self, rings: &Rings) -> bool {
        if self.active.get() {
            return true;
        }
        match rings.claim_for_rings() {
            Ok(()) => {
                self.active.set(true);
                // The image may have grown while this process did not use it.
                rings.resized(rings.backend().geometry().size);
                if self.refused.take().is_some() {
                    log_limited!(
                        FRONT_END_LOG,
                        Info,
                        "{} is claimed now: the guest continues",
                        rings.backend().describe()
                    );
                    rings.image_refused(None);
                }
            }
            Err(error) => {
                let why = error.to_string();
                if self.refused.replace(Some(why.clone())).as_ref() != Some(&why) {
                    log_limited!(
                        FRONT_END_LOG,
                        Error,
                        "the guest waits for its image, which is claimed again every second: {why}"
                    );
                    rings.image_refused(Some(why));
                }
            }
        }
        self.active.get()
    }

    /// Releases the image. The last ring has stopped, and what it acknowledged is synced.
    pub(in crate::virtio) fn release(&self, rings: &Rings) {
        if self.active.take() {
            rings.release_for_rings();
        }
        if self.refused.take().is_some() {
            rings.image_refused(None);
        }
    }

    /// Whether rings wait for the image.
    pub(in crate::virtio) fn is_refused(&self) -> bool {
        self.refused.borrow().is_some()
    }
}
