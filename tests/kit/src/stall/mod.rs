//! Media that stop answering when a test tells them to.

pub mod directory;
pub mod frozen;
pub mod fuse;
pub mod withheld;

use std::time::SystemTime;

use fuser::{BackgroundSession, Config, FileAttr, FileType, Filesystem, INodeNo, MountOption};

/// Mounts a filesystem on a new directory. Errors: why there can be none here.
fn mount(tree: impl Filesystem, name: &str) -> Result<(BackgroundSession, tempfile::TempDir), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("only root may mount a filesystem".into());
    }
    let dir = tempfile::tempdir().expect("a directory to mount on");
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName(name.into())];
    match fuser::spawn_mount(tree, dir.path(), &config) {
        Ok(session) => Ok((session, dir)),
        Err(error)
            if [libc::ENOENT, libc::ENODEV, libc::EPERM, libc::ENXIO].map(Some).contains(&error.raw_os_error()) =>
        {
            Err(format!("this machine mounts no FUSE filesystem ({error})"))
        }
        Err(error) => panic!("mounting a FUSE filesystem: {error}"),
    }
}

/// What stat(2) says of a file of root's with this size; of a directory without one.
fn attributes(inode: INodeNo, file: Option<u64>) -> FileAttr {
    let size = file.unwrap_or(0);
    let (kind, perm) = if file.is_some() { (FileType::RegularFile, 0o600) } else { (FileType::Directory, 0o700) };
    let time = SystemTime::UNIX_EPOCH;
    FileAttr {
        ino: inode,
        size,
        blocks: size / 512,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind,
        perm,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}
