//! `stats INTERVAL`: a line for each interval, with the rates and latencies in it.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use virtioblkd::disk::LatencyHistogram;
use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::text::clean_json;
use virtioblkd::internal::base::units;
use virtioblkd::internal::control::client::{Client, Failure, REPLY_TIMEOUT, parse};
use virtioblkd::internal::control::protocol::return_types::Stats;

use crate::{print, watch};

/// The lines after which the headings are repeated.
const LINES_PER_HEADING: u64 = 20;
/// How wide each column of numbers is.
const WIDTH: usize = 6;

/// Parses an interval: a whole number of seconds, or a time with its unit.
pub(crate) fn interval(text: &str) -> Result<Duration, String> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    units::time(&if is_number { format!("{text}s") } else { text.to_owned() })
}

/// Prints a line for each interval; `count`: how many, or else until the process is ended. Goes on with the next daemon
/// after a restart.
pub(crate) fn run(
    path: &Path,
    mut client: Client,
    interval: Duration,
    count: Option<u64>,
    json: bool,
) -> Result<u8, Failure> {
    let (mut before, mut began) = (query(&mut client)?, Instant::now());
    let mut lines = 0;
    let mut shown = Columns::default();
    while count.is_none_or(|count| lines < count) {
        thread::sleep(interval);
        let now = match query(&mut client) {
            Ok(now) => now,
            Err(_) => {
                client = watch::reconnect(path)?;
                logging::message("connected to another daemon");
                (before, began) = (query(&mut client)?, Instant::now());
                continue;
            }
        };
        let rates = Rates::between(&before, &now, began.elapsed());
        (before, began) = (now, Instant::now());
        if json {
            print(&format!("{}\n", clean_json(&rates.json().to_string())))?;
        } else {
            if lines % LINES_PER_HEADING == 0 {
                shown = Columns::used_by(&before);
                print(&shown.heading())?;
            }
            print(&shown.line(&rates))?;
        }
        lines += 1;
    }
    Ok(0)
}

fn query(client: &mut Client) -> Result<Stats, Failure> {
    let stats = parse(client.execute("query-stats", json!({}), REPLY_TIMEOUT)?)?;
    // Events are not shown here, and must not pile up.
    while client.has_more() {
        client.next(Some(Instant::now()))?;
    }
    Ok(stats)
}

/// The rate of a kind of request in an interval.
struct Rate {
    /// Requests a second.
    requests: f64,
    /// Bytes a second.
    bytes: f64,
    /// What they took in the interval.
    latency: LatencyHistogram,
}

/// What a disk did in an interval.
struct Rates {
    read: Rate,
    write: Rate,
    flush: Rate,
    /// Discards and write-zeroes.
    discard: Rate,
    in_flight: u64,
    held: bool,
    limited: bool,
    stalled: u64,
    stopped: bool,
}

impl Rates {
    /// PURE. The counters of a disk whose daemon was restarted in between begin anew: then the rate is 0.
    fn between(before: &Stats, now: &Stats, time: Duration) -> Rates {
        let seconds = time.as_secs_f64().max(1e-3);
        let rate = |before: u64, now: u64| now.saturating_sub(before) as f64 / seconds;
        let (old, new) = (&before.total, &now.total);
        let (earlier, later) = (&before.latency.request, &now.latency.request);
        let mut discards = later.discard.since(&earlier.discard);
        discards.accumulate(&later.write_zeroes.since(&earlier.write_zeroes));
        Rates {
            read: Rate {
                requests: rate(old.reads, new.reads),
                bytes: rate(old.read_bytes, new.read_bytes),
                latency: later.read.since(&earlier.read),
            },
            write: Rate {
                requests: rate(old.writes, new.writes),
                bytes: rate(old.written_bytes, new.written_bytes),
                latency: later.write.since(&earlier.write),
            },
            flush: Rate {
                requests: rate(old.flushes, new.flushes),
                bytes: 0.0,
                latency: later.flush.since(&earlier.flush),
            },
            discard: Rate {
                requests: rate(old.discards, new.discards) + rate(old.write_zeroes, new.write_zeroes),
                bytes: 0.0,
                latency: discards,
            },
            in_flight: new.in_flight,
            held: now.rings.iter().any(|ring| ring.held),
            limited: now.rings.iter().any(|ring| ring.limited),
            stalled: new.stalled,
            stopped: new.kept > 0,
        }
    }

    fn state(&self) -> &'static str {
        match (self.stopped, self.stalled > 0, self.held, self.limited) {
            (true, ..) => "STOPPED",
            (_, true, ..) => "STALLED",
            (_, _, true, _) => "held",
            (.., true) => "limited",
            _ => "",
        }
    }

    fn json(&self) -> Value {
        let rate = |rate: &Rate| {
            let quantile = |share| rate.latency.quantile(share).map(|time| time.as_nanos() as u64);
            json!({
                "requests-per-second": rate.requests,
                "bytes-per-second": rate.bytes,
                "p50-ns": quantile(0.5),
                "p99-ns": quantile(0.99),
            })
        };
        json!({
            "read": rate(&self.read),
            "write": rate(&self.write),
            "flush": rate(&self.flush),
            "discard": rate(&self.discard),
            "in-flight": self.in_flight,
            "held": self.held,
            "limited": self.limited,
            "stalled": self.stalled,
            "stopped": self.stopped,
        })
    }
}

