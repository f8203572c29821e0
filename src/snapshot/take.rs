//! Takes one snapshot, from start to end.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::SigSet;

use super::child::{CommandEnd, run};
use super::copies::{self, DiskCopy};
use super::disks::{Disk, Disks, interrupted};
use super::exports::{self, Socket};
use super::freeze::{self, FreezeOptions, Freezer};
use super::guest::VSS_HOLD_TIMEOUT;
use super::hooks;
use super::images::{self, ImageSnapshot};
use super::plan::{self, DiskImage, Method, SnapshotPlan};
use super::receipt::{DiskReceipt, Receipt};
use super::reflink::{self, ReflinkTarget};
use crate::base::signals::Signals;
use crate::base::text::base64_unless_utf8;
use crate::control::client::Failure;

/// The code of a [`Failure`] that wrong options caused.
pub const USAGE: &str = "usage";
/// The part of a lease that is reserved for the resume.
const RESUME_MARGIN: Duration = Duration::from_millis(100);
/// How much longer than all timeouts together we may send the guard nothing: connections and a machine under load take
/// time.
const SILENCE_MARGIN: Duration = Duration::from_secs(10);

/// Takes a snapshot. SIGINT, SIGTERM and SIGHUP are blocked in this thread from now on, and end the snapshot in order.
/// After an error every disk is resumed, the guest is thawed and no snapshot is left behind; failures of that are
/// reported on standard error.
pub fn take(plan: &SnapshotPlan) -> Result<Receipt, Failure> {
    plan.check().map_err(|why| Failure::new(USAGE, why))?;
    let failed = |error: std::io::Error| Failure::new("internal", format!("signals cannot be caught: {error}"));
    let mask = SigSet::thread_get_mask().map_err(|errno| failed(errno.into()))?;
    let signals = Signals::block().map_err(failed)?;
    let mut run = SnapshotRun::prepare(plan, mask, signals)?;
    run.write_back();
    let taken = run.freezer.freeze(Some(run.signals.as_fd())).and_then(|()| run.hold_and_take());
    let taken = taken.map_err(|failure| run.blame_windows(failure));
    // Always, and in this order.
    let resumed = run.disks.resume();
    let was_frozen = run.freezer.thaw();
    let done = taken.and(resumed).and_then(|()| run.freezer.record_thaw(was_frozen)).and_then(|()| run.complete());
    match done {
        Ok(()) => Ok(run.receipt()),
        Err(failure) => {
            run.discard();
            Err(failure)
        }
    }
}

/// A snapshot that is being taken. The order of the fields matters when this is dropped: the disks are resumed before
/// the guard's socket is closed.
struct SnapshotRun<'a> {
    plan: &'a SnapshotPlan,
    mask: SigSet,
    signals: Signals,
    disks: Disks,
    freezer: Freezer,
    methods: Vec<Method>,
    targets: Vec<(usize, ReflinkTarget)>,
    copies: Vec<DiskCopy>,
    /// The sockets of exports.
    sockets: Vec<Socket>,
    images: Vec<ImageSnapshot>,
}

impl<'a> SnapshotRun<'a> {
    /// Does everything that may fail and needs no disk to be held, so that the rest is quick.
    fn prepare(plan: &'a SnapshotPlan, mask: SigSet, signals: Signals) -> Result<Self, Failure> {
        if let Some(directory) = &plan.hooks {
            hooks::check(directory).map_err(|why| Failure::new("hook", why))?;
        }
        let disks = Disks::connect(&plan.disks, plan.lease)?;
        let image = |disk: &Disk| DiskImage { path: disk.image_path.clone(), makes_snapshots: disk.image_snapshots };
        let images: Vec<DiskImage> = disks.list.iter().map(image).collect();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let methods = plan.methods(&images, &plan::default_name(now)).map_err(|why| Failure::new(USAGE, why))?;
        let freezer = Freezer::new(FreezeOptions {
            level: plan.level,
            agent: plan.agent.clone(),
            hooks: plan.hooks.clone(),
            or_weaker: plan.or_weaker,
            timeout: plan.freeze_timeout,
            silence: plan.timeout + plan.lease + SILENCE_MARGIN,
        });
        let (targets, copies, sockets, images) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut run = SnapshotRun { plan, mask, signals, disks, freezer, methods, targets, copies, sockets, images };
        match run.prepare_methods().and_then(|()| run.freezer.start(run.environment())) {
            Ok(()) => Ok(run),
            Err(failure) => {
                run.discard();
                Err(failure)
            }
        }
    }

