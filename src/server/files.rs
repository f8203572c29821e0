//! What the daemon has in the file system beside the image: two sockets and a pid file. Made at the start, removed at the
//! end; or taken over from the daemon before us, and given to the next.

use std::fs::File;
use std::os::unix::net::UnixListener;

use super::ServerError;
use super::hand_over::{FilesTakenOver, InheritedFiles};
use super::socket::{self, FrontSocket, Prepared};
use super::take_over::{TakeOver, Taken};
use crate::base::pid_file::PidFile;
use crate::base::unix_listener::SocketFile;
use crate::config::{Config, Listen};

/// Dropped, they are removed; but for those that are still another daemon's.
pub(super) struct Files {
    pub(super) front: FrontSocket,
    control: Option<(UnixListener, Option<SocketFile>)>,
    pid_file: Option<PidFile>,
    /// The pid file of the daemon that we take over from.
    taken_pid_file: Option<File>,
    /// Another daemon serves still, perhaps on these sockets.
    waiting: bool,
}

impl Files {
    /// Makes them, or all that are not taken over. The vhost-user socket comes after whatever may fail, since a listener
    /// that does not answer freezes QEMU. `prepared`: nothing is taken over.
    pub(super) fn make(
        config: &Config,
        prepared: Option<Prepared>,
        taking: Option<&mut TakeOver>,
    ) -> Result<Files, ServerError> {
        let waiting = taking.is_some();
        let taken = match taking {
            Some(taking) => taking.files(config).map_err(ServerError::TakeOver)?,
            None => Taken::default(),
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
        Ok(Files { front, control, pid_file, taken_pid_file: taken.pid_file, waiting })
    }

    /// Only a vhost-user socket.
    #[cfg(test)]
    pub(super) fn of(front: FrontSocket) -> Files {
        Files { front, control: None, pid_file: None, taken_pid_file: None, waiting: false }
    }

    /// A duplicate of the control socket; none while another daemon serves on it. Errors: no descriptor left.
    pub(super) fn control_listener(&self) -> Result<Option<UnixListener>, ServerError> {
        let listener = self.control.as_ref().filter(|_| !self.waiting).map(|(listener, _)| listener.try_clone());
        listener.transpose().map_err(|error| ServerError::System("cannot duplicate the control socket", error))
    }

    /// The daemon before us has handed them over: they are ours to remove.
    pub(super) fn own(self, config: &Config) -> Files {
        let front = match &config.listen {
            Listen::Path { path, .. } => self.front.own(path),
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
        Files { front, control, pid_file, taken_pid_file: None, waiting: false }
    }

    /// What the next daemon may go on with.
    pub(super) fn estate(&self) -> InheritedFiles<'_> {
        let control = self.control.as_ref();
        InheritedFiles {
            front: (self.front.path(), &self.front),
            control: control.and_then(|(listener, file)| Some((file.as_ref()?.path(), listener as _))),
            pid_file: self.pid_file.as_ref().map(|file| file.parts()).map(|(path, file)| (path, file as _)),
        }
    }

    /// The next daemon goes on with those; the others are removed.
    pub(super) fn give(self, keeps: FilesTakenOver) {
        if keeps.front {
            self.front.give();
        }
        if let Some((_, Some(file))) = self.control
            && keeps.control
        {
            file.keep();
        }
        if let Some(file) = self.pid_file
            && keeps.pid_file
        {
            file.give();
        }
    }

    /// The vhost-user socket goes: whoever connects learns at once that nobody serves. The others go with the value
    /// returned.
    pub(super) fn stop_listening(self) -> impl Sized {
        (self.control, self.pid_file)
    }
}
