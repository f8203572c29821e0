//! Starts and ends the daemon of one disk, a process that outlives the hook and libvirtd. Every wait has a deadline.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, flock, inotify};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;

use super::logs;
use super::places::DiskPlaces;
use super::units;
use crate::base::unix_listener;
use crate::control::client::{Client, Failure, REPLY_TIMEOUT};
use crate::snapshot::wait::wait;

/// How often a daemon's end is looked for.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How often the readiness of a daemon is looked for where nothing shows it.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// How often a daemon that still lives is asked to end.
const QUIT_INTERVAL: Duration = Duration::from_secs(1);

/// A daemon that was started and may not be ready yet.
pub(super) struct Starting {
    /// The daemon, or systemd-run, which ends when the daemon is ready or has failed.
    child: Child,
    log: Log,
}

/// Where the daemon's log begins.
enum Log {
    /// The file's length before the start.
    File(u64),
    /// systemd's journal, and the time of the start.
    Journal(SystemTime),
}

/// What starts daemons.
#[derive(Clone, Debug)]
pub struct Launcher {
    /// virtioblkd.
    pub program: PathBuf,
    /// systemd starts it, as a unit. `false`: we do.
    pub has_systemd: bool,
}

/// Starts the daemon of `disk` from its configuration file, and does not wait for it. `domain`: the domain's name.
pub(super) fn start(disk: &DiskPlaces, launcher: &Launcher, domain: &str) -> Result<Starting, String> {
    let Launcher { program, has_systemd } = launcher;
    match has_systemd {
        true => start_unit(disk, program, domain).map_err(|error| format!("cannot start systemd-run: {error}")),
        false => start_process(disk, program).map_err(|error| format!("cannot start {}: {error}", program.display())),
    }
}

/// Returns the file whose lock keeps a second daemon of the disk out.
fn locked(disk: &DiskPlaces) -> io::Result<File> {
    let lock = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&disk.lock)?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
    Ok(lock)
}

fn start_unit(disk: &DiskPlaces, program: &Path, domain: &str) -> io::Result<Starting> {
    let mut command = units::start_command(disk, program, domain);
    // systemd-run has the lock until the daemon has that of its pid file, whatever becomes of us.
    command.stdin(locked(disk)?).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    units::wait_until_unloaded(disk);
    units::note(disk)?;
    let log = Log::Journal(SystemTime::now());
    Ok(Starting { child: command.spawn()?, log })
}

fn start_process(disk: &DiskPlaces, program: &Path) -> io::Result<Starting> {
    let log =
        OpenOptions::new().append(true).create(true).mode(0o640).custom_flags(libc::O_NOFOLLOW).open(&disk.log)?;
    let start = Log::File(log.metadata()?.len());
    let mut command = Command::new(program);
    command.arg("--config").arg(&disk.configuration);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").current_dir("/");
    // The lock lives as long as the daemon has its standard input, from its first moment on, whatever becomes of us.
    let lock = locked(disk)?;
    // A process group of its own: libvirt ends the hook's group when it gives the hook up.
    command.stdin(lock).stdout(log.try_clone()?).stderr(log).process_group(0);
    Ok(Starting { child: command.spawn()?, log: start })
}

impl Starting {
    /// Waits until the daemon listens. The error is the daemon's own, in one line.
    pub(super) fn wait(mut self, disk: &DiskPlaces, deadline: Instant) -> Result<(), String> {
        let changes = Changes::watch(&self.child, &disk.control);
        loop {
            // A daemon that answers on its control socket listens for its front-end, too: both sockets are bound before
            // either is served.
            let answers = Client::connect_within(&disk.control, POLL_INTERVAL * 10)
                .and_then(|mut client| client.query_status(REPLY_TIMEOUT));
            if let Some(status) = self.child.try_wait().map_err(|error| error.to_string())? {
                if status.success() && matches!(self.log, Log::Journal(_)) {
                    return Ok(());
                }
                let said = self.reason(disk);
                return Err(said.unwrap_or_else(|| format!("the daemon ended ({status}); {}", units::log_place(disk))));
            }
            if answers.is_ok() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let _ = self.child.kill();
                if matches!(self.log, Log::Journal(_)) {
                    units::kill(disk);
                }
                return Err(format!(
                    "the daemon was not ready in time and was ended: does its image answer? See {}",
                    units::log_place(disk)
                ));
            }
            changes.wait(deadline);
        }
    }

    /// Why the daemon has not started, in its own words or, if it said nothing, in systemd-run's.
    fn reason(&mut self, disk: &DiskPlaces) -> Option<String> {
        let since = match self.log {
            Log::File(start) => return logs::reason(&logs::tail(&disk.log, start)),
            Log::Journal(since) => since,
        };
        let mut said = String::new();
        if let Some(error) = self.child.stderr.take() {
            // What systemd-run has not said is missing.
            let _ = error.take(logs::MAX_TAIL).read_to_string(&mut said);
        }
        let of_systemd = || said.lines().find(|line| !line.trim().is_empty()).map(str::to_owned);
        logs::reason(&units::journal(disk, since)).or_else(of_systemd)
    }
}

/// What shows that a daemon that starts is ready, or has failed: its control socket appears, or it ends.
struct Changes {
    /// Empty where the kernel gives none; then the daemon is looked for now and then.
    descriptors: Vec<OwnedFd>,
}

impl Changes {
    fn watch(child: &Child, control: &Path) -> Self {
        let directory = || -> rustix::io::Result<OwnedFd> {
            let changes = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
            let events = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
            inotify::add_watch(&changes, control.parent().unwrap_or(Path::new("/")), events)?;
            Ok(changes)
        };
        let both = [directory(), pidfd_open(Pid::from_child(child), PidfdFlags::empty())];
        Changes { descriptors: both.into_iter().flatten().collect() }
    }

