//! Times, sizes and counts for people.

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

/// `512 B`, `4.0 KiB`, `10 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut size = count as f64 / 1024.0;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < units.len() {
        size /= 1024.0;
        unit += 1;
    }
    if size < 10.0 { format!("{size:.1} {}", units[unit]) } else { format!("{size:.0} {}", units[unit]) }
}

/// `1 holder`, `2 holders`.
pub(crate) fn count(number: impl Into<u64>, noun: &str) -> String {
    match number.into() {
        1 => format!("1 {noun}"),
        number => format!("{number} {noun}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_readable_units() {
        let times = [0, 999, 1000, 119_999, 120_000, 7_200_000, 864_000_000].map(time);
        assert_eq!(times, ["0 ms", "999 ms", "1.0 s", "120.0 s", "2 min", "2.0 h", "10 days"]);
        let sizes = [0, 1023, 1024, 10 << 20, 10 << 30, u64::MAX].map(bytes);
        assert_eq!(sizes, ["0 B", "1023 B", "1.0 KiB", "10 MiB", "10 GiB", "16384 PiB"]);
        assert_eq!([12, 1500, 2_500_000, 0].map(short_time), ["12 us", "1.5 ms", "2.5 s", "0 us"]);
        assert_eq!([0_u64, 1, 2].map(|number| count(number, "hold")), ["0 holds", "1 hold", "2 holds"]);
    }
}
