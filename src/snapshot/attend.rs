//! `virtioblkctl attend`: freezes a guest for snapshots that another client takes of its disks' images (`rbd snap
//! create`, Cinder, `rbd group snap create`), with the levels, the agent, the hooks and the guard of `snapshot`.
//!
//! One process attends all disks of one guest. Each daemon sends `PREPARE` before it closes its gate, and `RELEASED`
//! when the gate is open again. The first `PREPARE` freezes the guest, for all disks; the last `RELEASED` thaws it. So
//! no freeze waits for a disk that is held already, and no thaw precedes the resume of the last disk.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::agent::AgentError;
use super::disks::image_path;
use super::freeze::{FreezeOptions, Freezer};
use super::guest::Guest;
use super::hooks;
use super::plan::{self, Consistency};
use super::receipt::Receipt;
use super::wait::{WaitEnd, wait};
use crate::base::figures::count;
use crate::base::rate_limit::LogLimit;
use crate::base::signals::Signals;
use crate::base::systemd;
use crate::control::client::{Client, Failure, Message, REPLY_TIMEOUT};

/// A daemon that sends more messages than this at once is treated as lost, so that it delays no other.
const MAX_MESSAGES_PER_TURN: usize = 1000;
/// The time between two attempts to reach a daemon whose connection was lost.
const RECONNECT_INTERVAL: Duration = Duration::from_secs(1);
/// How long a daemon may take when it is reached again. Other daemons may send `PREPARE` meanwhile.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// After this time the guard thaws a frozen guest, whatever the daemons send.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(90);
/// How long this process waits at its end for the running snapshots, because a thaw waits for held disks. librbd
/// releases them 10 s after its consent at the latest.
const END_TIMEOUT: Duration = Duration::from_secs(15);
/// How much longer the daemon waits than a freeze may take.
const FREEZE_MARGIN: Duration = Duration::from_secs(1);

/// The options of `virtioblkctl attend`.
#[derive(Clone, Debug)]
pub struct AttendPlan {
    /// The control sockets of all disks of the guest.
    pub disks: Vec<PathBuf>,
    /// The level to reach.
    pub level: Consistency,
    /// The agent that freezes the guest's filesystems.
    pub agent: Option<plan::AgentAddress>,
    /// The directory of the host's hooks.
    pub hooks: Option<PathBuf>,
    /// Consent to snapshots also if the level is not reached.
    pub or_weaker: bool,
    /// How long the guest's freeze, its thaw, and each hook may take.
    pub timeout: Duration,
}

impl AttendPlan {
    fn check(&self) -> Result<(), Failure> {
        let usage = |why: String| Failure::new(super::USAGE, why);
        plan::check_disks(&self.disks)
            .and_then(|()| plan::check_agent(self.level, self.agent.as_ref()))
            .map_err(usage)?;
        if self.level == Consistency::Crash && self.hooks.is_none() {
            let why = "level crash without --hooks freezes nothing: the disks are held still without an attendant, too";
            return Err(usage(why.into()));
        }
        if let Some(directory) = &self.hooks {
            hooks::check(directory).map_err(|why| Failure::new("hook", why))?;
        }
        Ok(())
    }

    /// Returns how long a reply to `PREPARE` may take: a hook, a freeze, and the thaw of a freeze that failed.
    fn allowed(&self) -> Duration {
        self.timeout * if self.hooks.is_some() { 3 } else { 2 } + FREEZE_MARGIN
    }
}

