//! UNSAFE. The handle of an open image: a method for each synchronous function of librbd. The functions that transfer data
//! are in `aio`.
//!
//! Every function may wait for the cluster, as long as that takes, unless its comment says otherwise. None may be called in
//! a callback, which runs in a thread of librbd.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr;

use super::super::Errno;
use super::sys::{self, Api, rados_ioctx_t, rados_t, rbd_config_option_t, rbd_image_t};

/// Converts the result of a C function, in which a negative value is an error number.
pub(super) fn check(result: c_int) -> Result<(), Errno> {
    if result < 0 { Err(Errno(result.saturating_neg())) } else { Ok(()) }
}

/// Converts text for C. EINVAL: it has a zero byte, which a C string cannot have.
pub(super) fn c_string(text: &str) -> Result<CString, Errno> {
    CString::new(text).map_err(|_| Errno(libc::EINVAL))
}

/// A connection to a cluster, before or after it is connected.
pub(super) struct Cluster {
    api: &'static Api,
    raw: rados_t,
}

// SAFETY: librados' handles may be used by any thread, several at a time (librados.h).
unsafe impl Send for Cluster {}
// SAFETY: as above.
unsafe impl Sync for Cluster {}

impl Cluster {
    /// Creates a connection that is not connected. `user`: the Ceph user without "client.".
    pub(super) fn new(api: &'static Api, user: &str) -> Result<Self, Errno> {
        let name = c_string(&format!("client.{user}"))?;
        let mut raw = ptr::null_mut();
        // SAFETY: the strings live through the call, which writes a handle.
        check(unsafe { (api.rados.rados_create2)(&raw mut raw, c"ceph".as_ptr(), name.as_ptr(), 0) })?;
        Ok(Cluster { api, raw })
    }

    /// Reads a configuration file. `None`: Ceph looks for it in its usual places (CEPH_CONF, /etc/ceph/ceph.conf, ...).
    pub(super) fn read_file(&self, path: Option<&Path>) -> Result<(), Errno> {
        use std::os::unix::ffi::OsStrExt;
        let path = path.map(|path| CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno(libc::EINVAL)));
        let path = path.transpose()?;
        // SAFETY: a string that lives through the call, or null.
        check(unsafe {
            (self.api.rados.rados_conf_read_file)(self.raw, path.as_ref().map_or(ptr::null(), |path| path.as_ptr()))
        })
    }

    /// Sets an option. ENOENT: there is no option of this name. EINVAL: it cannot have this value.
    pub(super) fn set(&self, option: &str, value: &str) -> Result<(), Errno> {
        let (option, value) = (c_string(option)?, c_string(value)?);
        // SAFETY: the strings live through the call.
        check(unsafe { (self.api.rados.rados_conf_set)(self.raw, option.as_ptr(), value.as_ptr()) })
    }

    /// Returns an option's value before pools and images override it.
    pub(super) fn get(&self, option: &str) -> Result<String, Errno> {
        let option = c_string(option)?;
        let mut text = vec![0u8; 4096];
        // SAFETY: writes at most `len` bytes, a zero among them, to the buffer, which lives through the call.
        check(unsafe {
            (self.api.rados.rados_conf_get)(self.raw, option.as_ptr(), text.as_mut_ptr().cast::<c_char>(), text.len())
        })?;
        let text = CStr::from_bytes_until_nul(&text).map_err(|_| Errno(libc::ERANGE))?;
        Ok(text.to_string_lossy().into_owned())
    }

    /// Connects. ETIMEDOUT: no monitor answered within `client_mount_timeout`.
    pub(super) fn connect(&self) -> Result<(), Errno> {
        // SAFETY: the handle is not connected yet, because its creator calls this once.
        check(unsafe { (self.api.rados.rados_connect)(self.raw) })
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // SAFETY: nothing uses this connection any more: its pool's handle lives in `Image`, which owns this.
        unsafe { (self.api.rados.rados_shutdown)(self.raw) }
    }
}

/// A pool and a namespace in it.
pub(super) struct RadosPool {
    raw: rados_ioctx_t,
    /// The pool's connection. Declared after `raw`, so that it is dropped later.
    cluster: Cluster,
}

