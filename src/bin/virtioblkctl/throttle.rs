//! `virtioblkctl throttle`: shows or changes the limits of a disk's rates while it is served, and in its configuration file.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, Value, json};
use virtioblkd::disk::ThrottleStatus;
use virtioblkd::engine::throttle::{Limits, Words};
use virtioblkd::internal::base::logging;
use virtioblkd::internal::config::limit;
use virtioblkd::internal::config::throttle_section::with_limits;
use virtioblkd::internal::control::CommandLine;
use virtioblkd::internal::control::client::{Client, Failure, REPLY_TIMEOUT};
use virtioblkd::internal::snapshot::USAGE;

use crate::chosen::path;

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
    let mut given = Vec::new();
    for word in words {
        if word == "none" {
            limits = Limits::default();
            given.clear();
            continue;
        }
        let (name, value) = word
            .split_once('=')
            .ok_or_else(|| usage(format!("'{word}' is no limit: use NAME=VALUE, such as total-iops-sec=500")))?;
        given.push((name.to_owned(), limit(name, value).map_err(usage)?));
    }
    limits.change(&given).map_err(usage)?;
    Ok(limits)
}

/// Shows or changes the limits. Returns those in effect. `control`: the daemon's control socket.
pub(crate) fn run(options: &Throttle, control: &Path, client: &mut Client) -> Result<Limits, Failure> {
    let limits = current(client)?;
    if options.limits.is_empty() {
        return Ok(limits);
    }
    let limits = changed(limits, &options.limits)?;
    set(client, &limits)?;
    match keep(client, &limits) {
        Ok(Some(file)) => logging::message(format_args!("{} keeps the limits for the next start", path(&file))),
        Ok(None) => logging::message(format_args!(
            "{}: the daemon was started without --config: start it with --throttle, else its next start has no limits",
            path(control)
        )),
        Err(why) => {
            logging::message(format_args!("{}: the limits are in effect until the next start: {why}", path(control)));
        }
    }
    Ok(limits)
}

/// Writes the limits into the daemon's configuration file. Returns its path; `None`: it has none.
fn keep(client: &mut Client, limits: &Limits) -> Result<Option<PathBuf>, String> {
    let line = client.execute("query-command-line", json!({}), REPLY_TIMEOUT).map_err(|failure| failure.message)?;
    let line: CommandLine = serde_json::from_value(line).map_err(|error| error.to_string())?;
    if values(&line.arguments, "throttle").next().is_some() {
        return Err("its command line has --throttle: change it there".into());
    }
    let Some(file) = values(&line.arguments, "config").next().map(|file| Path::new(&line.directory).join(file)) else {
        return Ok(None);
    };
    if is_hooks(&file) {
        return Err(format!(
            "libvirt's hook writes {} from the domain's metadata at each start. To keep them, use 'virtioblkctl \
             blkdeviotune DOMAIN DEVICE ... --live --config'",
            path(&file)
        ));
    }
    let failed = |error: std::io::Error| format!("{}: {error}", path(&file));
    let old = fs::read_to_string(&file).map_err(failed)?;
    let new = with_limits(&old, limits).map_err(|why| format!("{}: {why}", path(&file)))?;
    if new != old {
        replace(&file, &new).map_err(failed)?;
    }
    Ok(Some(file))
}

/// Whether libvirt's hook generates this configuration file: it lies in the run directory of root's hook, or of a user's.
fn is_hooks(file: &Path) -> bool {
    file.parent().and_then(Path::file_name).is_some_and(|directory| directory == "virtioblkd-libvirt")
}

/// Puts a new file with the same mode and owner in the place of a file, so that no reader finds half of it.
fn replace(file: &Path, text: &str) -> std::io::Result<()> {
    let file = fs::canonicalize(file)?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let new = file.with_file_name(format!(".{name}.{}", std::process::id()));
    let old = fs::metadata(&file)?;
    let written = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new).and_then(|mut created| {
        fchown(&created, Some(old.uid()), Some(old.gid()))?;
        created.set_permissions(old.permissions())?;
        created.write_all(text.as_bytes())?;
        created.sync_all()
    });
    written.and_then(|()| fs::rename(&new, &file)).inspect_err(|_| {
        // It may not exist.
        let _ = fs::remove_file(&new);
    })
}

/// The values that the arguments give to an option.
fn values<'a>(arguments: &'a [String], option: &'a str) -> impl Iterator<Item = &'a str> {
    arguments.iter().enumerate().filter_map(move |(at, word)| {
        let rest = word.strip_prefix("--")?.strip_prefix(option)?;
        match rest.strip_prefix('=') {
            Some(value) => Some(value),
            None if rest.is_empty() => arguments.get(at + 1).map(String::as_str),
            None => None,
        }
    })
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
        let after_none = changed(Limits::default(), &words("total-iops-sec=5 none read-iops-sec=5")).unwrap();
        assert_eq!(after_none.to_string(), "read-iops-sec=5");
        let first = changed(Limits::default(), &words("total-iops-sec=500 write-bytes-sec=10M")).unwrap();
        assert_eq!(first.to_string(), "write-bytes-sec=10485760, total-iops-sec=500");
        let next = changed(first, &words("read-iops-sec=5")).unwrap();
        assert_eq!(next.to_string(), "write-bytes-sec=10485760, read-iops-sec=5");
        assert_eq!(changed(next, &words("none")).unwrap(), Limits::default());
        for (text, reason) in [
            ("fast", "use NAME=VALUE"),
            ("total-iops=5", "nearest known one is 'total-iops-sec'"),
            ("foo=5", "the known ones are total-bytes-sec, total-bytes-sec-max, "),
            ("total-iops-sec=500 read-iops-sec=100", "exclude each other"),
            ("total-iops-sec=5K", "without a unit"),
            ("total-iops-sec-max=5", "needs total-iops-sec"),
            ("group-name=a", "not built yet"),
        ] {
            let error = changed(Limits::default(), &words(text)).unwrap_err();
            assert!(error.message.contains(reason) && error.code == USAGE, "{}", error.message);
        }
    }
}
