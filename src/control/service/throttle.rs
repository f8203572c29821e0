//! How many of the disk's errors are told.

use std::time::{Duration, Instant};

/// Errors of the disk that are told in one second; more are counted and told with the next.
const MOST_ERRORS_PER_SECOND: u32 = 20;

/// Tells at most [`MOST_ERRORS_PER_SECOND`] and counts the rest.
#[derive(Default)]
pub(super) struct Throttle {
    second: Option<Instant>,
    told: u32,
    /// Not told since the last that was.
    pub(super) suppressed: u64,
}

impl Throttle {
    /// `Some(n)`: tell this one, `n` were not told before it.
    pub(super) fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.second.is_none_or(|second| now.saturating_duration_since(second) >= Duration::from_secs(1)) {
            (self.second, self.told) = (Some(now), 0);
        }
        if self.told == MOST_ERRORS_PER_SECOND {
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
        assert_eq!(told, MOST_ERRORS_PER_SECOND as usize);
        assert_eq!(throttle.admit(now + Duration::from_secs(1)), Some(80));
        assert_eq!(throttle.admit(now + Duration::from_secs(1)), Some(0));
    }
}
