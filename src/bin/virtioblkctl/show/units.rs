//! Times, sizes and counts for people.

pub(crate) use virtioblkd::internal::base::figures::{bytes, count};

/// `12 ms`, `3.4 s`, `12 min`, `3.5 h`, `9 days`.
pub(crate) fn time(milliseconds: u64) -> String {
    match milliseconds {
        0..=999 => format!("{milliseconds} ms"),
        1_000..=119_999 => format!("{:.1} s", milliseconds as f64 / 1e3),
        120_000..=7_199_999 => format!("{} min", milliseconds / 60_000),
        7_200_000..=172_799_999 => format!("{:.1} h", milliseconds as f64 / 3.6e6),
        _ => format!("{} days", milliseconds / 86_400_000),
    }
}

/// `12 us`, `1.5 ms`, and longer times as [`time`] has them.
pub(super) fn short_time(microseconds: u64) -> String {
    match microseconds {
        0..=999 => format!("{microseconds} us"),
        1_000..=999_999 => format!("{:.1} ms", microseconds as f64 / 1e3),
        _ => time(microseconds / 1000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_readable_units() {
        let times = [0, 999, 1000, 119_999, 120_000, 7_200_000, 864_000_000].map(time);
        assert_eq!(times, ["0 ms", "999 ms", "1.0 s", "120.0 s", "2 min", "2.0 h", "10 days"]);
        assert_eq!([12, 1500, 2_500_000, 0].map(short_time), ["12 us", "1.5 ms", "2.5 s", "0 us"]);
    }
}
