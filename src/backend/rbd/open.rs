//! Opens and checks an image. Every error says what failed, why and how to fix it.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Mutex, mpsc};

use super::super::{DurableWrite, Errno, Geometry, RangeLimits};
use super::handle::{Cluster, Image, RadosPool};
use super::image_health::ImageHealth;
use super::lock::{self, Lock};
use super::options::{self, EffectiveOptions};
use super::state_file::StateFile;
use super::sys::Api;
use super::watch_event::WatchEvent;
use super::{RbdOptions, Shared, luks, network};
use crate::backend::sticky_error::StickyError;
use crate::engine::CachePolicy;

/// The size of the blocks that the cluster writes without reading first.
const PHYSICAL_BLOCK: u32 = 4096;

/// The longest discard or write-zeroes in one op: the 256 objects of 4 MiB in it are enough at a time.
const MAX_RANGE: u64 = 1 << 30;

/// librbd's default of `rbd_discard_granularity_bytes`. librbd does not discard a part of such a block.
const DISCARD_GRANULARITY: u32 = 64 << 10;

/// The largest passphrase file, in bytes. It holds one line, so a larger file is not one.
const MAX_PASSPHRASE: usize = 4096;

/// Why an image cannot be served, and how to fix it.
#[derive(Debug)]
pub struct OpenError(String);

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for OpenError {}

impl OpenError {
    pub(super) fn new(message: String) -> Self {
        OpenError(message)
    }

    pub(super) fn option(name: &str, value: &str, errno: Errno) -> Self {
        let cause = match errno.0 {
            libc::ENOENT => "this Ceph has no option of that name".to_string(),
            libc::EINVAL => "not a value of that option".to_string(),
            _ => super::io_error(errno).to_string(),
        };
        OpenError(format!("--rbd-option {name}={value}: {cause}; `ceph config help {name}` explains it"))
    }

    fn from_errno(what: &str, errno: Errno, fix: &str) -> Self {
        OpenError(format!("{what}: {}; {fix}", super::io_error(errno)))
    }
}

/// Opens the image. Takes as long as the cluster does, and seconds for an encrypted image.
pub(super) fn open(options: &RbdOptions, events: mpsc::Sender<WatchEvent>) -> Result<Shared, OpenError> {
    check_trust(options)?;
    network::check()?;
    let api = Api::load(options.library_path.as_deref()).map_err(|error| OpenError(error.to_string()))?;
    let name = options.name.to_string();
    let passphrase = options.encryption.as_ref().map(|(format, path)| Ok((*format, read_passphrase(path)?)));
    let passphrase = passphrase.transpose()?;
    let pool = connect(api, options)?;
    let read_only = options.read_only || options.name.snapshot.is_some();
    let image = Image::open(pool, &options.name.image, options.name.snapshot.as_deref(), read_only)
        .map_err(|errno| image_error(options, errno))?;
    let effective = EffectiveOptions::read(&image).map_err(|errno| {
        OpenError::from_errno(&name, errno, "its options cannot be read; see the state of the cluster")
    })?;
    options::check(&effective, options.mode, &name, options.allow_override)?;
    if let Some((format, passphrase)) = passphrase {
        luks::load(&image, format, &passphrase).map_err(|errno| encryption_error(options, errno))?;
    }
    let about = |errno| OpenError::from_errno(&name, errno, "it cannot be examined; see the state of the cluster");
    let geometry = geometry(&image, &effective, options, read_only).map_err(about)?;
    if geometry.size == 0 {
        return Err(OpenError(format!(
            "{name}: smaller than a block of {} bytes; make it larger with rbd resize",
            geometry.logical_block
        )));
    }
    let lock = lock_of(&image, options, read_only)?;
    let cached = effective.is("rbd_cache", "true");
    let (major, minor, extra) = api.version();
    let cache = if cached { "its cache" } else { "no cache" };
    Ok(Shared {
        image,
        name,
        conf: options.conf.clone(),
        librbd: format!("librbd {major}.{minor}.{extra} with {cache}"),
        geometry,
        size: AtomicU64::new(geometry.size),
        zeroes_may_unmap: geometry.zeroes_may_unmap,
        encrypted: options.encryption.is_some(),
        cached,
        cached_after_flush: effective.is("rbd_cache_writethrough_until_flush", "true"),
        changed: AtomicBool::new(false),
        flushed: AtomicBool::new(false),
        sync_turn: Mutex::default(),
        sticky_error: StickyError::default(),
        health: ImageHealth::default(),
        lock,
        events,
    })
}

