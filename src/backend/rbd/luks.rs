//! UNSAFE. Images that librbd encrypts itself (LUKS).
#![allow(unsafe_code)]

use std::ffi::{c_char, c_void};

use super::super::Errno;
use super::Encryption;
use super::handle::{Image, check};
use super::sys::{self, rbd_encryption_format_t};

/// Loads the encryption, through which the image is then read and written. Takes seconds. After an error the image must be
/// closed, because librbd would read and write it without encryption. EPERM: the passphrase is wrong. EINVAL: the image has
/// another format. ENOTSUP: this librbd does not support encryption.
pub(super) fn load(image: &Image, format: Encryption, passphrase: &[u8]) -> Result<(), Errno> {
    const UNKNOWN: Errno = Errno(libc::ENOTSUP);
    let (luks1, luks2) = (sys::RBD_ENCRYPTION_FORMAT_LUKS1, sys::RBD_ENCRYPTION_FORMAT_LUKS2);
    match format {
        Encryption::Luks1 => load_as(image, luks1, passphrase),
        Encryption::Luks2 => load_as(image, luks2, passphrase),
        // Before Ceph 17 librbd does not detect the format.
        Encryption::Luks => match load_either(image, passphrase) {
            Err(UNKNOWN) => match load_as(image, luks2, passphrase) {
                Err(Errno(libc::EINVAL)) => load_as(image, luks1, passphrase),
                result => result,
            },
            result => result,
        },
    }
}

fn load_as(image: &Image, format: rbd_encryption_format_t, passphrase: &[u8]) -> Result<(), Errno> {
    // The algorithm matters only for formatting; loading reads it from the header. LUKS2's structure is the same.
    let mut options = sys::rbd_encryption_luks1_format_options_t {
        alg: sys::RBD_ENCRYPTION_ALGORITHM_AES256,
        passphrase: passphrase.as_ptr().cast::<c_char>(),
        passphrase_size: passphrase.len(),
    };
    call(image, format, (&raw mut options).cast(), size_of_val(&options))
}

fn load_either(image: &Image, passphrase: &[u8]) -> Result<(), Errno> {
    let mut options = sys::rbd_encryption_luks_format_options_t {
        passphrase: passphrase.as_ptr().cast::<c_char>(),
        passphrase_size: passphrase.len(),
    };
    call(image, sys::RBD_ENCRYPTION_FORMAT_LUKS, (&raw mut options).cast(), size_of_val(&options))
}

/// Calls `rbd_encryption_load`. `options` points to the structure of `format`, which has `size` bytes.
fn call(image: &Image, format: rbd_encryption_format_t, options: *mut c_void, size: usize) -> Result<(), Errno> {
    let load = image.api.rbd.rbd_encryption_load.ok_or(Errno(libc::ENOTSUP))?;
    // SAFETY: the image is open; the callers' structures, and the passphrase that they point to, live through the call.
    check(unsafe { load(image.raw, format, options, size) })
}
