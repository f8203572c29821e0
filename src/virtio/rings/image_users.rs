//! Who of this daemon uses the image: a front-end's rings, an operator's hold. [`Backend::activate`] before the first of
//! them, [`Backend::deactivate`] after the last.
//!
//! A hold needs it, too. A guest that moves to another host while its disk is held here would go on there, and a hold of a
//! disk whose guest is elsewhere would hold nobody: either way a snapshot would be of an image that changes.
//!
//! [`Backend::activate`]: crate::backend::Backend::activate
//! [`Backend::deactivate`]: crate::backend::Backend::deactivate

use std::io;

use crate::backend::Backend;
use crate::base::sync::Mutex;

/// The image's users. Calls may block as long as the back-end does.
#[derive(Default)]
pub(in crate::virtio) struct ImageUsers(Mutex<Users>);

#[derive(Default)]
struct Users {
    active: bool,
    rings: bool,
}

impl ImageUsers {
    /// Rings are about to run. The vhost-user thread.
    pub(in crate::virtio) fn for_rings(&self, backend: &dyn Backend) -> io::Result<()> {
        let mut users = self.0.lock().expect("no panic while held");
        if !users.rings {
            backend.activate()?;
        }
        *users = Users { active: true, rings: true };
        Ok(())
    }

    /// No ring is to run. `held`: whether a hold is on, asked when nobody else can come or go. The vhost-user thread.
    pub(in crate::virtio) fn no_rings(&self, backend: &dyn Backend, held: impl FnOnce() -> bool) {
        let mut users = self.0.lock().expect("no panic while held");
        users.rings = false;
        users.give_up(backend, held);
    }

    /// A hold is on and no ring runs. A thread of the hold's, which calls [`ImageUsers::no_hold`] if the hold has ended by now.
    pub(in crate::virtio) fn for_hold(&self, backend: &dyn Backend) -> io::Result<()> {
        let mut users = self.0.lock().expect("no panic while held");
        if !users.active {
            users.active = backend.activate_for_hold()?;
        }
        Ok(())
    }

    /// A hold has ended, unless `held`: another one is on. A thread of the hold's.
    pub(in crate::virtio) fn no_hold(&self, backend: &dyn Backend, held: impl FnOnce() -> bool) {
        self.0.lock().expect("no panic while held").give_up(backend, held);
    }
}

impl Users {
    fn give_up(&mut self, backend: &dyn Backend, held: impl FnOnce() -> bool) {
        if self.active && !self.rings && !held() {
            backend.deactivate();
            self.active = false;
        }
    }
}
