//! UNSAFE. librados and librbd, which are loaded when an RBD disk is opened, and hand-written declarations of their
//! functions.
//!
//! So one program serves hosts with and without Ceph, and building it needs nothing of Ceph. The libraries are never closed,
//! because they leave threads and thread-local storage behind.
//!
//! A test reads these declarations, too, and has a C compiler compare them with Ceph's headers. They therefore have one
//! form: one declaration a line, C's names, and types that stand for one C type each.
#![allow(unsafe_code)]
#![allow(non_camel_case_types)]

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use libc::{iovec, size_t, ssize_t};

/// A connection to a cluster (librados.h).
pub(super) type rados_t = *mut c_void;
/// A pool and a namespace in it.
pub(super) type rados_ioctx_t = *mut c_void;
/// An open image (librbd.h).
pub(super) type rbd_image_t = *mut c_void;
/// An operation in flight.
pub(super) type rbd_completion_t = *mut c_void;
/// Called by a thread of librbd when an operation has finished.
pub(super) type rbd_callback_t = Option<unsafe extern "C" fn(rbd_completion_t, *mut c_void)>;
/// Called by a thread of librbd for an event of the image.
pub(super) type rbd_update_callback_t = Option<unsafe extern "C" fn(*mut c_void)>;
/// Called with the progress of a long operation; not used here.
pub(super) type librbd_progress_fn_t = Option<unsafe extern "C" fn(u64, u64, *mut c_void) -> c_int>;
/// Called for each range that a diff finds; returns 0 to continue.
pub(super) type rbd_diff_callback_t = Option<unsafe extern "C" fn(u64, size_t, c_int, *mut c_void) -> c_int>;
/// `RBD_LOCK_MODE_EXCLUSIVE` and so on.
pub(super) type rbd_lock_mode_t = u32;
/// `RBD_CONFIG_SOURCE_POOL` and so on.
pub(super) type rbd_config_source_t = u32;
/// `RBD_ENCRYPTION_FORMAT_LUKS1` and so on.
pub(super) type rbd_encryption_format_t = u32;
/// `RBD_ENCRYPTION_ALGORITHM_AES256` and so on.
pub(super) type rbd_encryption_algorithm_t = u32;
/// One of the structures below.
pub(super) type rbd_encryption_options_t = *mut c_void;

/// An option's effective value.
#[repr(C)]
pub(super) struct rbd_config_option_t {
    pub name: *mut c_char,
    pub value: *mut c_char,
    pub source: rbd_config_source_t,
}

/// The options to open an image in format LUKS1. LUKS2 has a structure of the same layout.
#[repr(C)]
pub(super) struct rbd_encryption_luks1_format_options_t {
    pub alg: rbd_encryption_algorithm_t,
    pub passphrase: *const c_char,
    pub passphrase_size: size_t,
}

/// The options to open an image in either format; since Ceph 17.
#[repr(C)]
pub(super) struct rbd_encryption_luks_format_options_t {
    pub passphrase: *const c_char,
    pub passphrase_size: size_t,
}

pub(super) const RBD_FEATURE_EXCLUSIVE_LOCK: u64 = 4;
pub(super) const RBD_FEATURE_MIGRATING: u64 = 512;
pub(super) const RBD_OPERATION_FEATURE_GROUP: u64 = 4;
pub(super) const RBD_LOCK_MODE_EXCLUSIVE: rbd_lock_mode_t = 0;
pub(super) const RBD_CONFIG_SOURCE_POOL: rbd_config_source_t = 1;
pub(super) const RBD_CONFIG_SOURCE_IMAGE: rbd_config_source_t = 2;
pub(super) const RBD_WRITE_ZEROES_FLAG_THICK_PROVISION: c_int = 1;
pub(super) const RBD_SNAP_CREATE_SKIP_QUIESCE: u32 = 1;
pub(super) const RBD_ENCRYPTION_FORMAT_LUKS1: rbd_encryption_format_t = 0;
pub(super) const RBD_ENCRYPTION_FORMAT_LUKS2: rbd_encryption_format_t = 1;
/// Since Ceph 17.
pub(super) const RBD_ENCRYPTION_FORMAT_LUKS: rbd_encryption_format_t = 2;
pub(super) const RBD_ENCRYPTION_ALGORITHM_AES256: rbd_encryption_algorithm_t = 1;