// SAFETY: as `Cluster`.
unsafe impl Send for RadosPool {}
// SAFETY: as `Cluster`.
unsafe impl Sync for RadosPool {}

impl RadosPool {
    pub(super) fn open(cluster: Cluster, pool: &str, namespace: &str) -> Result<Self, Errno> {
        let (pool, namespace) = (c_string(pool)?, c_string(namespace)?);
        let mut raw = ptr::null_mut();
        // SAFETY: the string lives through the call, which writes a handle.
        check(unsafe { (cluster.api.rados.rados_ioctx_create)(cluster.raw, pool.as_ptr(), &raw mut raw) })?;
        // SAFETY: the handle is good, and the string lives through the call.
        unsafe { (cluster.api.rados.rados_ioctx_set_namespace)(raw, namespace.as_ptr()) };
        Ok(RadosPool { raw, cluster })
    }
}

impl Drop for RadosPool {
    fn drop(&mut self) {
        // SAFETY: `open` created it, and no image of it is open: `Image` closes itself before it drops this.
        unsafe { (self.cluster.api.rados.rados_ioctx_destroy)(self.raw) }
    }
}

/// An open image. Dropping it closes it, which waits for operations in flight and writes back librbd's cache.
pub(super) struct Image {
    pub(super) api: &'static Api,
    pub(super) raw: rbd_image_t,
    /// The image's pool. Dropped after the image is closed.
    pool: RadosPool,
}

// SAFETY: librbd's images may be used by any thread, several at a time.
unsafe impl Send for Image {}
// SAFETY: as above.
unsafe impl Sync for Image {}

/// The value of an option that is in force, and its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EffectiveOption {
    pub value: String,
    /// `pool` or `image` if that overrides the configured value.
    pub overridden_by: Option<&'static str>,
}

impl Image {
    /// Opens an image, or a snapshot of it, which is always read-only.
    pub(super) fn open(pool: RadosPool, image: &str, snapshot: Option<&str>, read_only: bool) -> Result<Self, Errno> {
        let api = pool.cluster.api;
        let image = c_string(image)?;
        let snapshot = snapshot.map(c_string).transpose()?;
        let snapshot = snapshot.as_ref().map_or(ptr::null(), |name| name.as_ptr());
        let open = if read_only { api.rbd.rbd_open_read_only } else { api.rbd.rbd_open };
        let mut raw = ptr::null_mut();
        // SAFETY: the strings (or null) live through the call, which writes a handle.
        check(unsafe { open(pool.raw, image.as_ptr(), &raw mut raw, snapshot) })?;
        Ok(Image { api, raw, pool })
    }

    fn number(&self, function: unsafe extern "C" fn(rbd_image_t, *mut u64) -> c_int) -> Result<u64, Errno> {
        let mut value = 0;
        // SAFETY: the image is open, and the function writes one u64.
        check(unsafe { function(self.raw, &raw mut value) })?;
        Ok(value)
    }

    /// Returns the image's size in bytes; for an encrypted image, without the encryption header.
    pub(super) fn size(&self) -> Result<u64, Errno> {
        self.number(self.api.rbd.rbd_get_size)
    }

    /// Returns the number of consecutive bytes that one object stores.
    pub(super) fn stripe_unit(&self) -> Result<u64, Errno> {
        self.number(self.api.rbd.rbd_get_stripe_unit)
    }

    /// Whether the image has the feature exclusive-lock.
    pub(super) fn can_lock(&self) -> Result<bool, Errno> {
        Ok(self.number(self.api.rbd.rbd_get_features)? & sys::RBD_FEATURE_EXCLUSIVE_LOCK != 0)
    }

    /// Whether the image is in a group (`rbd group`).
    pub(super) fn is_in_group(&self) -> Result<bool, Errno> {
        let Some(op_features) = self.api.rbd.rbd_get_op_features else { return Ok(false) };
        Ok(self.number(op_features)? & sys::RBD_OPERATION_FEATURE_GROUP != 0)
    }

