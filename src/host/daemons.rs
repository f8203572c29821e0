//! Starts and ends the daemon of one disk, a process that outlives the hook and libvirtd. Every wait has a deadline.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock, inotify};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;

use super::places::DiskPlaces;
use crate::base::unix_listener;
use crate::control::client::{Client, Failure, REPLY_TIMEOUT};
use crate::snapshot::wait::wait;

/// How often a daemon's end is looked for.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How often the readiness of a daemon is looked for where nothing shows it.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// How often a daemon that still lives is asked to end.
const QUIT_INTERVAL: Duration = Duration::from_secs(1);
/// So many of a log's errors say why a daemon did not start.
const MAX_REASONS: usize = 3;
/// Bytes at a log's end that are searched for them.
const MAX_LOG_TAIL: u64 = 16 << 10;

/// A daemon that was started and may not be ready yet.
pub(super) struct Starting {
    child: Child,
    /// The log's length before its start.
    log_start: u64,
}

/// Starts the daemon of `disk` from its configuration file, and does not wait for it. `program`: virtioblkd.
pub(super) fn start(disk: &DiskPlaces, program: &Path) -> Result<Starting, String> {
    start_process(disk, program).map_err(|error| format!("cannot start {}: {error}", program.display()))
}

fn start_process(disk: &DiskPlaces, program: &Path) -> io::Result<Starting> {
    let log =
        OpenOptions::new().append(true).create(true).mode(0o640).custom_flags(libc::O_NOFOLLOW).open(&disk.log)?;
    let log_start = log.metadata()?.len();
    let mut command = Command::new(program);
    command.arg("--config").arg(&disk.configuration);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").current_dir("/");
    // The lock lives as long as the daemon has its standard input, from its first moment on, whatever becomes of us.
    let lock = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&disk.lock)?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
    // A process group of its own: libvirt ends the hook's group when it gives the hook up.
    command.stdin(lock).stdout(log.try_clone()?).stderr(log).process_group(0);
    Ok(Starting { child: command.spawn()?, log_start })
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
                let said = reason(&log_tail(&disk.log, self.log_start));
                return Err(
                    said.unwrap_or_else(|| format!("the daemon ended ({status}); its log is {}", disk.log.display()))
                );
            }
            if answers.is_ok() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let _ = self.child.kill();
                return Err(format!(
                    "the daemon was not ready in time and was ended: does its image answer? Its log is {}",
                    disk.log.display()
                ));
            }
            changes.wait(deadline);
        }
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

/// Why the daemon did not start: its last errors, or its last line, without the log's time and level.
fn reason(log: &str) -> Option<String> {
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    let mut said: Vec<&str> = lines.iter().filter_map(|line| Some(line.split_once(" error: ")?.1)).collect();
    // A wrong configuration is reported before there is a log.
    said.extend(lines.iter().filter_map(|line| line.strip_prefix("virtioblkd: ")));
    if said.is_empty() {
        said.extend(lines.last());
    }
    let last = said.len().saturating_sub(MAX_REASONS);
    (!said.is_empty()).then(|| said[last..].join("; "))
}

fn log_tail(path: &Path, start: u64) -> String {
    use std::io::{Seek, SeekFrom};
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(start.max(length.saturating_sub(MAX_LOG_TAIL))))?;
        let mut bytes = Vec::new();
        file.take(MAX_LOG_TAIL).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
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
                .and_then(|mut client| client.ask("quit", json!({}), REPLY_TIMEOUT));
            asked = quit.is_ok().then(Instant::now);
            refusal = quit.err().filter(|failure| !matches!(failure.code.as_str(), "no-daemon" | "no-answer"));
        }
        // No later attempt is answered otherwise.
        if let Some(refusal) = refusal.as_ref().filter(|refusal| is_final(refusal) || Instant::now() >= deadline) {
            return Err(format!("the daemon of the disk {} does not end: {}", disk.name, refusal.message));
        }
        if Instant::now() >= deadline {
            return Err(format!(
                "the daemon of the disk {} has not ended yet: {}; its log is {}",
                disk.name,
                if asked.is_some() { "it waits for its image" } else { "it does not reply on its control socket" },
                disk.log.display()
            ));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    if let Some(socket) = socket_left(disk)
        && let Err(error) = unix_listener::remove_dead(&socket)
    {
        log::debug!("{error}");
    }
    let of_run = [&disk.applying, &disk.configuration, &disk.pid_file, &disk.control, &disk.domain_name, &disk.lock];
    for path in of_run {
        remove(path)?;
    }
    Ok(())
}

/// Whether the daemon, or the control socket's mode, refuses this program's user.
fn is_final(refusal: &Failure) -> bool {
    matches!(refusal.code.as_str(), "no-permission" | "not-allowed")
}

/// The vhost-user socket, if it is in our directory of sockets, where a daemon of another user may not remove it. What is
/// elsewhere is the daemon's to remove.
fn socket_left(disk: &DiskPlaces) -> Option<PathBuf> {
    let options: toml::Table = fs::read_to_string(&disk.configuration).ok()?.parse().ok()?;
    let socket = PathBuf::from(options.get("socket-path")?.as_str()?);
    (socket.parent() == disk.control.parent()).then_some(socket)
}

fn remove(path: &Path) -> Result<(), String> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(format!("cannot remove {}: {error}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_what_the_daemon_said_last() {
        let log = "2026-11-28T07:23:45Z info: starting\n2026-11-28T07:23:45Z error: /a: there is no such file\n";
        assert_eq!(reason(log).unwrap(), "/a: there is no such file");
        assert_eq!(reason("virtioblkd: no socket given\n").unwrap(), "no socket given");
        assert_eq!(reason("thread panicked\n").unwrap(), "thread panicked");
        assert_eq!(reason("\n"), None);
    }

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
