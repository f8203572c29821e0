//! `virtioblkctl throttle`: shows or changes the limits of a disk's rates while it is served.

use clap::Args;
use serde_json::{Map, Value, json};
use virtioblkd::disk::ThrottleStatus;
use virtioblkd::engine::throttle::{Limits, Words};
use virtioblkd::internal::config::limit;
use virtioblkd::internal::control::client::{Client, Failure, REPLY_TIMEOUT};
use virtioblkd::internal::snapshot::USAGE;

#[derive(Args)]
pub(crate) struct Throttle {
    /// Limits as NAME=VALUE, such as total-iops-sec=500 read-bytes-sec=10M; 0 lifts one, and `none` lifts all. What is not
    /// named stays, but a total replaces reads and writes [default: print the limits]
    #[arg(value_name = "LIMIT")]
    limits: Vec<String>,
}

/// The limits of a disk.
pub(crate) fn current(client: &mut Client) -> Result<Limits, Failure> {
    let throttle: Option<ThrottleStatus> = client.query_status(REPLY_TIMEOUT)?.disk.throttle;
    Ok(throttle.unwrap_or_default().limits())
}

/// Replaces the limits of a disk.
pub(crate) fn set(client: &mut Client, limits: &Limits) -> Result<Value, Failure> {
    let arguments: Map<String, Value> =
        limits.values(Words::Qemu).into_iter().map(|(name, value)| (name, json!(value))).collect();
    client.execute("block_set_io_throttle", Value::Object(arguments), REPLY_TIMEOUT)
}

/// The limits after these words of a command line.
pub(crate) fn changed(mut limits: Limits, words: &[String]) -> Result<Limits, Failure> {
    let usage = |why: String| Failure::new(USAGE, why);
    for word in words {
        if word == "none" {
            limits = Limits::default();
            continue;
        }
        let (name, value) = word
            .split_once('=')
            .ok_or_else(|| usage(format!("'{word}' is no limit: use NAME=VALUE, such as total-iops-sec=500")))?;
        limits.change(name, limit(name, value).map_err(usage)?);
    }
    limits.check(Words::Libvirt).map_err(usage)?;
    Ok(limits)
}

/// Shows or changes the limits. Returns those in effect.
pub(crate) fn run(options: &Throttle, client: &mut Client) -> Result<Limits, Failure> {
    let limits = current(client)?;
    if options.limits.is_empty() {
        return Ok(limits);
    }
    let limits = changed(limits, &options.limits)?;
    set(client, &limits)?;
    Ok(limits)
}

/// The limits as lines.
pub(crate) fn readable(limits: &Limits) -> String {
    match limits.values(Words::Libvirt) {
        values if values.is_empty() => "no limits\n".into(),
        values => values.iter().map(|(name, value)| format!("{name:<28} {value}\n")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_change_what_they_name() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let first = changed(Limits::default(), &words("total-iops-sec=500 write-bytes-sec=10M")).unwrap();
        assert_eq!(first.to_string(), "write-bytes-sec=10485760, total-iops-sec=500");
        let next = changed(first, &words("read-iops-sec=5")).unwrap();
        assert_eq!(next.to_string(), "write-bytes-sec=10485760, read-iops-sec=5");
        assert_eq!(changed(next, &words("none")).unwrap(), Limits::default());
        for (text, reason) in [
            ("fast", "use NAME=VALUE"),
            ("total-iops=5", "nearest known one is 'total-iops-sec'"),
            ("total-iops-sec=5K", "without a unit"),
            ("total-iops-sec-max=5", "needs total-iops-sec"),
            ("group-name=a", "not built yet"),
        ] {
            let error = changed(Limits::default(), &words(text)).unwrap_err();
            assert!(error.message.contains(reason) && error.code == USAGE, "{}", error.message);
        }
    }
}