    /// Returns the names and values of the options that are in force for this image.
    pub(super) fn options(&self) -> Result<Vec<(String, EffectiveOption)>, Errno> {
        let mut length: c_int = 512;
        loop {
            let mut list: Vec<rbd_config_option_t> = Vec::with_capacity(length as usize);
            let capacity = length;
            // SAFETY: the list has room for `length` entries; the entries that are filled in are released below.
            let result = unsafe { (self.api.rbd.rbd_config_image_list)(self.raw, list.as_mut_ptr(), &raw mut length) };
            if result == -libc::ERANGE && length > capacity {
                continue;
            }
            check(result)?;
            let count = length.clamp(0, capacity);
            // SAFETY: the function filled in so many entries.
            unsafe { list.set_len(count as usize) };
            // SAFETY: each entry has two strings, which live until the cleanup.
            let text = |from: *const c_char| unsafe { CStr::from_ptr(from) }.to_string_lossy().into_owned();
            let options = list.iter().map(|option| {
                let overridden_by = match option.source {
                    sys::RBD_CONFIG_SOURCE_POOL => Some("pool"),
                    sys::RBD_CONFIG_SOURCE_IMAGE => Some("image"),
                    _ => None,
                };
                (text(option.name), EffectiveOption { value: text(option.value), overridden_by })
            });
            let options = options.collect();
            // SAFETY: the entries are as the function left them, and not used afterwards.
            unsafe { (self.api.rbd.rbd_config_image_list_cleanup)(list.as_mut_ptr(), count) };
            return Ok(options);
        }
    }

    /// Returns an option of the connection, for options that images do not have.
    pub(super) fn cluster_option(&self, name: &str) -> Result<String, Errno> {
        self.pool.cluster.get(name)
    }

    /// Makes everything written durable. librbd treats it like a flush of the guest.
    pub(super) fn flush(&self) -> Result<(), Errno> {
        // SAFETY: the image is open.
        check(unsafe { (self.api.rbd.rbd_flush)(self.raw) })
    }

    /// Drops librbd's cache of read data, because another client may have written meanwhile.
    pub(super) fn invalidate_cache(&self) -> Result<(), Errno> {
        // SAFETY: the image is open.
        check(unsafe { (self.api.rbd.rbd_invalidate_cache)(self.raw) })
    }

    /// Whether the image is being migrated (`rbd migration`): a part of its data is then in another image.
    pub(super) fn is_migrating(&self) -> Result<bool, Errno> {
        Ok(self.number(self.api.rbd.rbd_get_features)? & sys::RBD_FEATURE_MIGRATING != 0)
    }

    /// Lists the ranges in `offset..offset + len` that the image or its parents store, as (start, end). Joins ranges with a
    /// hole smaller than `min_hole` between them. librbd flushes first.
    pub(super) fn list_data(&self, offset: u64, len: u64, min_hole: u64) -> Result<Vec<(u64, u64)>, Errno> {
        let mut found = DataRanges { ranges: Vec::new(), min_hole };
        let argument = (&raw mut found).cast::<c_void>();
        // SAFETY: the image is open; the callback's argument lives through the call, which alone uses it: librbd calls
        // back one range after the other, before it returns.
        check(unsafe {
            (self.api.rbd.rbd_diff_iterate2)(self.raw, ptr::null(), offset, len, 1, 0, Some(add_range), argument)
        })?;
        Ok(found.ranges)
    }

    /// Takes the lock permanently, until `unlock`. EROFS: another client has it permanently. librbd waits for the lock of a
    /// client that died, usually half a minute, and then shuts that client out.
    pub(super) fn lock(&self) -> Result<(), Errno> {
        // SAFETY: the image is open.
        check(unsafe { (self.api.rbd.rbd_lock_acquire)(self.raw, sys::RBD_LOCK_MODE_EXCLUSIVE) })
    }

    /// Releases the lock; our own writes then fail (EROFS) until the next `lock`.
    pub(super) fn unlock(&self) -> Result<(), Errno> {
        // SAFETY: the image is open.
        check(unsafe { (self.api.rbd.rbd_lock_release)(self.raw) })
    }