/// Defines a structure of function pointers, each of which is looked up in the library under its own name. `optional`: the
/// function may be missing, because it is newer than the oldest supported Ceph.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $(fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)?;)* }
     optional { $(fn $new:ident($($new_arg:ident: $new_type:ty),* $(,)?) $(-> $new_result:ty)?;)* }) => {
        $(#[$doc])*
        pub(super) struct $table {
            $(pub $name: unsafe extern "C" fn($($type),*) $(-> $result)?,)*
            $(pub $new: Option<unsafe extern "C" fn($($new_type),*) $(-> $new_result)?>,)*
        }

        impl $table {
            fn find(library: &Library) -> Result<Self, LoadError> {
                Ok($table {
                    $($name: {
                        let found = library.symbol(stringify!($name));
                        let found = found.ok_or_else(|| library.lacks(stringify!($name)))?;
                        // SAFETY: the library's function of this name has this type, which a test compares with
                        // Ceph's header; the library is never closed.
                        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) $(-> $result)?>(found) }
                    },)*
                    $($new: library.symbol(stringify!($new)).map(|found| {
                        // SAFETY: as above.
                        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($new_type),*) $(-> $new_result)?>(found) }
                    }),)*
                })
            }
        }
    };
}

functions! {
    /// librados.h.
    Rados {
        fn rados_create2(cluster: *mut rados_t, clustername: *const c_char, name: *const c_char, flags: u64) -> c_int;
        fn rados_conf_read_file(cluster: rados_t, path: *const c_char) -> c_int;
        fn rados_conf_set(cluster: rados_t, option: *const c_char, value: *const c_char) -> c_int;
        fn rados_conf_get(cluster: rados_t, option: *const c_char, buf: *mut c_char, len: size_t) -> c_int;
        fn rados_connect(cluster: rados_t) -> c_int;
        fn rados_shutdown(cluster: rados_t);
        fn rados_ioctx_create(cluster: rados_t, pool_name: *const c_char, ioctx: *mut rados_ioctx_t) -> c_int;
        fn rados_ioctx_set_namespace(io: rados_ioctx_t, nspace: *const c_char);
        fn rados_ioctx_destroy(io: rados_ioctx_t);
    }
    optional {}
}

