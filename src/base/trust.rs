//! Refuses files that decide what this process does and that other users can change, as sshd and sudo do: hooks, the
//! configuration file, passphrases.
//!
//! The file and every directory on the way to it must belong to root or to the user that we run as. Neither its group,
//! unless that is root's, nor every user may write it. A directory with the sticky bit is exempt, because no user can
//! replace another user's files there. Symbolic links are followed one by one, so that each directory is checked.
//!
//! In a user namespace that does not map root, root's files show as 65534 and are refused, as sshd and sudo refuse
//! them. Every user that is not mapped shows so, also one that may change the file.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{File, Metadata, symlink_metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

/// The most symbolic links that are followed. The kernel follows as many.
const MAX_LINKS: u32 = 40;
/// The user id that stands for every user whom our user namespace does not map (/proc/sys/kernel/overflowuid, by default).
/// Where all users are mapped it is that of `nobody`.
const OVERFLOW_UID: u32 = 65534;
/// The paths of inherited descriptors. The process that passed such a descriptor decides what is in it.
const DESCRIPTORS: [&str; 3] = ["/dev/stdin", "/dev/fd/", "/proc/self/fd/"];

/// Checks that only root and our user can change what is at `path`. The error says what others may change and how to fix
/// it.
pub(crate) fn check(path: &Path) -> Result<(), String> {
    walk(path).map(|_| ())
}

/// Checks `file`, which was opened as `path`, as [`check`] does, and that it is still the file at `path`.
pub(crate) fn check_open(path: &Path, file: &File) -> Result<(), String> {
    let shown = path.display();
    let opened = file.metadata().map_err(|error| cannot(path, &error))?;
    if DESCRIPTORS.iter().any(|prefix| path.as_os_str().as_encoded_bytes().starts_with(prefix.as_bytes())) {
        return check_permissions(path, &opened);
    }
    let found = walk(path)?;
    if (found.dev(), found.ino()) != (opened.dev(), opened.ino()) {
        return Err(format!("'{shown}' was replaced while it was opened: try it again"));
    }
    Ok(())
}

/// Walks to `path` from the root directory, and checks everything on the way.
fn walk(path: &Path) -> Result<Metadata, String> {
    let absolute = std::path::absolute(path).map_err(|error| cannot(path, &error))?;
    let mut rest = names(&absolute);
    let mut at = PathBuf::from("/");
    let mut metadata = symlink_metadata(&at).map_err(|error| cannot(&at, &error))?;
    let mut links = 0;
    loop {
        check_permissions(&at, &metadata)?;
        let Some(name) = rest.pop_front() else { return Ok(metadata) };
        if name == ".." {
            at.pop();
            metadata = symlink_metadata(&at).map_err(|error| cannot(&at, &error))?;
            continue;
        }
        let next = at.join(name);
        metadata = symlink_metadata(&next).map_err(|error| cannot(&next, &error))?;
        if !metadata.file_type().is_symlink() {
            at = next;
            continue;
        }
        // The mode of a link has no meaning; its owner matters.
        check_owner(&next, &metadata)?;
        links += 1;
        if links > MAX_LINKS {
            return Err(format!("'{}' has too many symbolic links on the way", path.display()));
        }
        let target = next.read_link().map_err(|error| cannot(&next, &error))?;
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        for name in names(&target).into_iter().rev() {
            rest.push_front(name);
        }
        metadata = symlink_metadata(&at).map_err(|error| cannot(&at, &error))?;
    }
}

/// The components of a path, `..` included.
fn names(path: &Path) -> VecDeque<OsString> {
    let is_name = |part: &Component<'_>| matches!(part, Component::Normal(_) | Component::ParentDir);
    path.components().filter(is_name).map(|part| part.as_os_str().to_owned()).collect()
}

