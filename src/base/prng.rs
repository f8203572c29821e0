//! Numbers that look random and are the same at each run: for the RAM disk's order of completions, and for tests.

/// Xorshift: the same story for the same seed.
pub(crate) struct Prng(u64);

impl Prng {
    /// Seeds that are close to each other begin different stories.
    pub(crate) fn new(seed: u64) -> Self {
        Prng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}
