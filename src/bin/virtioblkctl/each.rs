//! Runs commands for all disks of a domain (`--domain`).

use std::ffi::OsString;
use std::thread;

use serde_json::{Map, Value, json};
use virtioblkd::disk::CopyStatus;
use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::text::clean;
use virtioblkd::internal::control::client::{Client, Failure, REPLY_TIMEOUT};
use virtioblkd::internal::control::protocol::return_types::Quiesced;
use virtioblkd::internal::snapshot::USAGE;

use crate::chosen::{Disks, target};
use crate::{
    Answer, ChangeCopy, Cli, Copies, CtlCommand, Quiesce, Resize, Resume, Stats, answer, arguments, change_copy,
    error_json, hold, json_page, parse, print, resumed, show, watch,
};

/// Runs the command for each disk. The exit status is 1 if it failed for one of them.
pub(crate) fn run(cli: &Cli, disks: &Disks) -> Result<u8, Failure> {
    let one_disk = |why: &str| {
        let names: Vec<&str> = disks.disks.iter().map(|(name, _)| name.as_str()).collect();
        Err(Failure::new(USAGE, format!("{why}: give --control with one of {}", names.join(", "))))
    };
    match &cli.command {
        CtlCommand::Resize(Resize { size: Some(_), .. }) => {
            return one_disk("resize with a SIZE changes one disk, because disks of a domain differ in size");
        }
        CtlCommand::Resize(Resize { force: true, .. }) => {
            return one_disk("resize --force may cut a disk, so it is for one disk");
        }
        CtlCommand::Stats(Stats { interval: Some(_), .. }) => {
            return one_disk("stats with an INTERVAL shows one disk");
        }
        CtlCommand::Watch => return watch::run_several(disks, cli.json),
        CtlCommand::Copies(Copies { change: Some(change) }) => return change_copies(cli, disks, change),
        CtlCommand::Quiesce(options) if !options.command.is_empty() => return hold_all(disks, options),
        CtlCommand::Quiesce(options) => return quiesce(cli, disks, options),
        CtlCommand::Resume(options) => return resume(cli, disks, options),
        _ => {}
    }
    let mut replies = Replies::default();
    for (name, control) in &disks.disks {
        let done = Client::connect(control).and_then(|client| answer(cli, control, client));
        match done {
            Ok(Answer::Text(text)) if cli.json => {
                replies.by_disk.insert(name.clone(), serde_json::from_str(&text).unwrap_or(Value::Null));
            }
            Ok(Answer::Text(text)) => print(&format!("{}:\n{text}", clean(name)))?,
            Ok(Answer::Status(own)) => replies.status = replies.status.max(own),
            Err(failure) => replies.add_failure(name, &failure),
        }
    }
    replies.finish(cli.json)
}

/// The replies of several disks' daemons to one command.
#[derive(Default)]
struct Replies {
    /// For `--json`, by the disk's name.
    by_disk: Map<String, Value>,
    /// The exit status.
    status: u8,
}

impl Replies {
    /// Reports that the command failed for this disk. The others' commands are run all the same.
    fn add_failure(&mut self, name: &str, failure: &Failure) {
        logging::message(format_args!("{name}: {failure}"));
        self.by_disk.insert(name.to_owned(), error_json(failure));
        self.status = 1;
    }

    /// Prints the replies if they are wanted as JSON. Returns the exit status.
    fn finish(self, json: bool) -> Result<u8, Failure> {
        if json {
            print(&json_page(&Value::Object(self.by_disk)))?;
        }
        Ok(self.status)
    }
}

/// Runs a command while all disks are held: the command under the first disk's hold holds the second, and so on. Each of
/// these processes passes the command's status on as a success only if its own hold lasted as long.
fn hold_all(disks: &Disks, options: &Quiesce) -> Result<u8, Failure> {
    let own = std::env::current_exe()
        .map_err(|error| Failure::new("command", format!("cannot find this program's own file: {error}")))?;
    let wanted = arguments(options);
    let who = wanted["who"].as_str().unwrap_or_default();
    let milliseconds = |time: std::time::Duration| format!("{}ms", time.as_millis());
    let mut command = options.command.clone();
    for (_, control) in disks.disks.iter().skip(1).rev() {
        let mut outer: Vec<OsString> = vec![own.clone().into(), "--control".into(), control.into(), "quiesce".into()];
        outer.extend(["--timeout".into(), milliseconds(options.timeout).into()]);
        outer.extend(["--lease".into(), milliseconds(options.lease).into()]);
        outer.extend(["--who".into(), who.into(), "--".into()]);
        outer.append(&mut command);
        command = outer;
    }
    let (_, first) = disks.disks.first().ok_or_else(|| Failure::new(USAGE, "there is no disk to hold"))?;
    hold::run(Client::connect(first)?, wanted.clone(), options.timeout, options.lease, &command)
}