/// Checks the owner and the mode of one file or directory on the way.
fn check_permissions(path: &Path, metadata: &Metadata) -> Result<(), String> {
    check_owner(path, metadata)?;
    let mode = metadata.mode();
    let kind = metadata.file_type();
    // A character device does not store what is written to it.
    let is_exempt = (kind.is_dir() && mode & libc::S_ISVTX != 0) || kind.is_char_device();
    let by_group = mode & libc::S_IWGRP != 0 && metadata.gid() != 0;
    let who = match (by_group, mode & libc::S_IWOTH != 0) {
        (_, true) => "everybody",
        (true, false) => "its group",
        (false, false) => return Ok(()),
    };
    if is_exempt {
        return Ok(());
    }
    let shown = path.display();
    Err(format!("'{shown}' may be written by {who}, who could change what is done here: chmod go-w '{shown}'"))
}

fn check_owner(path: &Path, metadata: &Metadata) -> Result<(), String> {
    let (owner, user) = (metadata.uid(), rustix::process::geteuid().as_raw());
    if owner == 0 || owner == user {
        return Ok(());
    }
    let shown = path.display();
    let users = if user == 0 { "root (0)".to_owned() } else { format!("root (0) or {user}") };
    let unmapped = match owner {
        OVERFLOW_UID => ", as do files of all users that a user namespace does not map: map the owner, or use a copy",
        _ => "",
    };
    Err(format!(
        "'{shown}' belongs to user {owner}, who could change what is done here: it must belong to {users}{unmapped}"
    ))
}

fn cannot(path: &Path, error: &io::Error) -> String {
    format!("'{}' cannot be checked: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_path_that_others_may_change_anywhere_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        set_mode(&inner, 0o755);
        let file = inner.join("file");
        fs::write(&file, "").unwrap();
        set_mode(&file, 0o644);
        let link = dir.path().join("link");
        symlink("inner/../inner/file", &link).unwrap();
        assert_eq!((check(&file), check(&link)), (Ok(()), Ok(())));
        for (path, mode, word) in [(&file, 0o666, "everybody"), (&inner, 0o777, "everybody")] {
            let before = path.metadata().unwrap().mode();
            set_mode(path, mode);
            for name in [&file, &link] {
                let error = check(name).unwrap_err();
                assert!(error.contains(word) && error.contains(&format!("chmod go-w '{}'", path.display())), "{error}");
            }
            set_mode(path, before);
        }
        // No user can replace another user's files in a sticky directory.
        set_mode(&inner, 0o1777);
        assert_eq!(check(&file), Ok(()));
        assert!(check(&dir.path().join("nothing")).unwrap_err().contains("cannot be checked"));
        symlink("loop", dir.path().join("loop")).unwrap();
        assert!(check(&dir.path().join("loop")).unwrap_err().contains("too many"));
    }

    #[test]
    fn a_path_that_belongs_to_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "").unwrap();
        symlink("file", &link).unwrap();
        if std::os::unix::fs::lchown(&link, Some(65534), None).is_err() {
            eprintln!("SKIPPED: not root, who alone can give files away");
            return;
        }
        assert!(check(&file).is_ok());
        let error = check(&link).unwrap_err();
        assert!(error.contains("user 65534") && error.contains("does not map"), "{error}");
        std::os::unix::fs::chown(&file, None, Some(65534)).unwrap();
        set_mode(&file, 0o660);
        assert!(check(&file).unwrap_err().contains("its group"));
        std::os::unix::fs::chown(&file, Some(65534), Some(0)).unwrap();
        assert!(check(&file).unwrap_err().contains("belongs to user 65534"));
        std::os::unix::fs::chown(&file, Some(0), None).unwrap();
        std::os::unix::fs::chown(dir.path(), Some(65534), None).unwrap();
        assert!(check(&file).unwrap_err().contains("belongs to user 65534"));
        std::os::unix::fs::chown(dir.path(), Some(0), None).unwrap();
    }

    #[test]
    fn a_file_that_was_replaced_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "").unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(check_open(&path, &file), Ok(()));
        fs::rename(&path, dir.path().join("other")).unwrap();
        fs::write(&path, "").unwrap();
        assert!(check_open(&path, &file).unwrap_err().contains("replaced"));
        // A pipe that a shell passes as a descriptor.
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        let name = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&pipe));
        assert_eq!(check_open(Path::new(&name), &File::open(&name).unwrap()), Ok(()));
    }
}
