//! The buckets do what QEMU's documentation (docs/throttle.txt) and its `tests/unit/test-throttle.c` say.

use super::*;

const SECOND: u64 = 1_000_000_000;

fn limits(values: &[(&str, u64)]) -> Limits {
    let mut limits = Limits::default();
    for (name, value) in values {
        assert!(limits.set(Words::Libvirt, name, *value), "{name}");
    }
    limits
}

fn throttle(values: &[(&str, u64)]) -> Throttle {
    let limits = limits(values);
    assert_eq!(limits.check(Words::Libvirt), Ok(()));
    Throttle::new(limits, 0)
}

/// How many requests of `bytes` a single virtqueue gets through until `end`.
fn admitted(throttle: &mut Throttle, direction: Direction, bytes: u64, from: u64, end: u64) -> u64 {
    let (mut now, mut count) = (from, 0);
    loop {
        now = throttle.take(direction, bytes, now).at;
        if now >= end {
            return count;
        }
        count += 1;
    }
}

#[test]
fn the_average_is_kept_to_the_request() {
    let mut one = throttle(&[("total-iops-sec", 100)]);
    // A tenth of a second's worth goes at once; one more, because a request goes while the level is not above the size.
    assert_eq!(admitted(&mut one, Direction::Read, 4096, 0, 1), 11);
    let mut ten_seconds = throttle(&[("total-iops-sec", 100)]);
    assert_eq!(admitted(&mut ten_seconds, Direction::Write, 4096, 0, 10 * SECOND), 1000 + 10);
    let mut bytes = throttle(&[("write-bytes-sec", 1 << 20)]);
    let requests = admitted(&mut bytes, Direction::Write, 4096, 0, 10 * SECOND);
    assert!((2560..=2560 + 27).contains(&requests), "{requests}");
    assert_eq!(bytes.take(Direction::Read, 1 << 30, 10 * SECOND).at, 10 * SECOND, "reads are not limited");
}

#[test]
fn the_burst_of_the_documentation_lasts_63_seconds() {
    let values = [("total-iops-sec", 100), ("total-iops-sec-max", 2000), ("total-iops-sec-max-length", 60)];
    let mut burst = throttle(&values);
    let count = |throttle: &mut Throttle, from: u64, to: u64| {
        admitted(throttle, Direction::Read, 4096, from * SECOND, to * SECOND)
    };
    // 2000 a second while the bucket of 120000 fills, out of which 100 a second leak: 63 s. Then 100 a second.
    let first = count(&mut burst, 0, 64);
    assert!((126_300..=126_500).contains(&first), "{first}");
    let later = count(&mut burst, 64, 74);
    assert!((995..=1005).contains(&later), "{later}");
    // An idle minute leaves room for 6000 requests of another burst.
    let idle = count(&mut burst, 134, 136);
    assert!((4000..=4210).contains(&idle), "{idle}");
}

#[test]
fn a_burst_without_a_length_is_one_seconds_worth_at_any_rate() {
    let mut burst = throttle(&[("read-iops-sec", 10), ("read-iops-sec-max", 200)]);
    assert_eq!(admitted(&mut burst, Direction::Read, 512, 0, 1), 201);
}

#[test]
fn half_an_operation_too_many_waits_for_half_its_time() {
    let mut bucket = Bucket { level: 155 * NANO / 10, burst_level: 0 };
    let rate = Rate { average: 150, max: 15, max_length: 1 };
    assert_eq!(bucket.wait(&rate), (SECOND / 150 / 2) + 1);
    bucket.leak(&rate, SECOND / 150);
    assert_eq!(bucket.wait(&rate), 0);
    // 2.1 s at the burst's rate go without a wait, then the average holds.
    let (rate, mut bucket) = (Rate { average: 10, max: 200, max_length: 2 }, Bucket::default());
    for tenth in 0..22 {
        bucket.add(&rate, 20 * NANO);
        bucket.leak(&rate, SECOND / 10);
        assert_eq!(bucket.wait(&rate), if tenth < 21 { 0 } else { 18 * SECOND / 10 }, "{tenth}");
    }
}

#[test]
fn large_requests_count_as_several_operations() {
    let mut sized = throttle(&[("total-iops-sec", 10), ("size-iops-sec", 4096)]);
    let counted = |throttle: &mut Throttle, bytes| {
        let before = throttle.buckets[3].level;
        throttle.take(Direction::Write, bytes, 0);
        throttle.buckets[3].level - before
    };
    assert_eq!(counted(&mut sized, 512), NANO);
    assert_eq!(counted(&mut sized, 4096), NANO);
    assert_eq!(counted(&mut sized, 6144), NANO * 3 / 2);
    assert_eq!(counted(&mut sized, 8192), NANO * 2);
}

#[test]
fn what_is_given_back_before_its_time_was_never_taken() {
    let mut throttle = throttle(&[("total-iops-sec", 1)]);
    throttle.take(Direction::Write, 512, 0);
    let before = throttle.clone();
    let slot = throttle.take(Direction::Write, 512, 0);
    assert_eq!(slot.at, 9 * SECOND / 10);
    throttle.give_back(slot, 0);
    assert_eq!(throttle, before);
    let slot = throttle.take(Direction::Read, 512, 0);
    throttle.give_back(slot, slot.at);
    let again = throttle.take(Direction::Read, 512, slot.at);
    assert_eq!(again.at, slot.at + SECOND, "its time came, so it stays counted");
}

#[test]
fn a_clock_that_steps_back_delays_nothing() {
    let mut throttle = throttle(&[("total-iops-sec", 100)]);
    throttle.take(Direction::Read, 512, 1000);
    assert_eq!(throttle.take(Direction::Read, 512, 999).at, 999);
}

