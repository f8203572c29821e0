//! The parsers of the options' values. Each error says what is allowed; clap puts the option and the value before it.

use std::time::Duration;

use log::LevelFilter;

use crate::backend::file::Locking;
use crate::backend::rbd::{Encryption, RbdLock, RbdName, RbdQuiesce};
use crate::backend::stable::StableWrites;
use crate::control::Access;
use crate::engine::throttle::{Limits, Words};
use crate::engine::{CacheMode, OnError};
use crate::sandbox::SandboxLevel;

/// A choice between two words, or a flag with a value. clap treats a plain `bool` as a flag without a value, so this is a
/// type of its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Switch(pub bool);

/// `raw`, the only format that is served.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawFormat;

/// Permission bits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode(pub u32);

/// The value of `--backend`. Sizes are in bytes.
#[derive(Clone, Debug)]
pub(super) enum Backend {
    File,
    Null(u64),
    Mem(u64),
    Slow { delay: Duration, forgets: bool },
}

/// The default size of `--backend null`.
const DEFAULT_NULL_SIZE: u64 = 1 << 30;
/// VIRTIO_BLK_ID_BYTES (virtio 1.3, 5.2.6).
const SERIAL_BYTES: usize = 20;
/// The unit of virtio-blk requests in bytes, which does not depend on the logical block size.
const SECTOR: u64 = 512;

fn switch(text: &str, on: &str, off: &str) -> Result<Switch, String> {
    match text {
        _ if text == on => Ok(Switch(true)),
        _ if text == off => Ok(Switch(false)),
        _ => Err(format!("use {on} or {off}")),
    }
}

pub(super) fn truth(text: &str) -> Result<Switch, String> {
    switch(text, "true", "false")
}

pub(super) fn discard(text: &str) -> Result<Switch, String> {
    switch(text, "unmap", "ignore")
}

pub(super) fn format(text: &str) -> Result<RawFormat, String> {
    match text {
        "raw" => Ok(RawFormat),
        other => Err(format!(
            "only raw images are served: convert it (qemu-img convert -f {other} -O raw IMAGE NEW) and serve NEW, with \
             --format raw or without"
        )),
    }
}

pub(super) fn locking(text: &str) -> Result<Locking, String> {
    match text {
        "auto" => Ok(Locking::Auto),
        "in-use" => Ok(Locking::InUse),
        "off" => Ok(Locking::Off),
        _ => Err("use auto, in-use or off".to_string()),
    }
}

pub(super) fn rbd_name(text: &str) -> Result<RbdName, String> {
    text.parse()
}

pub(super) fn ceph_user(text: &str) -> Result<String, String> {
    if text.is_empty() || text.starts_with("client.") || text.contains('\0') {
        return Err("use the name without 'client.', such as admin".to_string());
    }
    Ok(text.to_string())
}

pub(super) fn rbd_option(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.trim().is_empty() => {
            // Ceph accepts spaces and dashes in place of underscores.
            let name = name.trim().replace([' ', '-'], "_");
            Ok((name, value.trim().to_string()))
        }
        _ => Err("use OPTION=VALUE, such as rbd_cache_size=67108864".to_string()),
    }
}

pub(super) fn rbd_lock(text: &str) -> Result<RbdLock, String> {
    match text {
        "auto" => Ok(RbdLock::Auto),
        "exclusive" => Ok(RbdLock::Exclusive),
        "none" => Ok(RbdLock::None),
        _ => Err("use auto, exclusive or none".to_string()),
    }
}

pub(super) fn rbd_quiesce(text: &str) -> Result<RbdQuiesce, String> {
    match text {
        "on" => Ok(RbdQuiesce::On),
        "attended" => Ok(RbdQuiesce::Attended),
        "off" => Ok(RbdQuiesce::Off),
        _ => Err("use on, attended or off".to_string()),
    }
}

pub(super) fn rbd_encryption(text: &str) -> Result<Encryption, String> {
    match text {
        "luks" => Ok(Encryption::Luks),
        "luks1" => Ok(Encryption::Luks1),
        "luks2" => Ok(Encryption::Luks2),
        _ => Err("use luks, luks1 or luks2".to_string()),
    }
}

/// Parses `--rbd-quiesce-timeout`. The limit is below the 50 s that the cluster waits.
pub(super) fn quiesce_timeout(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(seconds) if (1..=45).contains(&seconds) => Ok(seconds),
        _ => Err("use a number of seconds from 1 to 45".to_string()),
    }
}

pub(super) fn control_access(text: &str) -> Result<Access, String> {
    text.parse()
}

pub(super) fn sandbox(text: &str) -> Result<SandboxLevel, String> {
    match text {
        "on" => Ok(SandboxLevel::On),
        "no-filter" => Ok(SandboxLevel::NoFilter),
        "off" => Ok(SandboxLevel::Off),
        _ => Err("use on, no-filter or off".to_string()),
    }
}

pub(super) fn cache(text: &str) -> Result<CacheMode, String> {
    text.parse()
}

pub(super) fn stable_writes(text: &str) -> Result<StableWrites, String> {
    text.parse()
}

pub(super) fn on_error(text: &str) -> Result<OnError, String> {
    text.parse()
}

/// One limit of `--throttle`.
#[derive(Clone, Debug)]
pub(super) struct Throttle {
    name: String,
    value: u64,
}

/// Parses one NAME=VALUE of `--throttle`.
pub(super) fn throttle(text: &str) -> Result<Throttle, String> {
    let (name, value) = text.split_once('=').ok_or("use NAME=VALUE, such as total-iops-sec=500")?;
    let value = limit(name, value)?;
    Ok(Throttle { name: name.to_owned(), value })
}