/// Which kinds of requests have columns: those that the guest has used. All together fit 100 columns.
#[derive(Default)]
struct Columns {
    flush: bool,
    discard: bool,
}

impl Columns {
    fn used_by(stats: &Stats) -> Columns {
        let total = &stats.total;
        Columns { flush: total.flushes > 0, discard: total.discards > 0 || total.write_zeroes > 0 }
    }

    fn heading(&self) -> String {
        let mut names = vec!["depth", "r/s", "rMB/s", "r-p50", "r-p99", "w/s", "wMB/s", "w-p50", "w-p99"];
        names.extend(if self.flush { &["f/s", "f-p99"][..] } else { &[] });
        names.extend(if self.discard { &["d/s"][..] } else { &[] });
        joined("UTC", names.into_iter().map(str::to_owned), "state")
    }

    fn line(&self, rates: &Rates) -> String {
        let mut cells = vec![rates.in_flight.to_string()];
        for rate in [&rates.read, &rates.write] {
            let at = |share| latency(rate.latency.quantile(share));
            cells.extend([number(rate.requests), number(rate.bytes / 1e6), at(0.5), at(0.99)]);
        }
        if self.flush {
            cells.extend([number(rates.flush.requests), latency(rates.flush.latency.quantile(0.99))]);
        }
        if self.discard {
            cells.push(number(rates.discard.requests));
        }
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let clock = format!("{:02}:{:02}:{:02}", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        joined(&clock, cells.into_iter(), rates.state())
    }
}

fn joined(first: &str, cells: impl Iterator<Item = String>, last: &str) -> String {
    let cells: String = cells.map(|cell| format!(" {cell:>WIDTH$}")).collect();
    format!("{}\n", format!("{first:<8}{cells} {last}").trim_end())
}

/// A rate in at most [`WIDTH`] characters, as far as it is below a million.
fn number(rate: f64) -> String {
    if rate == 0.0 || rate >= 99.95 { format!("{rate:.0}") } else { format!("{rate:.1}") }
}

/// A latency in at most [`WIDTH`] characters; `-`: none.
pub(crate) fn latency(time: Option<Duration>) -> String {
    let Some(time) = time else { return "-".to_owned() };
    let us = time.as_secs_f64() * 1e6;
    match us {
        us if us < 9.95 => format!("{us:.1}us"),
        us if us < 999.5 => format!("{us:.0}us"),
        us if us < 9950.0 => format!("{:.1}ms", us / 1e3),
        us if us < 999_500.0 => format!("{:.0}ms", us / 1e3),
        us if us < 9.95e6 => format!("{:.1}s", us / 1e6),
        us => format!("{:.0}s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(value: Value) -> Stats {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn an_interval_has_its_rates_and_latencies_within_100_columns() {
        let times =
            |count: u64| json!({"sum-ns": count * 40_000, "boundaries": [32_000, 40_000], "bins": [0, count, 0]});
        let kinds = |n: u64| json!({"read": times(n), "write": times(n), "flush": times(n), "discard": times(n)});
        let at = |n: u64| {
            let total = json!({"reads": n, "read-bytes": n << 20, "writes": n, "written-bytes": n << 20, "flushes": n,
                "discards": n, "in-flight": 7});
            stats(json!({"total": total, "latency": {"request": kinds(n)}, "rings": [{"held": true}]}))
        };
        let (before, now) = (at(100), at(200_100));
        let rates = Rates::between(&before, &now, Duration::from_secs(2));
        let columns = Columns::used_by(&now);
        let (heading, line) = (columns.heading(), columns.line(&rates));
        let words: Vec<&str> = line.split_whitespace().skip(1).collect();
        let expected = ["7", "100000", "104858", "40us", "40us", "100000", "104858", "40us", "40us"];
        assert_eq!(words[..9], expected, "{line}");
        assert_eq!(words[9..], ["100000", "40us", "100000", "held"], "{line}");
        assert_eq!(heading.split_whitespace().count(), 14, "{heading}");
        let longest = line.len() + "STALLED".len() - "held".len();
        assert!(heading.len() <= 101 && longest <= 101, "{heading}{line}");
        assert_eq!(rates.json()["read"]["p99-ns"], 40_000);
        // A guest that neither flushes nor discards.
        let few = stats(json!({}));
        assert!(!Columns::used_by(&few).heading().contains("f/s"));
        let idle = Columns::default().line(&Rates::between(&now, &few, Duration::ZERO));
        assert_eq!(idle.split_whitespace().skip(1).collect::<Vec<_>>(), ["0", "0", "0", "-", "-", "0", "0", "-", "-"]);
    }

    #[test]
    fn intervals_are_seconds_or_have_a_unit() {
        assert_eq!(interval("1"), Ok(Duration::from_secs(1)));
        assert_eq!(interval("500ms"), Ok(Duration::from_millis(500)));
        assert!(interval("0").is_err() && interval("").is_err() && interval("fast").is_err());
    }

    #[test]
    fn latencies_and_rates_are_short() {
        let times =
            [0, 1250, 9_960, 56_000, 1_500_000, 32_000_000, 1_500_000_000, 67_108_864_000].map(Duration::from_nanos);
        let shown = times.map(|time| latency(Some(time)));
        assert_eq!(shown, ["0.0us", "1.2us", "10us", "56us", "1.5ms", "32ms", "1.5s", "67s"]);
        assert_eq!([0.0, 0.5, 99.96, 123_456.0].map(number), ["0", "0.5", "100", "123456"]);
    }
}
