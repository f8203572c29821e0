//! What the device offers: the virtio feature bits and the configuration space, both computed from the cache policy and the
//! image's geometry. QEMU masks what the back-end does not offer, so these bits decide what the guest knows of its cache.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::backend::Geometry;
use crate::engine::CachePolicy;

/// The length in bytes of a virtio sector, whatever the logical block size (virtio 1.3, 5.2.4).
pub const SECTOR: u64 = 512;

/// The longest segment offered (SIZE_MAX), in bytes.
const SIZE_MAX: u32 = 4 << 20;

/// The most data segments offered for a request, whatever the ring's size: Linux's IOV_MAX, less header and status.
const MAX_SEGMENTS: u32 = 1022;

/// The ring size that the number of segments offered is computed from, unless rings are smaller: QEMU's default. A driver
/// without INDIRECT_DESC must fit a whole request into its ring.
const DEFAULT_RING_SIZE: u32 = 128;

/// VHOST_USER_F_PROTOCOL_FEATURES. No virtio feature, but it is sent with them.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

/// VHOST_F_LOG_ALL: the server logs what it writes to guest memory, for a live migration. No virtio feature either. Without
/// it QEMU refuses to migrate or save the guest.
pub const LOG_ALL: u64 = 1 << 26;

/// Whether the bit of this number is set in `features`.
pub fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// Whether a driver that acknowledged `acked` can flush.
pub fn driver_can_flush(acked: u64) -> bool {
    has(acked, VIRTIO_BLK_F_FLUSH)
}

/// The feature bits offered to the front-end.
///
/// FLUSH is offered exactly where the guest must see a write cache. CONFIG_WCE is never offered: so the guest cannot weaken
/// the policy, and a restarted server need not know what the guest chose.
pub fn offered(policy: CachePolicy, geometry: &Geometry) -> u64 {
    let mut bits = ALWAYS;
    if policy.guest_sees_write_cache() {
        bits |= 1 << VIRTIO_BLK_F_FLUSH;
    }
    if geometry.read_only {
        bits |= 1 << VIRTIO_BLK_F_RO;
    } else {
        bits |= geometry.discard.map_or(0, |_| 1 << VIRTIO_BLK_F_DISCARD);
        bits |= geometry.write_zeroes.map_or(0, |_| 1 << VIRTIO_BLK_F_WRITE_ZEROES);
    }
    bits
}

/// Whether a driver that acknowledged `acked` may make a request of `max_segments` that does not fit into a ring of `size`
/// descriptors. A request takes one descriptor for each segment, one for the header and one for the status, unless
/// indirect descriptors hold them.
pub fn may_overfill(acked: u64, size: u16, max_segments: u32) -> bool {
    has(acked, VIRTIO_BLK_F_SEG_MAX)
        && !has(acked, VIRTIO_RING_F_INDIRECT_DESC)
        && max_segments.saturating_add(2) > u32::from(size)
}

const ALWAYS: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_BLK_F_MQ
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_TOPOLOGY
    | LOG_ALL
    | PROTOCOL_FEATURES;

/// The bits that a front-end may acknowledge. More than [`offered`]: QEMU replays what the driver acknowledged before
/// a reconnect, and the server may have been restarted with another cache mode or discard setting. All of these bits are
/// served truthfully, whether offered or not.
pub fn acceptable() -> u64 {
    ALWAYS | 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_RO | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
}

/// `struct virtio_blk_config` up to and including write_zeroes_may_unmap (virtio 1.3, 5.2.4), little-endian.
/// `queue_size` is the largest ring that a front-end may set up.
pub fn config_space(policy: CachePolicy, geometry: &Geometry, num_queues: u16, queue_size: u16) -> [u8; 60] {
    let block = geometry.logical_block;
    let blocks = |bytes: u32| bytes / block;
    let mut space = [0; 60];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(geometry.size / SECTOR).to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &max_segments(queue_size).to_le_bytes());
    put(20, &block.to_le_bytes());
    let exponent = (geometry.physical_block.max(block) / block).ilog2();
    put(24, &[exponent as u8, blocks(geometry.alignment_offset).min(255) as u8]);
    put(26, &(blocks(geometry.min_io).min(u32::from(u16::MAX)) as u16).to_le_bytes());
    put(28, &blocks(geometry.opt_io).to_le_bytes());
    put(32, &[u8::from(policy.guest_sees_write_cache())]);
    put(34, &num_queues.to_le_bytes());
    if let Some(limits) = geometry.discard {
        put(36, &sectors(limits.max_bytes).to_le_bytes());
        put(40, &1u32.to_le_bytes());
        // QEMU's own disk gives its `discard_granularity` here (virtio_blk_update_config). Linux takes it for the queue's
        // discard_granularity (virtblk_read_limits); Windows' viostor, with 8 sectors as the least, for the optimal
        // granularity of UNMAP, which its defragmenter obeys.
        put(44, &(limits.granularity.max(block) / SECTOR as u32).to_le_bytes());
    }
    if let Some(limits) = geometry.write_zeroes {
        put(48, &sectors(limits.max_bytes).to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[u8::from(geometry.zeroes_may_unmap)]);
    }
    space
}

