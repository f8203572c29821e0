//! The daemon's files other than the image: two sockets and a pid file. They are created at the start and removed at the
//! end, or taken over from the old daemon and handed over to the new one.

use std::fs::File;
use std::os::unix::net::UnixListener;

use super::ServerError;
use super::hand_over::{FilesTakenOver, InheritedFiles};
use super::socket::{self, FrontSocket, PreparedSocket};
use super::take_over::{TakeOver, TakenFiles};
use crate::base::pid_file::PidFile;
use crate::base::unix_listener::SocketFile;
use crate::config::{Config, Listen};

/// The daemon's files. Dropping this removes them, except those that still belong to another daemon.
pub(super) struct DaemonFiles {
    pub(super) front: FrontSocket,
    control: Option<(UnixListener, Option<SocketFile>)>,
    pid_file: Option<PidFile>,
    /// The pid file of the old daemon, during a take-over.
    taken_pid_file: Option<File>,
    /// The old daemon still serves, perhaps on these sockets.
    old_daemon_serves: bool,
}

impl DaemonFiles {
    /// Creates the files that are not taken over. The vhost-user socket is bound after the image was opened and the
    /// control socket was bound, because a listener that does not reply freezes QEMU. `prepared` is `None` during a
    /// take-over.
    pub(super) fn create(
        config: &Config,
        prepared: Option<PreparedSocket>,
        take_over: Option<&mut TakeOver>,
    ) -> Result<DaemonFiles, ServerError> {
        let old_daemon_serves = take_over.is_some();
        let taken = match take_over {
            Some(take_over) => take_over.files(config).map_err(ServerError::TakeOver)?,
            None => TakenFiles::default(),
        };
        let control = match (&config.control, taken.control) {
            (Some(_), Some(listener)) => Some((listener, None)),
            (Some(control), None) => {
                let (listener, file) = socket::bind(&control.path, control.mode).map_err(ServerError::Control)?;
                Some((listener, Some(file)))
            }
            (None, _) => None,
        };
        let bind = || match prepared {
            Some(prepared) => prepared.bind(),
            None => socket::prepare(&config.listen)?.bind(),
        };
        let front = taken.front.map_or_else(bind, FrontSocket::taken_over).map_err(ServerError::Socket)?;
        let pid_file = config.pid_file.as_deref().filter(|_| taken.pid_file.is_none());
        let pid_file = pid_file.map(PidFile::create).transpose().map_err(ServerError::PidFile)?;
        Ok(DaemonFiles { front, control, pid_file, taken_pid_file: taken.pid_file, old_daemon_serves })
    }

    /// Files that consist of a vhost-user socket only.
    #[cfg(test)]
    pub(super) fn of(front: FrontSocket) -> DaemonFiles {
        DaemonFiles { front, control: None, pid_file: None, taken_pid_file: None, old_daemon_serves: false }
    }

    /// Duplicates the control socket. Returns `None` while the old daemon serves on it. Fails when no descriptor is left.
    pub(super) fn control_listener(&self) -> Result<Option<UnixListener>, ServerError> {
        let ours = self.control.as_ref().filter(|_| !self.old_daemon_serves);
        let listener = ours.map(|(listener, _)| listener.try_clone());
        listener.transpose().map_err(|error| ServerError::System("cannot duplicate the control socket", error))
    }

    /// Makes this process remove the files at its end, after the old daemon has handed them over.
    pub(super) fn take_ownership(self, config: &Config) -> DaemonFiles {
        let front = match &config.listen {
            Listen::Path { path, .. } => self.front.take_ownership(path),
            Listen::Fd(_) => self.front,
        };
        let control = match (self.control, &config.control) {
            (Some((listener, None)), Some(control)) => Some((listener, socket::guard(&control.path))),
            (control, _) => control,
        };
        let pid_file = match (self.taken_pid_file, &config.pid_file) {
            (Some(file), Some(path)) => Some(PidFile::take_over(path, file)),
            _ => self.pid_file,
        };
        DaemonFiles { front, control, pid_file, taken_pid_file: None, old_daemon_serves: false }
    }

    /// The files that the new daemon may take over.
    pub(super) fn to_inherit(&self) -> InheritedFiles<'_> {
        let control = self.control.as_ref();
        InheritedFiles {
            front: (self.front.path(), &self.front),
            control: control.and_then(|(listener, file)| Some((file.as_ref()?.path(), listener as _))),
            pid_file: self.pid_file.as_ref().map(|file| file.parts()).map(|(path, file)| (path, file as _)),
        }
    }

    /// Leaves the files that the new daemon took over in place, and removes the others.
    pub(super) fn hand_over(self, taken_over: FilesTakenOver) {
        if taken_over.front {
            self.front.hand_over();
        }
        if let Some((_, Some(file))) = self.control
            && taken_over.control
        {
            file.keep();
        }
        if let Some(file) = self.pid_file
            && taken_over.pid_file
        {
            file.hand_over();
        }
    }

    /// Closes and removes the vhost-user socket, so that a front-end that connects is refused at once. Dropping the
    /// returned value removes the other files.
    pub(super) fn stop_listening(self) -> impl Sized {
        (self.control, self.pid_file)
    }
}