    /// Returns soon after one of them; at the latest after [`LOOK_INTERVAL`], for a daemon that listens a moment after its
    /// socket is there.
    fn wait(&self, deadline: Instant) {
        let descriptors: Vec<BorrowedFd<'_>> = self.descriptors.iter().map(AsFd::as_fd).collect();
        let until = deadline.min(Instant::now() + LOOK_INTERVAL);
        if descriptors.is_empty() || wait(&descriptors, None, until).is_err() {
            std::thread::sleep(POLL_INTERVAL);
        }
        // What was reported must not be reported again.
        let mut events = [0; 4096];
        while self.descriptors.first().is_some_and(|fd| rustix::io::read(fd, &mut events).is_ok_and(|read| read > 0)) {}
    }
}

/// Whether the disk's daemon lives: it, or the hook that starts it, has the lock of its lock file, or, after an upgrade in
/// place, that of its pid file.
pub(super) fn is_alive(disk: &DiskPlaces) -> bool {
    [&disk.lock, &disk.pid_file].into_iter().any(|path| {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path);
        file.is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockShared).is_err())
    })
}

/// The process id of the daemon that serves the disk, in its own words.
pub(super) fn pid(disk: &DiskPlaces) -> Result<u64, String> {
    let status = Client::connect(&disk.control).and_then(|mut client| client.query_status(REPLY_TIMEOUT));
    match status.map_err(|failure| failure.message)?.daemon.pid {
        0 => Err(format!("'{}' reports no process id", disk.control.display())),
        pid => Ok(pid.into()),
    }
}

/// Ends the disk's daemon in order (it drains and syncs), and removes the files that the hook made for it. Returns when
/// it has ended. An error: it has not ended by `deadline`; its files stay, so that it is found again.
///
/// By the control socket and not by SIGTERM: a hook before us may have asked already, and a second signal would end the
/// daemon before it has synced.
pub(super) fn end(disk: &DiskPlaces, deadline: Instant) -> Result<(), String> {
    let mut asked: Option<Instant> = None;
    let mut refusal = None;
    while is_alive(disk) {
        if asked.is_none_or(|at| at.elapsed() >= QUIT_INTERVAL) {
            // It may not listen yet, or no longer.
            let quit = Client::connect_within(&disk.control, POLL_INTERVAL * 10)
                .and_then(|mut client| client.execute("quit", json!({}), REPLY_TIMEOUT));
            asked = quit.is_ok().then(Instant::now);
            refusal = quit.err().filter(|failure| !matches!(failure.code.as_str(), "no-daemon" | "no-answer"));
        }
        // No later attempt is answered otherwise.
        if let Some(refusal) = refusal.as_ref().filter(|refusal| is_final(refusal) || Instant::now() >= deadline) {
            return Err(format!("the daemon of the disk {} does not end: {}", disk.name, refusal.message));
        }
        if Instant::now() >= deadline {
            return Err(format!(
                "the daemon of the disk {} has not ended yet: {}; {}",
                disk.name,
                if asked.is_some() { "it waits for its image" } else { "it does not reply on its control socket" },
                units::log_place(disk)
            ));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    // A daemon that died is not started again; one that systemd has started meanwhile ends in order.
    units::end(disk, deadline)?;
    if let Some(socket) = configured_socket(disk) {
        remove_socket(disk, &socket);
    }
    disk.remove_files()
}

/// Whether the daemon, or the control socket's mode, refuses this program's user.
fn is_final(refusal: &Failure) -> bool {
    matches!(refusal.code.as_str(), "no-permission" | "not-allowed")
}

/// The vhost-user socket that the disk's configuration file names.
fn configured_socket(disk: &DiskPlaces) -> Option<PathBuf> {
    let options: toml::Table = fs::read_to_string(&disk.configuration).ok()?.parse().ok()?;
    Some(options.get("socket-path")?.as_str()?.into())
}

/// Removes the vhost-user socket of a daemon that has ended, if it is in our directory of sockets, where a daemon of another
/// user may not remove it. What is elsewhere is the daemon's to remove.
pub(super) fn remove_socket(disk: &DiskPlaces, socket: &Path) {
    if socket.parent() == disk.control.parent()
        && let Err(error) = unix_listener::remove_dead(socket)
    {
        log::debug!("{error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_that_refuses_to_end_is_not_waited_for() {
        use std::io::{BufRead, BufReader, Write};
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().to_owned();
        let places = super::super::places::Places { log: run.clone(), run: run.clone(), sockets: run };
        let domain = super::super::domain::Domain::parse(
            "<domain><name>vm1</name><uuid>6fd1f7a2-4c0b-4e0f-8a65-1a3c0d2e9b11</uuid></domain>",
        );
        let disk = places.disk(&domain.unwrap(), "vda");
        let lock = File::create(&disk.lock).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        let socket = std::os::unix::net::UnixListener::bind(&disk.control).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = socket.accept().unwrap();
            stream.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n").unwrap();
            let mut requests = BufReader::new(stream.try_clone().unwrap()).lines();
            let mut reply = |reply: &str| {
                let request: serde_json::Value = serde_json::from_str(&requests.next().unwrap().unwrap()).unwrap();
                let text = reply.replace("ID", &request["id"].to_string());
                stream.write_all(text.as_bytes()).unwrap();
            };
            reply("{\"return\": {}, \"id\": ID}\n");
            reply(
                "{\"error\": {\"class\": \"GenericError\", \"code\": \"not-allowed\", \"desc\": \"for root\"}, \"id\": ID}\n",
            );
        });
        let began = Instant::now();
        let error = end(&disk, began + Duration::from_secs(600)).unwrap_err();
        assert!(error.contains("does not end: ") && error.contains("for root"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(60));
    }
}