fn connect(api: &'static Api, options: &RbdOptions) -> Result<RadosPool, OpenError> {
    let RbdOptions { user, name, .. } = options;
    let cluster = Cluster::new(api, user).map_err(|errno| {
        OpenError::from_errno(&format!("--ceph-user {user}"), errno, "use a Ceph user's name without 'client.'")
    })?;
    cluster.read_file(options.conf.as_deref()).map_err(|errno| {
        let (what, fix) = match &options.conf {
            Some(conf) => (
                format!("--ceph-conf {}", conf.display()),
                "copy the cluster's configuration file there, or correct the path",
            ),
            None => (
                "no configuration file of Ceph in CEPH_CONF, /etc/ceph/ceph.conf, ~/.ceph/ceph.conf and ./ceph.conf"
                    .into(),
                "copy the cluster's there, or name it with --ceph-conf",
            ),
        };
        OpenError::from_errno(&what, errno, fix)
    })?;
    options::set(&cluster, CachePolicy::from(options.mode), &options.options)?;
    cluster.connect().map_err(|errno| {
        let fix = match errno.0 {
            libc::ETIMEDOUT => "no monitor answers: see 'mon host' in its configuration (--ceph-conf), and the network",
            libc::ENOENT => {
                "no key or no monitor is named: see 'keyring' and 'mon host' in its configuration (--ceph-conf)"
            }
            libc::EPERM | libc::EACCES => "the cluster does not accept the key: see --ceph-user and its keyring",
            _ => "see --ceph-conf and --ceph-user",
        };
        OpenError::from_errno(&format!("cannot connect to the Ceph cluster as client.{user}"), errno, fix)
    })?;
    RadosPool::open(cluster, &name.pool, &name.namespace).map_err(|errno| {
        let fix = match errno.0 {
            libc::ENOENT => "there is no such pool (ceph osd pool ls)",
            _ => "see the state of the cluster (ceph status)",
        };
        OpenError::from_errno(&format!("pool {}", name.pool), errno, fix)
    })
}

fn image_error(options: &RbdOptions, errno: Errno) -> OpenError {
    let RbdOptions { name, user, .. } = options;
    let fix = match errno.0 {
        libc::ENOENT => format!("there is none: see `rbd ls {}`", name.pool),
        libc::EPERM | libc::EACCES => {
            format!("client.{user} may not: give it 'profile rbd' for mon and for osd on pool {}", name.pool)
        }
        libc::EROFS => "it cannot be written: give --read-only".to_string(),
        libc::ESHUTDOWN => "this client is shut out of the cluster: see `ceph osd blocklist ls`".to_string(),
        _ => "see the state of the cluster (ceph status)".to_string(),
    };
    OpenError::from_errno(&format!("RBD image {name}"), errno, &fix)
}

fn encryption_error(options: &RbdOptions, errno: Errno) -> OpenError {
    let cause = match errno.0 {
        libc::EPERM => "the passphrase is wrong: see --rbd-passphrase-file".to_string(),
        libc::EINVAL => "it is not encrypted in this format: see --rbd-encryption".to_string(),
        libc::ENOTSUP | libc::ENOSYS => "this librbd cannot: Ceph 16 or later is needed".to_string(),
        _ => super::io_error(errno).to_string(),
    };
    OpenError(format!("RBD image {} cannot be decrypted: {cause}", options.name))
}

fn geometry(
    image: &Image,
    effective: &EffectiveOptions,
    options: &RbdOptions,
    read_only: bool,
) -> Result<Geometry, Errno> {
    let block = u64::from(options.logical_block_size);
    let size = image.size()? / block * block;
    let granularity = effective.get("rbd_discard_granularity_bytes").and_then(|text| text.parse().ok());
    let granularity = granularity.unwrap_or(DISCARD_GRANULARITY).max(options.logical_block_size);
    let writable = !read_only;
    let range = |granularity| Some(RangeLimits { max_bytes: MAX_RANGE, granularity }).filter(|_| writable);
    Ok(Geometry {
        size,
        logical_block: options.logical_block_size,
        physical_block: PHYSICAL_BLOCK,
        alignment_offset: 0,
        min_io: PHYSICAL_BLOCK,
        opt_io: u32::try_from(image.stripe_unit()?).unwrap_or(0),
        read_only,
        discard: range(granularity).filter(|_| options.discard_unmap),
        write_zeroes: range(options.logical_block_size),
        zeroes_may_unmap: writable && options.discard_unmap,
        durable_write: DurableWrite::Emulate,
    })
}