functions! {
    /// librbd.h.
    Rbd {
        fn rbd_version(major: *mut c_int, minor: *mut c_int, extra: *mut c_int);
        fn rbd_open(io: rados_ioctx_t, name: *const c_char, image: *mut rbd_image_t, snap_name: *const c_char) -> c_int;
        fn rbd_open_read_only(io: rados_ioctx_t, name: *const c_char, image: *mut rbd_image_t, snap_name: *const c_char) -> c_int;
        fn rbd_close(image: rbd_image_t) -> c_int;
        fn rbd_get_size(image: rbd_image_t, size: *mut u64) -> c_int;
        fn rbd_get_features(image: rbd_image_t, features: *mut u64) -> c_int;
        fn rbd_get_stripe_unit(image: rbd_image_t, stripe_unit: *mut u64) -> c_int;
        fn rbd_config_image_list(image: rbd_image_t, options: *mut rbd_config_option_t, max_options: *mut c_int) -> c_int;
        fn rbd_config_image_list_cleanup(options: *mut rbd_config_option_t, max_options: c_int);
        fn rbd_aio_create_completion(cb_arg: *mut c_void, complete_cb: rbd_callback_t, c: *mut rbd_completion_t) -> c_int;
        fn rbd_aio_get_return_value(c: rbd_completion_t) -> ssize_t;
        fn rbd_aio_release(c: rbd_completion_t);
        fn rbd_aio_readv(image: rbd_image_t, iov: *const iovec, iovcnt: c_int, off: u64, c: rbd_completion_t) -> c_int;
        fn rbd_aio_writev(image: rbd_image_t, iov: *const iovec, iovcnt: c_int, off: u64, c: rbd_completion_t) -> c_int;
        fn rbd_aio_discard(image: rbd_image_t, off: u64, len: u64, c: rbd_completion_t) -> c_int;
        fn rbd_aio_write_zeroes(image: rbd_image_t, off: u64, len: size_t, c: rbd_completion_t, zero_flags: c_int, op_flags: c_int) -> c_int;
        fn rbd_aio_flush(image: rbd_image_t, c: rbd_completion_t) -> c_int;
        fn rbd_flush(image: rbd_image_t) -> c_int;
        fn rbd_invalidate_cache(image: rbd_image_t) -> c_int;
        fn rbd_diff_iterate2(image: rbd_image_t, fromsnapname: *const c_char, ofs: u64, len: u64, include_parent: u8, whole_object: u8, cb: rbd_diff_callback_t, arg: *mut c_void) -> c_int;
        fn rbd_lock_acquire(image: rbd_image_t, lock_mode: rbd_lock_mode_t) -> c_int;
        fn rbd_lock_release(image: rbd_image_t) -> c_int;
        fn rbd_is_exclusive_lock_owner(image: rbd_image_t, is_owner: *mut c_int) -> c_int;
        fn rbd_lock_get_owners(image: rbd_image_t, lock_mode: *mut rbd_lock_mode_t, lock_owners: *mut *mut c_char, max_lock_owners: *mut size_t) -> c_int;
        fn rbd_lock_get_owners_cleanup(lock_owners: *mut *mut c_char, lock_owner_count: size_t);
        fn rbd_lock_break(image: rbd_image_t, lock_mode: rbd_lock_mode_t, lock_owner: *const c_char) -> c_int;
        fn rbd_update_watch(image: rbd_image_t, handle: *mut u64, watch_cb: rbd_update_callback_t, arg: *mut c_void) -> c_int;
        fn rbd_update_unwatch(image: rbd_image_t, handle: u64) -> c_int;
        fn rbd_snap_create(image: rbd_image_t, snapname: *const c_char) -> c_int;
        fn rbd_snap_remove(image: rbd_image_t, snapname: *const c_char) -> c_int;
    }
    optional {
        fn rbd_get_op_features(image: rbd_image_t, op_features: *mut u64) -> c_int;
        fn rbd_snap_create2(image: rbd_image_t, snap_name: *const c_char, flags: u32, cb: librbd_progress_fn_t, cbdata: *mut c_void) -> c_int;
        fn rbd_encryption_load(image: rbd_image_t, format: rbd_encryption_format_t, opts: rbd_encryption_options_t, opts_size: size_t) -> c_int;
        fn rbd_quiesce_watch(image: rbd_image_t, quiesce_cb: rbd_update_callback_t, unquiesce_cb: rbd_update_callback_t, arg: *mut c_void, handle: *mut u64) -> c_int;
        fn rbd_quiesce_complete(image: rbd_image_t, handle: u64, r: c_int);
        fn rbd_quiesce_unwatch(image: rbd_image_t, handle: u64) -> c_int;
    }
}

/// The functions of both libraries.
pub(super) struct Api {
    pub rados: Rados,
    pub rbd: Rbd,
}

impl Api {
    /// Loads the libraries from `directory`, or from where the dynamic linker looks (ld.so(8)). Called when an image is
    /// opened; loads them once for each process and directory.
    pub(super) fn load(directory: Option<&Path>) -> Result<&'static Api, LoadError> {
        static LOADED: Mutex<Vec<(Option<PathBuf>, &'static Api)>> = Mutex::new(Vec::new());
        let mut loaded = LOADED.lock().expect("no panic while held");
        if let Some((_, api)) = loaded.iter().find(|(from, _)| from.as_deref() == directory) {
            return Ok(api);
        }
        // librbd needs librados and uses the one that is already loaded.
        let rados = Rados::find(&Library::open(directory, "librados.so.2", "librados2")?)?;
        let rbd = Rbd::find(&Library::open(directory, "librbd.so.1", "librbd1")?)?;
        let api: &'static Api = Box::leak(Box::new(Api { rados, rbd }));
        loaded.push((directory.map(Path::to_path_buf), api));
        Ok(api)
    }

