//! Becomes another user than root, and gives up the capabilities that root does not need.

use std::ffi::CString;
use std::io;

use nix::unistd::{Gid, Uid, User, initgroups, setresgid, setresuid};
use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags, accessat};
use rustix::process::{
    Pid, Signal, getpid, getppid, kill_process, parent_process_death_signal, set_parent_process_death_signal,
};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use super::SandboxError;
use super::permissions::Permissions;

/// The user that `--user` names.
pub(super) struct Account {
    name: String,
    uid: Uid,
    gid: Gid,
}

impl Account {
    /// Looks up a name or a number. Called before anything is opened, because a lookup may connect to a name service.
    pub(super) fn find(name: &str) -> Result<Account, SandboxError> {
        let found = match name.parse() {
            Ok(number) => User::from_uid(Uid::from_raw(number)),
            Err(_) => User::from_name(name),
        };
        let user = match found {
            Ok(Some(user)) => user,
            Ok(None) => return Err(SandboxError::NoUser(name.to_string(), None)),
            Err(errno) => return Err(SandboxError::NoUser(name.to_string(), Some(errno.into()))),
        };
        if !Uid::effective().is_root() && Uid::effective() != user.uid {
            return Err(SandboxError::NotRoot(name.to_string()));
        }
        Ok(Account { name: user.name, uid: user.uid, gid: user.gid })
    }

    /// Makes every thread this user for good, with the groups of which it is a member. Linux drops all capabilities
    /// then.
    pub(super) fn assume(&self, permissions: &Permissions) -> Result<(), SandboxError> {
        if Uid::effective().is_root() && !self.uid.is_root() {
            let failed = |what: &'static str| {
                move |errno: nix::Error| SandboxError::Switch(self.name.clone(), what, errno.into())
            };
            let name = CString::new(self.name.as_str())
                .map_err(|error| SandboxError::Switch(self.name.clone(), "initgroups", error.into()))?;
            let image = image_place(permissions);
            let death_signal = DeathSignal::of_parent();
            initgroups(&name, self.gid).map_err(failed("initgroups"))?;
            setresgid(self.gid, self.gid, self.gid).map_err(failed("setresgid"))?;
            setresuid(self.uid, self.uid, self.uid).map_err(failed("setresuid"))?;
            death_signal.renew();
            self.check_image(permissions, image)?;
        }
        Ok(())
    }

    /// Fails if this user cannot open the image, because each virtqueue opens it for itself later.
    fn check_image(
        &self,
        permissions: &Permissions,
        image: Option<io::Result<std::os::fd::OwnedFd>>,
    ) -> Result<(), SandboxError> {
        let (Some(path), Some(image)) = (&permissions.image, image) else { return Ok(()) };
        let refused = |error| SandboxError::Image(self.name.clone(), path.clone(), error);
        let image = image.map_err(refused)?;
        let access = if permissions.read_only { Access::READ_OK } else { Access::READ_OK | Access::WRITE_OK };
        let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&image));
        accessat(CWD, again, access, AtFlags::EACCESS).map_err(|errno| refused(errno.into()))
    }
}

/// The signal that the kernel sends this process when its parent ends. A change of the user clears it (prctl(2),
/// PR_SET_PDEATHSIG).
struct DeathSignal {
    signal: Option<Signal>,
    parent: Option<Pid>,
}

impl DeathSignal {
    fn of_parent() -> Self {
        DeathSignal { signal: parent_process_death_signal().ok().flatten(), parent: getppid() }
    }

    /// Sets the signal again after the user has changed. If the parent has ended meanwhile, sends it.
    fn renew(&self) {
        if self.signal.is_none() {
            return;
        }
        if let Err(errno) = set_parent_process_death_signal(self.signal) {
            log::warn!("if the process that started this daemon is killed, the daemon serves on: {errno}");
        } else if getppid() != self.parent
            && let Some(signal) = self.signal
        {
            // A process may send itself any signal.
            let _ = kill_process(getpid(), signal);
        }
    }
}

/// Opens the image's path while this process may still reach it. `None`: there is no such path.
fn image_place(permissions: &Permissions) -> Option<io::Result<std::os::fd::OwnedFd>> {
    let path = permissions.image.as_ref()?;
    Some(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(Into::into))
}

/// Warns that this daemon stays root, because an intruder in it would be root on the host, too.
pub(super) fn warn_of_root() {
    if Uid::effective().is_root() {
        log::warn!(
            "this daemon stays root: an intruder in it may do to files and processes what root may, as far as the \
             sandbox lets it; name a user that may open the image (--user, or User= in the systemd unit), or say --user root"
        );
    }
}

/// Drops all capabilities of the calling thread and the threads that it starts later, except those with which root
/// opens images and directories of other users. `switch`: also keep those to become another user, which drops all of
/// them. A library's threads become that user together with the others, and the C library ends the process if one of
/// them cannot.
pub(super) fn keep_few_capabilities(switch: bool) -> Result<(), SandboxError> {
    if !Uid::effective().is_root() {
        return Ok(());
    }
    let all = rustix::thread::capabilities(None).map_err(|errno| SandboxError::Capabilities(errno.into()))?;
    // IPC_LOCK: before Linux 5.12 the rings of io_uring counted as locked memory.
    let wanted = CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH | CapabilitySet::IPC_LOCK;
    let switching = CapabilitySet::SETUID | CapabilitySet::SETGID;
    let kept = all.permitted & if switch { wanted | switching } else { wanted };
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(|errno| SandboxError::Capabilities(errno.into()))
}
