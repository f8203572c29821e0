//! The pid file. The process that holds its lock is the running daemon, whatever the file's text is.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;

use super::unix_listener;

/// The file's mode. A user who may open it for reading may lock it, and keep the next daemon from starting.
const OWNER_ONLY: Mode = Mode::RUSR.union(Mode::WUSR);

/// A written and locked pid file. It is removed when this is dropped, unless its path names another file by then.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    file: File,
    /// Another process has taken the file over, so it is not removed here.
    handed_over: bool,
}

/// Why there is no pid file.
#[derive(Debug)]
pub enum PidFileError {
    /// A running process holds the lock; the text is the process id in the file.
    Held(PathBuf, String),
    /// Another user could write the process id that a service manager reads; the text says why.
    NotOurs(PathBuf, String),
    /// The file cannot be created or written.
    Io(PathBuf, io::Error),
}

impl fmt::Display for PidFileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PidFileError::Held(path, owner) => write!(
                f,
                "the pid file '{}' is held by a process that runs (pid {owner}): stop it, or name another --pid-file",
                path.display()
            ),
            PidFileError::NotOurs(path, why) => write!(
                f,
                "the pid file '{}' {why}, so another user could name a process in it for a service manager to signal: \
                 remove it, or name another --pid-file",
                path.display()
            ),
            PidFileError::Io(path, error) => {
                write!(
                    f,
                    "cannot write the pid file '{}': {error}; check that its directory exists and that this user may write \
                     there",
                    path.display()
                )
            }
        }
    }
}

impl std::error::Error for PidFileError {}

impl PidFile {
    /// Creates the file, or takes over that of a dead process, locks it and writes our process id. This process has the
    /// lock until it ends. Called by main.
    pub fn create(path: &Path) -> Result<Self, PidFileError> {
        let io_error = |error: io::Error| PidFileError::Io(path.to_path_buf(), error);
        let file = loop {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
            let fd = rustix::fs::open(path, flags, OWNER_ONLY).map_err(|errno| io_error(errno.into()))?;
            let mut file = File::from(fd);
            let data = file.metadata().map_err(io_error)?;
            if !data.is_file() {
                return Err(io_error(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "it is there and not a regular file",
                )));
            }
            if let Some(why) = reachable_by_others(&data, rustix::process::geteuid().as_raw()) {
                return Err(PidFileError::NotOurs(path.to_path_buf(), why));
            }
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(PidFileError::Held(path.to_path_buf(), owner(&mut file))),
                Err(errno) => return Err(io_error(errno.into())),
            }
            rustix::fs::fchmod(&file, OWNER_ONLY).map_err(|errno| io_error(errno.into()))?;
            // The owner may have removed the file between our open and our lock: then the lock is on a file without a
            // name.
            if names(path, &file).map_err(io_error)? {
                break file;
            }
        };
        let pid_file = PidFile { path: path.to_path_buf(), file, handed_over: false };
        pid_file.write().map_err(io_error)?;
        Ok(pid_file)
    }

    /// Takes over a file that another process has created and locked. The lock is ours too, because it belongs to the
    /// open file. A failure to write is only logged, because the disk is ours already. Called by main after a
    /// hand-over.
    pub(crate) fn take_over(path: &Path, file: File) -> Self {
        let pid_file = PidFile { path: path.to_path_buf(), file, handed_over: false };
        if let Err(error) = pid_file.write() {
            log::warn!("{}", PidFileError::Io(path.to_path_buf(), error));
        }
        pid_file
    }

    /// The path and the locked file, for a process that takes over.
    pub(crate) fn parts(&self) -> (&Path, &File) {
        (&self.path, &self.file)
    }

    /// Leaves the file and its lock to a process that has taken over.
    pub(crate) fn hand_over(mut self) {
        self.handed_over = true;
    }

    fn write(&self) -> io::Result<()> {
        self.file.set_len(0)?;
        (&self.file).rewind()?;
        writeln!(&self.file, "{}", std::process::id())
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if self.handed_over {
            return;
        }
        // The file is still locked, so no process can take it over between the check and the removal.
        match names(&self.path, &self.file) {
            Ok(true) => {
                if let Err(error) = std::fs::remove_file(&self.path) {
                    // The file must not name a process that gets our process id later.
                    let emptied = self.file.set_len(0).map_or("", |()| "; it is empty now");
                    let level = unix_listener::level_of(&error);
                    log::log!(level, "the pid file '{}' cannot be removed: {error}{emptied}", self.path.display());
                }
            }
            Ok(false) => log::warn!("the pid file '{}' is no longer ours: left alone", self.path.display()),
            Err(error) => {
                let emptied = self.file.set_len(0).map_or("", |()| "; it is empty now");
                let level = unix_listener::level_of(&error);
                log::log!(level, "cannot check the pid file '{}': {error}{emptied}", self.path.display());
            }
        }
    }
}

