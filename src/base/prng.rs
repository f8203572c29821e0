//! Pseudo-random numbers that are the same in each run: for the RAM disk's order of completions, and for tests.

/// A xorshift generator: the same seed gives the same sequence.
pub(crate) struct Prng(u64);

impl Prng {
    /// Starts the sequence of `seed`. Seeds that are close to each other give different sequences.
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
