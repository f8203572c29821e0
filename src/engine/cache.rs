//! The five cache modes as libvirt spells them, and the three booleans they mean (QEMU's `bdrv_parse_cache_mode`).
//!
//! [`CacheMode`] is matched in one place, [`CachePolicy::from`]. All other code asks the policy.

use std::fmt;
use std::str::FromStr;

/// The cache mode's name, as libvirt and QEMU spell it (`cache=` of `-drive`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CacheMode {
    /// O_DIRECT; a write is acknowledged when the host's device has it; the guest flushes.
    #[default]
    None,
    /// O_DIRECT; a write is acknowledged when durable.
    Directsync,
    /// The host's cache; a write is acknowledged when the cache has it; the guest flushes.
    Writeback,
    /// The host's cache; a write is acknowledged when durable.
    Writethrough,
    /// The host's cache; the guest's flushes are ignored. A crash of the host loses data.
    Unsafe,
}

impl CacheMode {
    /// Every mode, in the order of the README's table.
    pub const ALL: [CacheMode; 5] =
        [CacheMode::None, CacheMode::Directsync, CacheMode::Writeback, CacheMode::Writethrough, CacheMode::Unsafe];

    /// The name, as libvirt spells it.
    pub fn name(self) -> &'static str {
        match self {
            CacheMode::None => "none",
            CacheMode::Directsync => "directsync",
            CacheMode::Writeback => "writeback",
            CacheMode::Writethrough => "writethrough",
            CacheMode::Unsafe => "unsafe",
        }
    }
}

impl fmt::Display for CacheMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for CacheMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        CacheMode::ALL.into_iter().find(|mode| mode.name() == text).ok_or_else(|| {
            format!("unknown cache mode '{text}': use one of none, directsync, writeback, writethrough, unsafe")
        })
    }
}

/// What a mode means, as QEMU's three booleans. Made once from the mode and copied to wherever a decision is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CachePolicy {
    writeback: bool,
    direct: bool,
    no_flush: bool,
}

impl From<CacheMode> for CachePolicy {
    fn from(mode: CacheMode) -> Self {
        let (writeback, direct, no_flush) = match mode {
            CacheMode::None => (true, true, false),
            CacheMode::Directsync => (false, true, false),
            CacheMode::Writeback => (true, false, false),
            CacheMode::Writethrough => (false, false, false),
            CacheMode::Unsafe => (true, false, true),
        };
        CachePolicy { writeback, direct, no_flush }
    }
}

impl CachePolicy {
    /// Whether the image is opened past the host's page cache (O_DIRECT).
    pub fn opens_direct(self) -> bool {
        self.direct
    }

    /// Whether a write must be durable before it is acknowledged, given whether the driver negotiated
    /// VIRTIO_BLK_F_FLUSH. A driver that cannot flush is served write through (virtio 1.3, 5.2.6.2), except in
    /// `unsafe`, whose operator asked for no syncing at all. The driver's features can only strengthen the policy.
    pub fn syncs_each_write(self, driver_can_flush: bool) -> bool {
        !self.no_flush && (!self.writeback || !driver_can_flush)
    }

    /// Whether the guest's flush is acknowledged without a sync.
    pub fn ignores_flush(self) -> bool {
        self.no_flush
    }

    /// Whether the guest sees a volatile write cache: VIRTIO_BLK_F_FLUSH is offered. CONFIG_WCE never is.
    pub fn guest_sees_write_cache(self) -> bool {
        self.writeback
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_has_the_documented_policy() {
        // mode, direct, sync each write (driver flushes / does not), ignores flush, guest sees a write cache
        let table = [
            ("none", true, false, true, false, true),
            ("directsync", true, true, true, false, false),
            ("writeback", false, false, true, false, true),
            ("writethrough", false, true, true, false, false),
            ("unsafe", false, false, false, true, true),
        ];
        for (name, direct, with_flush, without_flush, ignores, sees) in table {
            let mode: CacheMode = name.parse().unwrap();
            assert_eq!(mode.to_string(), name);
            let policy = CachePolicy::from(mode);
            assert_eq!(policy.opens_direct(), direct, "{name}");
            assert_eq!(policy.syncs_each_write(true), with_flush, "{name}");
            assert_eq!(policy.syncs_each_write(false), without_flush, "{name}");
            assert_eq!(policy.ignores_flush(), ignores, "{name}");
            assert_eq!(policy.guest_sees_write_cache(), sees, "{name}");
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let message = "write-back".parse::<CacheMode>().unwrap_err();
        assert!(message.contains("write-back") && message.contains("writeback"));
    }
}