/// Returns the configuration space with the capacity of an image of `bytes`.
pub fn with_capacity(mut space: [u8; 60], bytes: u64) -> [u8; 60] {
    space[..8].copy_from_slice(&(bytes / SECTOR).to_le_bytes());
    space
}

/// Converts the longest range of a discard or write-zeroes to the 32-bit number of sectors that a request carries.
pub fn sectors(bytes: u64) -> u32 {
    u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX)
}

/// The number of data segments offered for a request: seg_max of the configuration space. `queue_size` is the largest ring
/// that a front-end may set up.
pub(in crate::virtio) fn max_segments(queue_size: u16) -> u32 {
    u32::from(queue_size).min(DEFAULT_RING_SIZE).saturating_sub(2).clamp(1, MAX_SEGMENTS)
}

/// The reply to GET_CONFIG: exactly `size` bytes from `offset`, with zeroes past the end of `space`. Some front-ends
/// (cloud-hypervisor) count from 0x100, where the space lies in the PCI legacy layout.
pub fn read_config(space: &[u8], offset: u32, size: u32) -> Vec<u8> {
    let start = if offset >= 0x100 { offset - 0x100 } else { offset } as usize;
    (start..start + size as usize).map(|at| space.get(at).copied().unwrap_or(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{DurableWrite, RangeLimits};
    use crate::engine::CacheMode;
    use virtio_bindings::virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;

    fn geometry() -> Geometry {
        Geometry {
            size: 10 << 20,
            logical_block: 512,
            physical_block: 4096,
            alignment_offset: 0,
            min_io: 4096,
            opt_io: 65536,
            read_only: false,
            discard: Some(RangeLimits { max_bytes: 1 << 30, granularity: 4096 }),
            write_zeroes: Some(RangeLimits { max_bytes: u64::MAX, granularity: 4096 }),
            zeroes_may_unmap: true,
            durable_write: DurableWrite::Native,
        }
    }

    #[test]
    fn flush_is_offered_in_write_back_modes_only() {
        for mode in CacheMode::ALL {
            let bits = offered(mode.into(), &geometry());
            let write_back = matches!(mode, CacheMode::None | CacheMode::Writeback | CacheMode::Unsafe);
            assert_eq!(has(bits, VIRTIO_BLK_F_FLUSH), write_back, "{mode}");
            assert!(!has(bits, VIRTIO_BLK_F_CONFIG_WCE), "{mode}: the guest cannot opt out");
            assert_eq!(config_space(mode.into(), &geometry(), 1, 128)[32], u8::from(write_back), "{mode}");
            assert_eq!(bits & !acceptable(), 0);
        }
    }

    #[test]
    fn a_read_only_image_offers_no_discard_and_no_write_zeroes() {
        let bits = offered(CacheMode::None.into(), &Geometry { read_only: true, ..geometry() });
        assert!(has(bits, VIRTIO_BLK_F_RO));
        assert!(!has(bits, VIRTIO_BLK_F_DISCARD) && !has(bits, VIRTIO_BLK_F_WRITE_ZEROES));
    }

    #[test]
    fn the_configuration_space_is_in_the_units_of_the_specification() {
        let geometry = Geometry { logical_block: 4096, physical_block: 4096, ..geometry() };
        let space = config_space(CacheMode::None.into(), &geometry, 4, 64);
        let le32 = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
        assert_eq!(u64::from_le_bytes(space[..8].try_into().unwrap()), (10 << 20) / 512, "capacity in sectors");
        assert_eq!(le32(12), 62, "seg_max fits the ring");
        assert_eq!(le32(20), 4096);
        assert_eq!((space[24], space[25]), (0, 0));
        assert_eq!(u16::from_le_bytes([space[26], space[27]]), 1, "min_io in logical blocks");
        assert_eq!(le32(28), 16, "opt_io in logical blocks");
        assert_eq!(u16::from_le_bytes([space[34], space[35]]), 4);
        assert_eq!(le32(36), 2 << 20, "discard in sectors");
        assert_eq!(le32(44), 8, "discard alignment in sectors");
        assert_eq!(le32(48), u32::MAX, "capped, not wrapped");
        assert_eq!(space[56], 1);
    }

    #[test]
    fn get_config_returns_exactly_what_was_asked() {
        let space = config_space(CacheMode::None.into(), &geometry(), 1, 128);
        assert_eq!(read_config(&space, 0, 96).len(), 96);
        assert_eq!(read_config(&space, 0x100, 8), space[..8]);
        assert_eq!(read_config(&space, 58, 4), [0; 4]);
        assert_eq!(read_config(&space, 200, 2), [0; 2]);
    }
}