fn lock_of(image: &Image, options: &RbdOptions, read_only: bool) -> Result<Lock, OpenError> {
    let name = &options.name;
    let can_lock = image
        .can_lock()
        .map_err(|errno| OpenError::from_errno(&name.to_string(), errno, "its features cannot be read"))?;
    if !can_lock && !read_only && options.lock == super::RbdLock::Auto {
        log::warn!(
            "{name}: it has no feature exclusive-lock, so nothing keeps two hosts from writing it at once (rbd feature \
             enable {name} exclusive-lock)"
        );
    }
    let mut wanted = lock::is_wanted(options.lock, can_lock, read_only).map_err(|_| {
        OpenError(format!(
            "--rbd-lock exclusive: {name} has no feature exclusive-lock; add it (rbd feature enable {name} \
             exclusive-lock), or use --rbd-lock auto"
        ))
    })?;
    // `rbd group snap create` takes the lock of every image of the group, and fails if a client does not share one.
    let groups = |errno| OpenError::from_errno(&name.to_string(), errno, "its groups cannot be read");
    if wanted && options.lock == super::RbdLock::Auto && image.is_in_group().map_err(groups)? {
        log::info!(
            "{name}: it is in a group, so its lock is shared, or no snapshot of the group could be taken; --rbd-lock \
             exclusive keeps it all the same"
        );
        wanted = false;
    }
    let file = options.state_file.as_deref().filter(|_| wanted);
    let open = if options.lock_later { StateFile::open_unlocked } else { StateFile::open };
    let file = file.map(|path| open(path, &name.to_string())).transpose().map_err(OpenError)?;
    Ok(Lock::new(wanted, options.lock, file))
}

/// Fails if other users could change the libraries or the configuration file. librados reports a file that does not exist.
fn check_trust(options: &RbdOptions) -> Result<(), OpenError> {
    let RbdOptions { library_path, conf, .. } = options;
    let libraries = library_path.iter().flat_map(|directory| {
        ["", "librados.so.2", "librbd.so.1"].map(|name| ("--ceph-library-path", directory.join(name)))
    });
    let conf = conf.iter().map(|path| ("--ceph-conf", path.clone()));
    for (option, path) in libraries.chain(conf).filter(|(_, path)| path.exists()) {
        crate::base::trust::check(&path).map_err(|why| OpenError(format!("{option}: {why}")))?;
    }
    Ok(())
}

/// Reads the passphrase: the file's content without a newline at the end.
fn read_passphrase(path: &Path) -> Result<Vec<u8>, OpenError> {
    let failed = |cause: &dyn fmt::Display| {
        let path = path.display();
        OpenError(format!("--rbd-passphrase-file {path}: {cause}; it holds the passphrase and nothing else"))
    };
    let mut text = Vec::new();
    let file = std::fs::File::open(path).map_err(|error| failed(&error))?;
    crate::base::trust::check_open(path, &file).map_err(|why| failed(&why))?;
    let mut file = io::Read::take(file, MAX_PASSPHRASE as u64 + 1);
    io::Read::read_to_end(&mut file, &mut text).map_err(|error| failed(&error))?;
    if text.len() > MAX_PASSPHRASE {
        return Err(failed(&format!("larger than {MAX_PASSPHRASE} bytes")));
    }
    let end = text.strip_suffix(b"\n").map_or(text.len(), <[u8]>::len);
    text.truncate(end);
    if text.is_empty() {
        return Err(failed(&"empty"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{Permissions, set_permissions, write};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn files_that_others_may_change_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write(&path, "secret\n").unwrap();
        assert_eq!(read_passphrase(&path).unwrap(), b"secret");
        let of = |conf: Option<&Path>, library_path: Option<&Path>| RbdOptions {
            conf: conf.map(Path::to_owned),
            library_path: library_path.map(Path::to_owned),
            ..RbdOptions::new("p/i".parse().unwrap(), crate::engine::cache::CacheMode::Writeback)
        };
        assert!(check_trust(&of(Some(&path), Some(dir.path()))).is_ok());
        set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        assert!(read_passphrase(&path).unwrap_err().0.contains("may be written by everybody"));
        assert!(check_trust(&of(Some(&path), None)).unwrap_err().0.contains("--ceph-conf"));
        set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
        assert!(check_trust(&of(None, Some(dir.path()))).unwrap_err().0.contains("--ceph-library-path"));
    }
}
