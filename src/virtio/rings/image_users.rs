//! What in this daemon uses the image: a front-end's rings, an operator's hold. [`ImageClaim::activate`] comes before the first
//! of them, [`ImageClaim::deactivate`] after the last.
//!
//! A hold needs the image too. A guest that moves to another host while its disk is held here would otherwise continue
//! there, and a hold of a disk whose guest is elsewhere would not stop that guest. Either way a snapshot would be of an image
//! that changes.
//!
//! [`ImageClaim::activate`]: crate::backend::ImageClaim::activate
//! [`ImageClaim::deactivate`]: crate::backend::ImageClaim::deactivate

use std::io;

use crate::backend::Backend;
use crate::base::sync::Mutex;

/// The users of the image. Calls may block as long as the back-end does.
#[derive(Default)]
pub(in crate::virtio) struct ImageUsers(Mutex<Users>);

#[derive(Default)]
struct Users {
    /// The image is claimed.
    active: bool,
    /// Rings have claimed the image.
    rings: bool,
}

impl ImageUsers {
    /// Claims the image for rings that are about to run. Called by the vhost-user thread.
    pub(in crate::virtio) fn claim_for_rings(&self, backend: &dyn Backend) -> io::Result<()> {
        let mut users = self.0.lock().expect("no panic while held");
        if !users.rings {
            backend.claim().activate()?;
        }
        *users = Users { active: true, rings: true };
        Ok(())
    }

    /// Ends the rings' claim. `held` says whether a hold is on; it is called while no claim can change. Called by the
    /// vhost-user thread.
    pub(in crate::virtio) fn release_rings(&self, backend: &dyn Backend, held: impl FnOnce() -> bool) {
        let mut users = self.0.lock().expect("no panic while held");
        users.rings = false;
        users.release_if_unused(backend, held);
    }

    /// Claims the image for a hold while no ring runs. Called by a thread of the hold, which calls
    /// [`ImageUsers::release_hold`] if the hold has ended by then.
    pub(in crate::virtio) fn claim_for_hold(&self, backend: &dyn Backend) -> io::Result<()> {
        let mut users = self.0.lock().expect("no panic while held");
        if !users.active {
            users.active = backend.claim().activate_for_hold()?;
        }
        Ok(())
    }

    /// Ends the claim of a hold, unless `held` says that another hold is on. Called by a thread of the hold.
    pub(in crate::virtio) fn release_hold(&self, backend: &dyn Backend, held: impl FnOnce() -> bool) {
        self.0.lock().expect("no panic while held").release_if_unused(backend, held);
    }
}

impl Users {
    fn release_if_unused(&mut self, backend: &dyn Backend, held: impl FnOnce() -> bool) {
        if self.active && !self.rings && !held() {
            backend.claim().deactivate();
            self.active = false;
        }
    }
}