#[test]
fn the_largest_values_do_not_overflow() {
    let mut largest = throttle(&[
        ("total-bytes-sec", MAX_VALUE),
        ("total-iops-sec", MAX_VALUE / 2),
        ("total-iops-sec-max", MAX_VALUE / 2),
        ("total-iops-sec-max-length", 2),
        ("size-iops-sec", MAX_VALUE),
    ]);
    for now in [0, 1, u64::MAX / 2, u64::MAX - 1, u64::MAX] {
        largest.take(Direction::Write, u64::MAX, now);
    }
    let mut slow = throttle(&[("total-bytes-sec", 1)]);
    slow.take(Direction::Write, u64::MAX, 0);
    assert_eq!(slow.take(Direction::Write, 1, 0).at, u64::MAX);
}

#[test]
fn the_rules_are_those_of_qemu() {
    let refused: [(&[(&str, u64)], &str); 9] = [
        (&[("total-bytes-sec", 1), ("read-bytes-sec", 1)], "total-bytes-sec and read-bytes-sec exclude each other"),
        (&[("total-iops-sec", 1), ("write-iops-sec", 1)], "total-iops-sec and write-iops-sec exclude each other"),
        (&[("total-iops-sec-max", 1)], "total-iops-sec-max needs total-iops-sec"),
        (&[("read-iops-sec", 100), ("read-iops-sec-max", 30)], "read-iops-sec-max is lower than read-iops-sec"),
        (&[("read-iops-sec", 1), ("read-iops-sec-max-length", 2)], "read-iops-sec-max-length needs read-iops-sec-max"),
        (&[("write-bytes-sec", MAX_VALUE + 1)], "may be at most"),
        (
            &[("write-bytes-sec", 1), ("write-bytes-sec-max", 3), ("write-bytes-sec-max-length", MAX_VALUE / 2)],
            "write-bytes-sec-max-length is too large",
        ),
        (&[("size-iops-sec", 4096), ("total-bytes-sec", 1)], "size-iops-sec needs a limit of operations"),
        (&[("size-iops-sec", MAX_VALUE + 1), ("total-iops-sec", 1)], "size-iops-sec is larger"),
    ];
    for (values, text) in refused {
        let error = limits(values).check(Words::Libvirt).expect_err(text);
        assert!(error.contains(text), "{error}");
    }
    let allowed: [&[(&str, u64)]; 4] = [
        &[],
        &[("read-bytes-sec", 1), ("write-bytes-sec", 1), ("total-iops-sec", 1)],
        &[("total-iops-sec", MAX_VALUE), ("total-iops-sec-max", MAX_VALUE), ("total-iops-sec-max-length", 1)],
        &[("write-bytes-sec", 1), ("write-bytes-sec-max", 2), ("write-bytes-sec-max-length", MAX_VALUE / 2)],
    ];
    for values in allowed {
        assert_eq!(limits(values).check(Words::Libvirt), Ok(()), "{values:?}");
    }
}

#[test]
fn a_total_replaces_reads_and_writes_and_zero_lifts_a_limit_with_its_burst() {
    let mut one = limits(&[("read-iops-sec", 5), ("read-iops-sec-max", 9), ("total-bytes-sec", 7)]);
    let mut change = |given: &[(&str, u64)]| {
        let given: Vec<_> = given.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        one.change(&given).map(|()| one.to_string())
    };
    assert_eq!(change(&[("total-iops-sec", 3)]).unwrap(), "total-bytes-sec=7, total-iops-sec=3");
    assert!(change(&[("iops", 3)]).unwrap_err().contains("no limit 'iops'"));
    let both = change(&[("total-iops-sec", 500), ("read-iops-sec", 100)]);
    assert!(both.unwrap_err().contains("total-iops-sec and read-iops-sec exclude each other"));
    let next = change(&[("write-bytes-sec", 2), ("size-iops-sec", 4096)]);
    assert_eq!(next.unwrap(), "write-bytes-sec=2, total-iops-sec=3, size-iops-sec=4096");
    let other = change(&[("total-iops-sec", 0), ("read-iops-sec", 4)]);
    assert_eq!(other.unwrap(), "write-bytes-sec=2, read-iops-sec=4, size-iops-sec=4096");
    assert_eq!(change(&[("read-iops-sec", 0), ("write-bytes-sec", 0)]).unwrap(), "no limits");
    let first = change(&[("size-iops-sec", 4096), ("read-bytes-sec", 5), ("total-iops-sec", 5)]);
    assert_eq!(first.unwrap(), "read-bytes-sec=5, total-iops-sec=5, size-iops-sec=4096");
}

#[test]
fn names_are_libvirts_and_qemus() {
    let names = Limits::names(Words::Libvirt);
    assert_eq!(names.len(), 19);
    assert_eq!(names[..3], ["total-bytes-sec", "total-bytes-sec-max", "total-bytes-sec-max-length"]);
    assert_eq!(Limits::names(Words::Qemu)[10..12], ["iops_max", "iops_max_length"]);
    for words in [Words::Libvirt, Words::Qemu] {
        let mut limits = Limits::default();
        let names = Limits::names(words);
        for (at, name) in names.iter().enumerate() {
            assert!(limits.set(words, name, at as u64 + 1));
        }
        assert_eq!(limits.values(words), names.into_iter().zip(1..).collect::<Vec<_>>());
        assert!(!limits.set(words, "total", 1));
    }
    assert!(!limits(&[("total-iops-sec", 1)]).is_split() && limits(&[("read-iops-sec", 1)]).is_split());
    assert!(!Limits::default().is_limited() && limits(&[("write-bytes-sec", 1)]).is_limited());
}