    fn prepare_methods(&mut self) -> Result<(), Failure> {
        for (at, method) in self.methods.iter().enumerate() {
            match method {
                Method::Reflink(path) => {
                    let target = ReflinkTarget::prepare(&self.disks.list[at], path)?;
                    if let Some(warning) = target.check_cost(self.plan.lease)? {
                        self.freezer.warn(warning);
                    }
                    self.targets.push((at, target));
                }
                Method::Copy(path) => self.copies.push(copies::prepare(&mut self.disks, at, path, self.plan)?),
                Method::Nbd(path) => {
                    let (export, socket) = exports::prepare(&mut self.disks, at, path, self.plan)?;
                    self.copies.push(export);
                    self.sockets.push(socket);
                }
                Method::Rbd(name) => self.images.push(ImageSnapshot::new(at, name.clone().unwrap_or_default())),
                Method::Exec(_) => {}
            }
        }
        Ok(())
    }

    /// Closes the gates and fixes the instant. The caller resumes the disks.
    fn hold_and_take(&mut self) -> Result<(), Failure> {
        self.not_interrupted()?;
        let who = format!("virtioblkctl snapshot, level {}", self.freezer.level.name());
        let instant = self.disks.hold(self.plan.timeout, &who, Some(self.signals.as_fd()))?;
        self.freezer.receipt.instant = instant.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        // Between here and the resume is only what needs the disks to be held.
        if !self.copies.is_empty() {
            copies::start(&mut self.disks, &self.copies, Some(self.signals.as_fd()))?;
        }
        let deadline = self.deadline();
        reflink::share_all(&mut self.targets, deadline, Some(self.signals.as_fd()))?;
        images::take(&mut self.disks, &mut self.images, deadline, Some(self.signals.as_fd()))?;
        if let Some(Method::Exec(command)) = self.methods.first() {
            self.exec(command)?;
        }
        self.not_interrupted()
    }

    /// Returns when the work that needs the disks to be held must be done, so that they are resumed before their leases
    /// end.
    fn deadline(&self) -> Instant {
        let ends = self.freezer.frozen_until().map_or(self.disks.lease_ends(), |end| end.min(self.disks.lease_ends()));
        ends.checked_sub(RESUME_MARGIN).unwrap_or_else(Instant::now)
    }

    /// Adds the cause to a failure that occurred because Windows does not stay frozen.
    fn blame_windows(&self, failure: Failure) -> Failure {
        let is_over = self.freezer.frozen_until().is_some_and(|end| end <= Instant::now() + RESUME_MARGIN);
        if !is_over || failure.code == "interrupted" {
            return failure;
        }
        let limit = VSS_HOLD_TIMEOUT.as_secs();
        let text = format!(
            "{}. It was given up {limit} s after the freeze, because Windows (VSS) holds writes no longer: give copy:, which \
             is quick, or ask for level crash",
            failure.message
        );
        Failure::new("thawed-early", text)
    }

    /// Writes back the dirty pages of the host's cache now, so that fewer are left while the gates are closed and the
    /// guest is frozen. Only the quiesce's own sync counts for durability.
    fn write_back(&mut self) {
        for at in 0..self.disks.list.len() {
            let Some(path) = self.disks.list[at].image_path.clone() else { continue };
            if let Err(error) = File::open(&path).and_then(|file| file.sync_data()) {
                self.freezer.warn(format!("'{}' could not be synced beforehand: {error}", path.display()));
            }
        }
    }

    fn exec(&self, script: &OsStr) -> Result<(), Failure> {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(script).envs(self.environment());
        // Our standard output is for the receipt.
        command.stdout(std::io::stderr());
        let deadline = self.deadline();
        let allowed = deadline.saturating_duration_since(Instant::now());
        let ended = run(command, self.mask, true, deadline, Some(self.signals.as_fd()));
        let shown = script.to_string_lossy();
        let ended = ended.map_err(|error| Failure::new("exec", format!("/bin/sh cannot be run: {error}")))?;
        match ended.describe_failure(Duration::from_millis(allowed.as_millis() as u64)) {
            None => Ok(()),
            Some(_) if ended == CommandEnd::Cancelled => Err(interrupted()),
            Some(what) if ended == CommandEnd::TimedOut => {
                let lease = self.plan.lease;
                let text = format!("the command '{shown}' {what}; the disks are held for --lease ({lease:?}) at most");
                Err(Failure::new("exec", text))
            }
            Some(what) => Err(Failure::new("exec", format!("the command '{shown}' {what}"))),
        }
    }