/// Parses the value of a limit with libvirt's word `name`. `virtioblkctl` uses this, too.
pub fn limit(name: &str, value: &str) -> Result<u64, String> {
    let names = Limits::names(Words::Libvirt);
    if name == "group-name" {
        return Err("group-name: limits that several disks share are not built yet; give each disk its own".into());
    }
    if !names.iter().any(|known| known == name) {
        return Err(match super::nearest(names.iter().map(String::as_str), &name.replace('_', "-")) {
            Some(nearest) => format!("there is no limit '{name}'; the nearest known one is '{nearest}'"),
            None => format!("there is no limit '{name}'; the known ones are {}", names.join(", ")),
        });
    }
    let is_bytes = name == "size-iops-sec" || name.contains("-bytes-") && !name.ends_with("-length");
    let number = if is_bytes { crate::base::units::bytes(value).ok() } else { value.parse().ok() };
    number.ok_or_else(|| match is_bytes {
        true => format!("{name} is a whole number of bytes, which may have a unit: 1048576, 512K, 10M"),
        false => format!("{name} is a whole number without a unit, such as 500"),
    })
}

/// The limits that are given together.
pub(super) fn limits(given: &[Throttle]) -> Result<Limits, String> {
    let mut limits = Limits::default();
    for (at, one) in given.iter().enumerate() {
        if given[..at].iter().any(|other| other.name == one.name) {
            return Err(format!("{} is given twice: keep one", one.name));
        }
        limits.set(Words::Libvirt, &one.name, one.value);
    }
    limits.check(Words::Libvirt)?;
    Ok(limits)
}

pub(super) fn mode(text: &str) -> Result<Mode, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let octal = digits.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    match u32::from_str_radix(digits, 8) {
        Ok(bits) if octal && bits <= 0o777 => Ok(Mode(bits)),
        _ => Err("use permission bits in octal, 0000 to 0777, such as 0660".to_string()),
    }
}

pub(super) fn fd(text: &str) -> Result<i32, String> {
    match text.parse() {
        Ok(fd) if fd > 2 => Ok(fd),
        _ => Err("use the number of an inherited listening socket, 3 or more".to_string()),
    }
}

pub(super) fn num_queues(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(queues) if (1..=256).contains(&queues) => Ok(queues),
        _ => Err("use a number from 1 to 256".to_string()),
    }
}

pub(super) fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size >= 2 && size.is_power_of_two() => Ok(size),
        _ => Err("use a power of two from 2 to 32768".to_string()),
    }
}

/// The longest time for which a queue may poll. An operator's commands wait for its end.
const MAX_POLL: Duration = Duration::from_millis(1);

pub(super) fn poll_max(text: &str) -> Result<Duration, String> {
    match text.parse().map(Duration::from_nanos) {
        Ok(limit) if limit <= MAX_POLL => Ok(limit),
        _ => Err(format!("use a number of nanoseconds from 0 (no polling) to {}", MAX_POLL.as_nanos())),
    }
}

pub(super) fn serial(text: &str) -> Result<String, String> {
    let printable = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    if text.len() > SERIAL_BYTES || !printable {
        return Err(format!("use at most {SERIAL_BYTES} printable ASCII characters (it has {} bytes)", text.len()));
    }
    Ok(text.to_string())
}

pub(super) fn logical_block_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("use 512 or 4096".to_string()),
    }
}

/// The largest discard granularity. One discard has at most 1 GiB, so the guest could never fill a larger unit.
const MAX_DISCARD_GRANULARITY: u64 = 1 << 30;

pub(super) fn discard_granularity(text: &str) -> Result<u32, String> {
    crate::base::units::bytes(text)
        .ok()
        .filter(|size| size.is_power_of_two() && (SECTOR..=MAX_DISCARD_GRANULARITY).contains(size))
        .and_then(|size| u32::try_from(size).ok())
        .ok_or_else(|| "use a power of two from 512 to 1G, such as 32K".to_string())
}

pub(super) fn log_level(text: &str) -> Result<LevelFilter, String> {
    match text {
        "error" => Ok(LevelFilter::Error),
        "warn" => Ok(LevelFilter::Warn),
        "info" => Ok(LevelFilter::Info),
        "debug" => Ok(LevelFilter::Debug),
        "trace" => Ok(LevelFilter::Trace),
        _ => Err("use error, warn, info, debug or trace".to_string()),
    }
}

pub(super) fn backend(text: &str) -> Result<Backend, String> {
    match text.split_once(':') {
        None if text == "file" => Ok(Backend::File),
        None if text == "null" => Ok(Backend::Null(DEFAULT_NULL_SIZE)),
        Some(("null", size)) => Ok(Backend::Null(disk_size(size)?)),
        Some(("mem", size)) => Ok(Backend::Mem(disk_size(size)?)),
        Some((name @ ("slow" | "forgetful"), delay)) => match delay.parse() {
            Ok(delay) => Ok(Backend::Slow { delay: Duration::from_millis(delay), forgets: name == "forgetful" }),
            Err(_) => Err("use slow:MS or forgetful:MS, a whole number of milliseconds".to_string()),
        },
        _ => Err("use file, null, null:SIZE, mem:SIZE, slow:MS or forgetful:MS".to_string()),
    }
}

/// Parses a disk's size: a multiple of 512 bytes, with K, M, G or T for powers of 1024. The error says what is allowed.
/// `virtioblkctl` uses this, too.
pub fn disk_size(text: &str) -> Result<u64, String> {
    crate::base::units::bytes(text)
        .ok()
        .filter(|size| *size > 0 && *size <= i64::MAX as u64 && size % SECTOR == 0)
        .ok_or_else(|| format!("'{text}' is not a valid size: use a multiple of {SECTOR} bytes, such as 64M or 1G"))
}