/// Attends until SIGINT, SIGTERM or SIGHUP, which are blocked in this thread from now on. Calls `report` with the
/// receipt of each freeze. Fails if a disk cannot be attended from the start, or a guest could not be thawed.
pub fn attend(plan: &AttendPlan, report: impl Fn(&Receipt)) -> Result<(), Failure> {
    plan.check()?;
    let failed = |error: std::io::Error| Failure::new("internal", format!("signals cannot be caught: {error}"));
    let signals = Signals::block().map_err(failed)?;
    if let Some(at) = plan.agent.as_ref().filter(|_| plan.level > Consistency::Crash)
        && let Err(error @ (AgentError::Silent(_) | AgentError::Lost(_))) =
            Guest::new(at, RECONNECT_TIMEOUT).ping(Some(signals.as_fd()))
    {
        // The guest may start later.
        let what = if plan.or_weaker { "crash consistent" } else { "refused" };
        crate::base::logging::message(format_args!("{error}. Until that works snapshots are {what}"));
    }
    let disks = plan.disks.iter().map(|control| AttendedDisk::new(control.clone())).collect();
    let mut attendant = Attendant { plan, signals, disks, round: None, ending: None, thawed: Ok(()), report: &report };
    for at in 0..attendant.disks.len() {
        attendant.register(at, REPLY_TIMEOUT)?;
    }
    crate::base::logging::message(format_args!(
        "attending {}, level {}",
        count(plan.disks.len() as u64, "disk"),
        plan.level.name()
    ));
    systemd::systemd("READY=1");
    attendant.serve()
}

/// One disk of the guest, and the connection to its daemon.
struct AttendedDisk {
    control: PathBuf,
    /// The image's file or device, for hooks.
    image: Option<PathBuf>,
    /// `None`: the connection to its daemon is lost.
    client: Option<Client>,
    retry: Instant,
    /// The ids of the `PREPARE`s for which the daemon has not sent `RELEASED`.
    asked: BTreeSet<u64>,
}

impl AttendedDisk {
    fn new(control: PathBuf) -> Self {
        AttendedDisk { control, image: None, client: None, retry: Instant::now(), asked: BTreeSet::new() }
    }
}

/// A freeze, whose result is the reply to every `PREPARE` until the thaw.
struct FreezeRound {
    freezer: Freezer,
    /// The result, which is the reply to each `PREPARE`.
    outcome: Result<(), String>,
    since: Instant,
}

struct Attendant<'a> {
    plan: &'a AttendPlan,
    signals: Signals,
    disks: Vec<AttendedDisk>,
    round: Option<FreezeRound>,
    /// A signal arrived: this process ends after the running round, at this time at the latest.
    ending: Option<Instant>,
    /// The last failure to thaw.
    thawed: Result<(), Failure>,
    report: &'a dyn Fn(&Receipt),
}