/// Why the file is refused, if it is: users other than `user` could write it, or it has several names. An ACL shows in
/// the bits of the group (acl(5)).
fn reachable_by_others(data: &Metadata, user: u32) -> Option<String> {
    match data {
        data if data.uid() != user => Some(format!("belongs to another user (uid {})", data.uid())),
        data if data.mode() & 0o022 != 0 => {
            Some(format!("may be written by others (mode {:04o})", data.mode() & 0o7777))
        }
        // No name: it was removed meanwhile, and the caller makes another one.
        data if data.nlink() > 1 => Some(format!("has {} names", data.nlink())),
        _ => None,
    }
}

/// Whether `path` names this open file.
fn names(path: &Path, file: &File) -> io::Result<bool> {
    let ours = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The process id in a locked file, for the message. The owner may not have written it yet.
fn owner(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.take(20).read_to_string(&mut text);
    match text.trim() {
        pid if read.is_ok() && !pid.is_empty() && pid.bytes().all(|byte| byte.is_ascii_digit()) => pid.to_string(),
        _ => "unknown".to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_written_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pid");
        let held = PidFile::create(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600, "others could lock it");
        drop(held);
        assert!(!path.exists());
    }

    #[test]
    fn a_running_owner_is_named_and_keeps_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pid");
        let _held = PidFile::create(&path).unwrap();
        let message = PidFile::create(&path).unwrap_err().to_string();
        assert!(message.contains(&format!("pid {}", std::process::id())), "{message}");
        assert!(message.contains(path.to_str().unwrap()), "{message}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
    }

    #[test]
    fn a_dead_owners_file_is_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pid");
        std::fs::write(&path, "4194304999999\nand more").unwrap();
        let _held = PidFile::create(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
    }

    #[test]
    fn a_file_that_other_users_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pid");
        let refused = |words: &str| {
            let error = PidFile::create(&path).unwrap_err();
            assert!(matches!(error, PidFileError::NotOurs(..)) && error.to_string().contains(words), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n", "written");
        };
        std::fs::write(&path, "1\n").unwrap();
        for mode in [0o666, 0o664, 0o622] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            refused(&format!("mode {mode:04o}"));
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let other = directory.path().join("other");
        std::fs::hard_link(&path, &other).unwrap();
        refused("2 names");
        std::fs::remove_file(&other).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
            refused("uid 65534");
            std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        } else {
            println!("SKIPPED: only root can give a file away");
        }
        PidFile::create(&path).unwrap();
    }

    #[test]
    fn another_file_under_the_name_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pid");
        let held = PidFile::create(&path).unwrap();
        std::fs::rename(&path, directory.path().join("away")).unwrap();
        std::fs::write(&path, "1\n").unwrap();
        drop(held);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n");
    }

    #[test]
    fn neither_a_link_nor_a_directory_is_written_to() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("target");
        std::fs::write(&target, "precious").unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        for path in [&link, directory.path(), &directory.path().join("none/pid")] {
            let message = PidFile::create(path).unwrap_err().to_string();
            assert!(message.contains(path.to_str().unwrap()), "{message}");
        }
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "precious");
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert!(PidFile::create(&fifo).unwrap_err().to_string().contains("not a regular file"));
    }
}