    /// Whether this client has the lock, according to the cluster.
    pub(super) fn is_lock_owner(&self) -> Result<bool, Errno> {
        let mut is_owner: c_int = 0;
        // SAFETY: the image is open, and the function writes one int.
        check(unsafe { (self.api.rbd.rbd_is_exclusive_lock_owner)(self.raw, &raw mut is_owner) })?;
        Ok(is_owner != 0)
    }

    /// Returns the address of the client that has the lock, as `rbd lock ls` prints it. `None`: no client has it.
    pub(super) fn lock_owner(&self) -> Result<Option<String>, Errno> {
        let mut owners = [ptr::null_mut::<c_char>(); 8];
        let mut count = owners.len();
        let mut mode = 0;
        // SAFETY: the image is open; the function writes one mode and at most `count` strings, released below.
        let result =
            unsafe { (self.api.rbd.rbd_lock_get_owners)(self.raw, &raw mut mode, owners.as_mut_ptr(), &raw mut count) };
        if result == -libc::ENOENT {
            return Ok(None);
        }
        check(result)?;
        let count = count.min(owners.len());
        // SAFETY: the function created `count` strings, which live until the cleanup.
        let first = (count > 0).then(|| unsafe { CStr::from_ptr(owners[0]) }.to_string_lossy().into_owned());
        // SAFETY: as the function left them, and not used afterwards.
        unsafe { (self.api.rbd.rbd_lock_get_owners_cleanup)(owners.as_mut_ptr(), count) };
        Ok(first)
    }

    /// Takes the lock away from a client that is known to be dead, and shuts it out of the cluster. ENOENT: it no longer has
    /// the lock.
    pub(super) fn break_lock(&self, owner: &str) -> Result<(), Errno> {
        let owner = c_string(owner)?;
        // SAFETY: the image is open, and the string lives through the call.
        check(unsafe { (self.api.rbd.rbd_lock_break)(self.raw, sys::RBD_LOCK_MODE_EXCLUSIVE, owner.as_ptr()) })
    }

    /// Takes a snapshot without a quiesce request to any client. EEXIST: the name is taken.
    pub(super) fn create_snapshot(&self, name: &str) -> Result<(), Errno> {
        let name = c_string(name)?;
        let Some(create) = self.api.rbd.rbd_snap_create2 else {
            // A librbd this old sends no quiesce requests.
            // SAFETY: the image is open, and the string lives through the call.
            return check(unsafe { (self.api.rbd.rbd_snap_create)(self.raw, name.as_ptr()) });
        };
        let flags = sys::RBD_SNAP_CREATE_SKIP_QUIESCE;
        // SAFETY: as above; without a callback its argument is not used.
        check(unsafe { create(self.raw, name.as_ptr(), flags, None, ptr::null_mut()) })
    }

    /// Removes a snapshot.
    pub(super) fn remove_snapshot(&self, name: &str) -> Result<(), Errno> {
        let name = c_string(name)?;
        // SAFETY: the image is open, and the string lives through the call.
        check(unsafe { (self.api.rbd.rbd_snap_remove)(self.raw, name.as_ptr()) })
    }
}

/// The ranges that [`Image::list_data`] collects.
struct DataRanges {
    ranges: Vec<(u64, u64)>,
    min_hole: u64,
}

/// Adds a range, whether librbd reports data or a hole there, because some versions confuse the two.
unsafe extern "C" fn add_range(offset: u64, len: usize, _exists: c_int, found: *mut c_void) -> c_int {
    // SAFETY: `list_data` passed this argument and waits for the callbacks.
    let found = unsafe { &mut *found.cast::<DataRanges>() };
    let end = offset.saturating_add(len as u64);
    match found.ranges.last_mut() {
        Some(last) if last.0 <= offset && offset < last.1.saturating_add(found.min_hole) => last.1 = last.1.max(end),
        _ => found.ranges.push((offset, end)),
    }
    0
}

impl Drop for Image {
    fn drop(&mut self) {
        // SAFETY: opened by `open` and closed only here. Queues and watches own a reference to the image, so nothing is in
        // flight and no callback follows.
        if let Err(errno) = check(unsafe { (self.api.rbd.rbd_close)(self.raw) }) {
            log::error!("closing the RBD image failed: {}", std::io::Error::from_raw_os_error(errno.0));
        }
    }
}