impl Attendant<'_> {
    fn serve(mut self) -> Result<(), Failure> {
        loop {
            systemd::flush();
            self.listen();
            self.thaw_if_over();
            if self.ending.is_some_and(|until| self.round.is_none() || until <= Instant::now()) {
                // A snapshot that takes too long may still run: its disks are held, and the thaw waits for them.
                self.thaw();
                return self.thawed;
            }
            let fds: Vec<BorrowedFd<'_>> =
                self.disks.iter().filter_map(|disk| disk.client.as_ref().map(AsFd::as_fd)).collect();
            match wait(&fds, Some(self.signals.as_fd()), self.next_deadline()) {
                Ok(WaitEnd::Cancelled) => self.stop()?,
                Ok(WaitEnd::Ready(_)) => {}
                Ok(WaitEnd::TimedOut) => self.retry(),
                Err(error) => return Err(Failure::new("internal", format!("poll: {error}"))),
            }
        }
    }

    fn next_deadline(&self) -> Instant {
        let retries = self.disks.iter().filter(|disk| disk.client.is_none()).map(|disk| disk.retry);
        // systemd may not have been notified yet.
        let far = Instant::now() + Duration::from_secs(if systemd::pending().is_some() { 1 } else { 3600 });
        retries.chain(self.ending).chain([far]).min().unwrap_or(far)
    }

    /// Connects to the disk's daemon and registers as its attendant. Errors name the disk.
    fn register(&mut self, at: usize, timeout: Duration) -> Result<(), Failure> {
        let plan = self.plan;
        let disk = &mut self.disks[at];
        let blame = |why: Failure| {
            Failure::new(&why.code, format!("the disk behind '{}' cannot be attended: {why}", disk.control.display()))
        };
        let mut client = Client::connect_within(&disk.control, timeout).map_err(blame)?;
        let status = client.query_status(timeout).map_err(blame)?;
        let who = format!("virtioblkctl attend, level {}", plan.level.name());
        let allowed = plan.allowed().as_millis() as u64;
        let arguments = json!({"required": !plan.or_weaker, "timeout-ms": allowed, "who": who});
        client.execute("attend", arguments, timeout).map_err(blame)?;
        disk.image = image_path(&status.disk);
        disk.client = Some(client);
        Ok(())
    }

    /// Connects again to the daemons whose connection was lost, but not while a guest is frozen, because a daemon that
    /// hangs takes time.
    fn retry(&mut self) {
        for at in 0..self.disks.len() {
            let disk = &self.disks[at];
            if disk.client.is_some() || disk.retry > Instant::now() {
                continue;
            }
            if self.round.is_none() && self.ending.is_none() && self.register(at, RECONNECT_TIMEOUT).is_ok() {
                print_limited(format_args!("'{}' is back and attended again", self.disks[at].control.display()));
            }
            self.disks[at].retry = Instant::now() + RECONNECT_INTERVAL;
        }
    }

    /// Handles all messages of the daemons.
    fn listen(&mut self) {
        for at in 0..self.disks.len() {
            let mut messages = 0;
            while let Some(client) = &mut self.disks[at].client {
                messages += 1;
                if messages > MAX_MESSAGES_PER_TURN {
                    let desc = format!("'{}' sends events without end", self.disks[at].control.display());
                    self.lose(at, &Failure::new("not-virtioblkd", desc));
                    break;
                }
                match client.try_next() {
                    Ok(Some(Message::Event(event))) => self.event(at, &event),
                    Ok(Some(Message::Reply(Ok(_)))) => {}
                    Ok(Some(Message::Reply(Err(failure)))) => self.print_failure(at, &failure),
                    Ok(None) => break,
                    Err(lost) => self.lose(at, &lost),
                }
            }
        }
    }

    fn event(&mut self, at: usize, event: &Value) {
        let Some(id) = event["data"]["id"].as_u64() else { return };
        match event["event"].as_str() {
            Some("PREPARE") => {
                self.disks[at].asked.insert(id);
                self.prepare(at, id);
            }
            Some("RELEASED") => {
                self.disks[at].asked.remove(&id);
            }
            _ => {}
        }
    }

    /// Freezes the guest, unless it is frozen already, and replies to a `PREPARE`.
    fn prepare(&mut self, at: usize, id: u64) {
        if self.ending.is_some() {
            return self.reply(at, json!({"id": id, "error": "virtioblkctl attend is ending"}));
        }
        let is_first = self.round.is_none();
        if is_first {
            self.round = Some(self.freeze());
        }
        let Some(round) = &mut self.round else { return };
        // It was frozen for another disk; check that it still is.
        if !is_first && round.outcome.is_ok() {
            round.outcome = round.freezer.is_frozen_still(Some(self.signals.as_fd())).map_err(|why| why.message);
        }
        let reply = match &round.outcome {
            Ok(()) => json!({"id": id, "level": round.freezer.level.name()}),
            Err(why) => json!({"id": id, "error": why}),
        };
        self.reply(at, reply);
        if is_first && let Some(round) = &mut self.round.as_mut().filter(|round| round.outcome.is_err()) {
            // Undo the part of the freeze that succeeded. Until all disks are released each `PREPARE` gets the same
            // reply.
            round.freezer.thaw();
        }
    }

    fn freeze(&self) -> FreezeRound {
        let plan = self.plan;
        let mut freezer = Freezer::new(FreezeOptions {
            level: plan.level,
            agent: plan.agent.clone(),
            hooks: plan.hooks.clone(),
            or_weaker: plan.or_weaker,
            timeout: plan.timeout,
            silence: FREEZE_TIMEOUT,
        });
        let since = Instant::now();
        freezer.receipt.instant = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let disks = self.disks.iter().map(|disk| (disk.control.as_path(), disk.image.as_deref()));
        let environment = hooks::environment(disks, plan.level);
        let cancel = Some(self.signals.as_fd());
        let outcome =
            freezer.start(environment).and_then(|()| freezer.freeze(cancel)).map_err(|failure| failure.message);
        if let Err(why) = &outcome {
            freezer.warn(format!("not prepared: {why}"));
        }
        FreezeRound { freezer, outcome, since }
    }

    fn reply(&mut self, at: usize, arguments: Value) {
        if let Some(client) = &mut self.disks[at].client
            && let Err(lost) = client.send("prepared", arguments)
        {
            self.lose(at, &lost);
        }
    }

    /// Records that the connection to a daemon is lost. The daemon then holds nothing for us any more.
    fn lose(&mut self, at: usize, lost: &Failure) {
        let disk = &mut self.disks[at];
        disk.client = None;
        disk.asked.clear();
        disk.retry = Instant::now();
        if self.ending.is_none() {
            print_limited(format_args!("{lost}; looking for it every second"));
        }
    }

    fn print_failure(&self, at: usize, failure: &Failure) {
        print_limited(format_args!("'{}': {failure}", self.disks[at].control.display()));
    }

    fn thaw_if_over(&mut self) {
        if self.disks.iter().all(|disk| disk.asked.is_empty()) {
            self.thaw();
        }
    }

    fn thaw(&mut self) {
        let Some(FreezeRound { mut freezer, outcome, since }) = self.round.take() else { return };
        let was_frozen = freezer.thaw();
        if outcome.is_ok() {
            if let Err(failure) = freezer.record_thaw(was_frozen) {
                freezer.warn(format!("THE SNAPSHOT IS CRASH CONSISTENT AT MOST: {}", failure.message));
                freezer.level = Consistency::Crash;
            }
            let seconds = since.elapsed().as_secs_f64();
            print_limited(format_args!("thawed after {seconds:.1} s, level {}", freezer.level.name()));
        }
        self.thawed = match freezer.is_undone() {
            true => Ok(()),
            false => Err(Failure::new("frozen", "the guest may be frozen still; the guard process retries the thaw")),
        };
        let mut receipt = freezer.receipt.clone();
        receipt.level = if outcome.is_ok() { freezer.level.name() } else { "none" };
        (self.report)(&receipt);
    }

    /// Handles a signal. The first one ends the registrations, and this process waits for the running round. The second
    /// one ends this process at once, and the guard thaws the guest.
    fn stop(&mut self) -> Result<(), Failure> {
        let failed = |error: std::io::Error| Failure::new("internal", format!("signals cannot be read: {error}"));
        while self.signals.next().map_err(failed)?.is_some() {}
        if self.ending.is_some() {
            let text = "interrupted again: ended at once, the guard thaws the guest if it is frozen";
            return Err(Failure::new("interrupted", text));
        }
        self.ending = Some(Instant::now() + END_TIMEOUT);
        for at in 0..self.disks.len() {
            if let Some(client) = &mut self.disks[at].client
                && let Err(lost) = client.send("unattend", json!({}))
            {
                self.lose(at, &lost);
            }
        }
        if self.round.is_some() {
            crate::base::logging::message(format_args!("ending when the running snapshot is over"));
        }
        Ok(())
    }
}

/// Prints a line, with a limit on the rate, because daemons, the agent or other users of the image can cause it any
/// number of times.
fn print_limited(line: std::fmt::Arguments<'_>) {
    static LINES: LogLimit = LogLimit::new();
    if let Some(line) = LINES.admit(line, Instant::now()) {
        crate::base::logging::message(format_args!("{line}"));
    }
}
