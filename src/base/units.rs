//! PURE. Parses times and sizes as people write them on a command line and in a configuration file.

use std::time::Duration;

/// The longest time that is accepted: a guest may wait for it.
const MAX_TIME: Duration = Duration::from_secs(3600);

/// Parses a time: a whole number and a unit (ms, s, m, min, h), from a millisecond to an hour. The error says what is
/// allowed.
pub fn time(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text);
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => return Err("a time is a whole number and a unit: 500ms, 5s, 2m, 1h".into()),
    };
    let total = number.parse::<u64>().ok().and_then(|number| number.checked_mul(milliseconds));
    match total.map(Duration::from_millis) {
        Some(time) if !time.is_zero() && time <= MAX_TIME => Ok(time),
        _ => Err(format!("a time is at least 1ms and at most {}h", MAX_TIME.as_secs() / 3600)),
    }
}

/// Parses a number of bytes, with or without a unit: K, M, G or T, powers of 1024 as in QEMU, also written KiB and so
/// on. The error says what is allowed.
pub fn bytes(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let unit = unit.strip_suffix("iB").unwrap_or(unit);
    let shift = match unit {
        "" | "B" => 0,
        "K" | "k" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("a size is a whole number of bytes, or one with a unit: 512K, 400M, 10G, 2T".into()),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| "a size is a whole number of bytes below 16 EiB: 1048576, 512K, 400M, 10G".into())
}

fn split(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units_and_limits() {
        let good = [("500ms", 500), ("5s", 5000), ("2m", 120_000), ("1min", 60_000), ("1h", 3_600_000)];
        for (text, milliseconds) in good {
            assert_eq!(time(text), Ok(Duration::from_millis(milliseconds)));
        }
        for text in
            ["", "5", "s", "-5s", "1.5s", "5 s", "5d", "0s", "61m", "99999999999999999999s", "18446744073709551615h"]
        {
            assert!(time(text).is_err(), "{text}");
        }
        assert!(time("5").unwrap_err().contains("500ms"));
    }

    #[test]
    fn sizes_may_have_units() {
        let good = [("0", 0), ("512", 512), ("4K", 4096), ("4k", 4096), ("400M", 400 << 20), ("1G", 1 << 30)];
        for (text, size) in good.into_iter().chain([("2T", 2 << 40), ("64KiB", 65536), ("1MiB", 1 << 20), ("7B", 7)]) {
            assert_eq!(bytes(text), Ok(size), "{text}");
        }
        for text in ["", "K", "-1", "1.5G", "1 G", "1X", "1GB", "1Gi", "16777216T", "18446744073709551616"] {
            let error = bytes(text).expect_err(text);
            assert!(error.contains("400M"), "{text}: {error}");
        }
    }
}