    /// librbd's version (1.16.0 is Ceph 16's, 1.18.0 Ceph 18's).
    pub(super) fn version(&self) -> (c_int, c_int, c_int) {
        let (mut major, mut minor, mut extra) = (0, 0, 0);
        // SAFETY: writes three ints, which live through the call.
        unsafe { (self.rbd.rbd_version)(&raw mut major, &raw mut minor, &raw mut extra) };
        (major, minor, extra)
    }
}

/// Why a library cannot be used, and how to fix it.
#[derive(Debug)]
pub struct LoadError(String);

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for LoadError {}

/// A library that stays loaded until the process ends.
struct Library {
    handle: *mut c_void,
    name: String,
    package: &'static str,
}

impl Library {
    fn open(directory: Option<&Path>, soname: &str, package: &'static str) -> Result<Library, LoadError> {
        let path = directory.map_or(PathBuf::from(soname), |directory| directory.join(soname));
        let name = path.display().to_string();
        let from_elsewhere = directory.is_some();
        let failed = |cause: &str| {
            let fix = if from_elsewhere {
                "--ceph-library-path names the directory that holds librados.so.2 and librbd.so.1".to_string()
            } else {
                format!(
                    "install Ceph's client libraries (Debian: apt install {package}), or name their directory with \
                     --ceph-library-path"
                )
            };
            LoadError(format!("--rbd needs {soname}, which cannot be loaded: {cause}; {fix}"))
        };
        let path = CString::new(OsStr::as_bytes(path.as_os_str())).map_err(|_| failed("a path with a zero byte"))?;
        // SAFETY: `path` is a string that lives through the call. The library's initializers run: it is Ceph's, or
        // what the operator named.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            return Err(failed(&last_error()));
        }
        Ok(Library { handle, name, package })
    }

    fn symbol(&self, name: &str) -> Option<*mut c_void> {
        let name = CString::new(name).ok()?;
        // SAFETY: the handle came from dlopen and is never closed; `name` lives through the call.
        let found = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        (!found.is_null()).then_some(found)
    }

    fn lacks(&self, symbol: &str) -> LoadError {
        let Library { name, package, .. } = self;
        LoadError(format!(
            "{name} has no function {symbol}: it is too old, or something else; Ceph 15 or later is needed (Debian: \
             apt install {package})"
        ))
    }
}

/// The dynamic linker's text for its last error.
fn last_error() -> String {
    // SAFETY: dlerror returns null or a string that lives until this thread's next call of the dl functions.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "no reason given".to_string();
    }
    // SAFETY: as above; it is copied at once.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_named_with_its_package_and_the_fix() {
        let empty = tempfile::tempdir().unwrap();
        let Err(error) = Library::open(None, "librbd-that-is-not.so.1", "librbd1") else { panic!("it was found") };
        for part in ["librbd-that-is-not.so.1", "apt install librbd1", "--ceph-library-path"] {
            assert!(error.to_string().contains(part), "'{part}' is missing in: {error}");
        }
        let Err(error) = Api::load(Some(empty.path())) else { panic!("it was found") };
        for part in ["librados.so.2", "--ceph-library-path", "No such file"] {
            assert!(error.to_string().contains(part), "'{part}' is missing in: {error}");
        }
    }

    #[test]
    fn another_library_is_refused_by_what_it_lacks() {
        let library = Library::open(None, "libc.so.6", "librbd1").unwrap();
        let Err(error) = Rbd::find(&library) else { panic!("libc speaks RBD") };
        for part in ["libc.so.6", "rbd_version", "librbd1"] {
            assert!(error.to_string().contains(part), "'{part}' is missing in: {error}");
        }
    }
}