/// Holds all disks. They are all held at one instant, or none is.
fn quiesce(cli: &Cli, disks: &Disks, options: &Quiesce) -> Result<u8, Failure> {
    let wanted = arguments(options);
    let ask = |control: &std::path::Path| {
        let mut client = Client::connect(control)?;
        let reply = client.execute("quiesce", wanted.clone(), options.timeout + REPLY_TIMEOUT)?;
        let held: Quiesced = parse(reply.clone())?;
        Ok((client, held, reply))
    };
    let asked: Vec<Result<(Client, Quiesced, Value), Failure>> = thread::scope(|scope| {
        let threads: Vec<_> = disks.disks.iter().map(|(_, control)| scope.spawn(|| ask(control))).collect();
        threads.into_iter().map(|one| one.join().expect("asking does not panic")).collect()
    });
    let mut holds = Vec::new();
    let mut failed = None;
    for ((name, _), one) in disks.disks.iter().zip(asked) {
        match one {
            Ok((client, held, reply)) => holds.push((name, client, held, reply)),
            Err(failure) => failed = Some(Failure::new(&failure.code, format!("{name}: {failure}"))),
        }
    }
    // A daemon that still knows its token has held its disk since it replied. So all were held when the last one replied.
    for (name, client, held, _) in &mut holds {
        let renewal = json!({"token": held.token, "lease-ms": wanted["lease-ms"]});
        if let (None, Err(failure)) = (&failed, client.execute("renew-lease", renewal, REPLY_TIMEOUT)) {
            failed = Some(Failure::new(&failure.code, format!("{name}: {failure}")));
        }
    }
    if let Some(failure) = failed {
        for (_, client, held, _) in &mut holds {
            let _ = client.execute("resume", json!({"token": held.token}), REPLY_TIMEOUT);
        }
        return Err(failure);
    }
    if cli.json {
        let all: Map<String, Value> = holds.into_iter().map(|(name, _, _, reply)| (name.clone(), reply)).collect();
        print(&json_page(&Value::Object(all)))?;
        return Ok(0);
    }
    for (name, _, held, _) in &holds {
        let shorter = hold::shorter(options.lease, held.lease_ms);
        logging::message(format_args!("the disk {name} is held{shorter}: {}", show::figures(&held.figures)));
    }
    let tokens: Vec<String> =
        holds.iter().map(|(name, _, held, _)| format!("{}={}", target(name), clean(&held.token))).collect();
    print(&format!("{}\n", tokens.join(",")))?;
    Ok(0)
}

/// Ends holds by the tokens that `quiesce` printed: `vda=TOKEN,vdb=TOKEN`.
fn resume(cli: &Cli, disks: &Disks, options: &Resume) -> Result<u8, Failure> {
    let pairs = match &options.token {
        None => Vec::new(),
        Some(tokens) => {
            by_target(disks, tokens, "give the tokens as 'quiesce --domain' printed them: vda=TOKEN,vdb=TOKEN")?
        }
    };
    let mut replies = Replies::default();
    for (name, control) in &disks.disks {
        let token = pairs.iter().find(|(of, _)| *of == target(name)).map(|(_, token)| *token);
        let wanted = match (token, options.all) {
            (Some(token), _) => json!({"token": token}),
            (None, true) => json!({"all": true}),
            (None, false) => continue,
        };
        match Client::connect(control).and_then(|mut client| client.execute("resume", wanted, REPLY_TIMEOUT)) {
            Ok(done) if cli.json => {
                replies.by_disk.insert(name.clone(), done);
            }
            Ok(done) => print(&format!("{}: {}", clean(name), resumed(&parse(done)?)))?,
            Err(failure) => replies.add_failure(name, &failure),
        }
    }
    replies.finish(cli.json)
}

/// Reads `vda=X,vdb=Y`: a word for each of some disks, by its target. `form` says what to give instead of anything else.
fn by_target<'a>(disks: &Disks, text: &'a str, form: &str) -> Result<Vec<(&'a str, &'a str)>, Failure> {
    let pair = |pair: &'a str| pair.split_once('=').ok_or_else(|| Failure::new(USAGE, form));
    let pairs: Vec<(&str, &str)> = text.split(',').map(pair).collect::<Result<_, _>>()?;
    match pairs.iter().find(|(of, _)| disks.disks.iter().all(|(name, _)| target(name) != *of)) {
        Some((unknown, _)) => {
            Err(Failure::new(USAGE, format!("the domain has no disk '{unknown}' that virtioblkd serves here")))
        }
        None => Ok(pairs),
    }
}

/// Cancels or limits copies of several disks. Each daemon numbers its own, so a name alone may be of several.
fn change_copies(cli: &Cli, disks: &Disks, change: &ChangeCopy) -> Result<u8, Failure> {
    let named = change.copy();
    let found;
    let pairs = match named.contains('=') {
        true => by_target(disks, named, "give the copies as vda=COPY,vdb=COPY")?,
        false => {
            found = disk_of_copy(disks, named)?;
            vec![(target(&found), named)]
        }
    };
    let mut replies = Replies::default();
    for (of, copy) in pairs {
        let Some((name, control)) = disks.disks.iter().find(|(name, _)| target(name) == of) else { continue };
        match Client::connect(control).and_then(|mut client| change_copy(&mut client, change, copy)) {
            Ok(reply) => {
                replies.by_disk.insert(name.clone(), reply);
            }
            Err(failure) => replies.add_failure(name, &failure),
        }
    }
    replies.finish(cli.json)
}

/// Returns the name of the only disk that has a copy of this name.
fn disk_of_copy(disks: &Disks, copy: &str) -> Result<String, Failure> {
    let mut found: Vec<&str> = Vec::new();
    for (name, control) in &disks.disks {
        let reply =
            Client::connect(control).and_then(|mut client| client.execute("query-copies", json!({}), REPLY_TIMEOUT));
        let copies: Vec<CopyStatus> =
            parse(reply.map_err(|failure| Failure::new(&failure.code, format!("{name}: {failure}")))?)?;
        found.extend(copies.iter().any(|one| one.copy == copy).then_some(name.as_str()));
    }
    match found.as_slice() {
        [name] => Ok((*name).to_owned()),
        [] => {
            Err(Failure::new("no-such-copy", format!("no disk has a copy '{copy}': 'virtioblkctl copies' shows them")))
        }
        several => {
            let words: Vec<String> = several.iter().map(|name| format!("{}={copy}", target(name))).collect();
            Err(Failure::new(
                USAGE,
                format!("several disks have a copy '{copy}': name them, as in {}", words.join(",")),
            ))
        }
    }
}
