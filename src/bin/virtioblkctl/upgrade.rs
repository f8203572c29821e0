//! The subcommand `upgrade`: starts another virtioblkd that takes the guest over from the one that runs.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use virtioblkd::client::{Client, Failure, PATIENCE};
use virtioblkd::logging;

use crate::duration;

#[derive(Args)]
pub struct Upgrade {
    /// The new program [default: the path that the running one was started from, which may be another file by now]
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// Give up, and let the running daemon serve on, if the new one has not taken over by then
    #[arg(long, value_name = "TIME", default_value = "2min", value_parser = duration)]
    timeout: Duration,
    /// Options of virtioblkd that replace the running one's, such as `--cache writeback`; all others stay as they are
    #[arg(last = true, value_name = "OPTIONS")]
    options: Vec<String>,
}

/// Options that exclude others: a new one replaces those, too.
const EXCLUDES: [(&str, &[&str]); 5] = [
    ("--rbd", &["--blk-file", "--backend"]),
    ("--blk-file", &["--rbd"]),
    ("--backend", &["--rbd"]),
    ("--socket-path", &["--fd"]),
    ("--fd", &["--socket-path", "--socket-mode", "--socket-group"]),
];

/// Starts the new daemon and waits until it has taken over. Returns its figures.
pub fn run(options: &Upgrade, control: &Path, mut client: Client) -> Result<Value, Failure> {
    let line = client.ask("query-command-line", json!({}), PATIENCE)?;
    let text = |name: &str| line[name].as_str().unwrap_or_default().to_owned();
    let old: Vec<String> =
        line["arguments"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
    drop(client);
    let program = options.binary.clone().unwrap_or_else(|| text("program").into());
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Failure::new("upgrade", format!("{what} '{}': {error}; the running daemon serves on", program.display()))
    };
    let (program_path, control) = match (std::path::absolute(&program), std::path::absolute(control)) {
        (Ok(program), Ok(control)) => (program, control),
        (Err(error), _) | (_, Err(error)) => return Err(failed("cannot find", &error)),
    };
    let mut command = Command::new(program_path);
    command.args(replace(old, &options.options)).arg("--take-over").arg(control).current_dir(text("directory"));
    if let Some(socket) = line["notify-socket"].as_str() {
        command.env("NOTIFY_SOCKET", socket);
    }
    // Its log is for whoever looks at us, until it goes on with the other's.
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(|error| failed("cannot start", &error))?;
    let heard = hear(&mut child, options.timeout);
    match heard {
        Ok(Some(figures)) => Ok(figures),
        Ok(None) => {
            let status = child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
            Err(failed("no upgrade to", &format!("it did not take over ({status}); it says above why")))
        }
        Err(RecvTimeoutError::Timeout) => {
            // Ours to end: it is not waited for, so its number is still its own.
            if let Err(error) = child.kill().and_then(|()| child.wait()) {
                logging::say(format_args!("the new daemon (pid {}) cannot be ended: {error}", child.id()));
            }
            Err(failed("no upgrade to", &"it did not take over in time (--timeout) and was ended"))
        }
        Err(RecvTimeoutError::Disconnected) => Err(failed("no upgrade to", &"its output cannot be read")),
    }
}

/// The line that a daemon prints when it has taken over; `None`: something else, or nothing.
fn hear(child: &mut Child, patience: Duration) -> Result<Option<Value>, RecvTimeoutError> {
    let Some(output) = child.stdout.take() else { return Ok(None) };
    let (sender, line) = channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(output).read_line(&mut line);
        // After its time nobody waits.
        let _ = sender.send(read.map(|_| line).unwrap_or_default());
    });
    let line = line.recv_timeout(patience)?;
    let said: Option<Value> = serde_json::from_str(&line).ok();
    Ok(said.and_then(|mut said| said.get_mut("took-over").map(Value::take)))
}

/// The old arguments, but for the options that are among the new ones; then the new ones. An option is a word that begins
/// with two dashes, and what follows up to the next one is its value.
fn replace(old: Vec<String>, new: &[String]) -> Vec<String> {
    let name = |word: &str| word.starts_with("--").then(|| word.split('=').next().unwrap_or(word).to_owned());
    let mut replaced: Vec<String> = new.iter().filter_map(|word| name(word)).collect();
    for (_, excluded) in
        EXCLUDES.iter().filter(|(option, _)| new.iter().any(|word| name(word).as_deref() == Some(option)))
    {
        replaced.extend(excluded.iter().map(|option| (*option).to_owned()));
    }
    let mut dropping = false;
    let kept = old.into_iter().filter(|word| {
        if let Some(option) = name(word) {
            dropping = replaced.contains(&option);
        }
        !dropping
    });
    kept.chain(new.iter().cloned()).collect()
}

/// For people.
pub fn readable(figures: &Value) -> String {
    let milliseconds = |name: &str| figures[name].as_f64().unwrap_or_default() / 1000.0;
    format!(
        "upgraded: the guest was paused for {:.1} ms, {:.1} ms of it until its requests were answered\n",
        milliseconds("pause-us"),
        milliseconds("drained-us")
    )
}

#[cfg(test)]
mod tests {
    use super::replace;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn new_options_replace_old_ones_however_they_are_written() {
        let cases = [
            ("--cache none --blk-file a", "--cache unsafe", "--blk-file a --cache unsafe"),
            ("--cache=none --blk-file a", "--cache unsafe", "--blk-file a --cache unsafe"),
            ("--read-only --cache none", "--read-only=false", "--cache none --read-only=false"),
            ("--blk-file a --serial x", "--rbd p/i", "--serial x --rbd p/i"),
            ("--blk-file a --backend slow:1", "--backend slow:2", "--blk-file a --backend slow:2"),
            ("--fd 3 --cache none", "--socket-path s", "--cache none --socket-path s"),
            ("--copy-dir a --copy-dir b --cache none", "--copy-dir c", "--cache none --copy-dir c"),
            ("--cache-x y --cache none", "--cache unsafe", "--cache-x y --cache unsafe"),
            ("--cache none", "", "--cache none"),
        ];
        for (old, new, wanted) in cases {
            assert_eq!(replace(words(old), &words(new)), words(wanted), "{old} with {new}");
        }
    }
}
