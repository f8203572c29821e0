//! What a guest can provoke any number of is told a few times a second, and the rest is counted.

use std::time::{Duration, Instant};

/// Told in one second; more are counted and told with the next.
const MAX_PER_SECOND: u32 = 20;

/// Tells at most 20 a second and counts the rest.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    second: Option<Instant>,
    told: u32,
    /// Not told since the last one that was.
    pub(crate) suppressed: u64,
}

impl Throttle {
    /// `Some(n)`: tell this one, `n` were not told before it.
    pub(crate) fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.second.is_none_or(|second| now.saturating_duration_since(second) >= Duration::from_secs(1)) {
            (self.second, self.told) = (Some(now), 0);
        }
        if self.told == MAX_PER_SECOND {
            self.suppressed += 1;
            return None;
        }
        self.told += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_throttled_and_counted() {
        let mut throttle = Throttle::default();
        let now = Instant::now();
        let told = (0..100).filter(|_| throttle.admit(now).is_some()).count();
        assert_eq!(told, MAX_PER_SECOND as usize);
        assert_eq!(throttle.admit(now + Duration::from_secs(1)), Some(80));
        assert_eq!(throttle.admit(now + Duration::from_secs(1)), Some(0));
    }
}
