//! Fuzzes a front-end's reads of the configuration space.

use virtioblkd::internal::blk::features::read_config;

/// Runs one input: four bytes are the offset, four the size, and the rest is the configuration space.
pub fn run(data: &[u8]) {
    let [o0, o1, o2, o3, s0, s1, s2, s3, space @ ..] = data else { return };
    let offset = u32::from_le_bytes([*o0, *o1, *o2, *o3]);
    // The message layer refuses a larger read.
    let size = u32::from_le_bytes([*s0, *s1, *s2, *s3]) % 257;
    let answer = read_config(space, offset, size);
    assert_eq!(answer.len(), size as usize);
    // Front-ends count the offset in two different ways.
    let start = offset.checked_sub(0x100).unwrap_or(offset) as usize;
    for (at, byte) in answer.iter().enumerate() {
        let expected = space.get(start + at).copied().unwrap_or(0);
        assert_eq!(*byte, expected, "{offset} + {at}");
    }
}