    /// Does what is slow, after the disks were resumed and the guest was thawed: durability, digests, the end of
    /// copies.
    fn complete(&mut self) -> Result<(), Failure> {
        for at in 0..self.targets.len() {
            self.not_interrupted()?;
            self.targets[at].1.finish()?;
        }
        let mut digests = vec![None; self.disks.list.len()];
        if self.plan.digest {
            for (at, target) in &mut self.targets {
                digests[*at] = Some(target.digest(Some(self.signals.as_fd()))?);
            }
        }
        let cancel = Some(self.signals.as_fd());
        exports::report(&self.copies, self.plan, &self.methods);
        if self.plan.background {
            copies::query(&mut self.disks, &mut self.copies)?;
            self.sockets.iter_mut().for_each(Socket::keep);
        } else {
            // How far a client is, nobody else knows.
            let progress = self.plan.progress && self.sockets.is_empty();
            copies::wait_for(&mut self.disks, &mut self.copies, progress, cancel)?;
        }
        self.not_interrupted()?;
        images::keep(&mut self.disks, &self.images)?;
        self.targets.iter_mut().for_each(|(_, target)| target.keep());
        self.freezer.receipt.disks = self.disk_receipts(digests);
        Ok(())
    }

    fn disk_receipts(&self, mut digests: Vec<Option<String>>) -> Vec<DiskReceipt> {
        let receipts = self.disks.list.iter().enumerate().map(|(at, disk)| {
            let figure = |name: &str| disk.figures[name].as_u64().unwrap_or(0);
            let method = &self.methods[at];
            let copy = self.copies.iter().find(|copy| copy.disk == at).map(|copy| copy.status.clone());
            let copied = copy.as_ref().and_then(|copy| copy["sha256"].as_str()).map(str::to_owned);
            DiskReceipt {
                control: disk.control.display().to_string(),
                control_b64: base64_unless_utf8(disk.control.as_os_str()),
                image_b64: disk.image_path.as_ref().and_then(|path| base64_unless_utf8(path.as_os_str())),
                image: disk.image_path.as_ref().map_or(disk.image.clone(), |path| path.display().to_string()),
                held_us: disk.held.as_micros() as u64,
                drained: figure("drained"),
                drain_us: figure("drain-us"),
                sync_us: figure("sync-us"),
                bytes_synced: figure("bytes-synced"),
                way: method.name(),
                target: match method {
                    Method::Reflink(path) | Method::Copy(path) | Method::Nbd(path) => path.display().to_string(),
                    Method::Rbd(_) => {
                        let image = self.images.iter().find(|image| image.disk == at);
                        image.and_then(|image| image.full_name.clone()).unwrap_or_default()
                    }
                    Method::Exec(command) => command.to_string_lossy().into_owned(),
                },
                target_b64: match method {
                    Method::Reflink(path) | Method::Copy(path) | Method::Nbd(path) => {
                        base64_unless_utf8(path.as_os_str())
                    }
                    Method::Rbd(_) => None,
                    Method::Exec(command) => base64_unless_utf8(command),
                },
                sha256: digests[at].take().or(copied),
                copy,
            }
        });
        receipts.collect()
    }

    fn receipt(mut self) -> Receipt {
        self.freezer.receipt.level = self.freezer.level.name();
        self.freezer.receipt.detached = self.plan.background;
        self.freezer.receipt.held_us = self.freezer.receipt.disks.iter().map(|disk| disk.held_us).max().unwrap_or(0);
        self.freezer.receipt
    }

    /// Removes the snapshots that were made. The reflinks are removed when they are dropped.
    fn discard(&mut self) {
        let mut failures = images::undo(&mut self.disks, &self.images);
        failures.extend(copies::undo(&mut self.disks, &self.copies));
        for failure in failures {
            self.freezer.warn(failure);
        }
    }

    fn not_interrupted(&self) -> Result<(), Failure> {
        freeze::check(Some(self.signals.as_fd()))
    }

    /// Returns the environment variables of hooks and `exec:`.
    fn environment(&self) -> Vec<(String, OsString)> {
        let disks = self.disks.list.iter().map(|disk| (disk.control.as_path(), disk.image_path.as_deref()));
        hooks::environment(disks, self.freezer.level)
    }
}
