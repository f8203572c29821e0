//! `--run COMMAND`: a daemon that serves its disk as long as a command runs.
//!
//! This process starts the daemon as a child, for a daemon in its sandbox can start no program. It runs the command when the
//! daemon has reported that it listens (sd_notify(3)), ends the daemon when the command has ended, and passes the command's
//! status on. The daemon has a process group of its own, so that Ctrl-C in the terminal reaches the command alone. If this
//! process dies, the kernel ends the daemon.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal, set_parent_process_death_signal};

use crate::base::logging;
use crate::base::wait::poll_until;
use crate::config::RunCommand;

/// The environment variable that has the process id of a parent with which the daemon is to end.
const PARENT_VARIABLE: &str = "VIRTIOBLKD_RUN_PARENT";
/// The exit status if the command cannot be run, as timeout(1) and env(1) have it.
const CANNOT_RUN: u8 = 126;
/// The signals that are passed on to the command.
const SIGNALS: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];

/// Has the kernel end this process when the process ends that started it for `--run`. Called once by main, before any other
/// thread exists. A change of the user (`--user`) keeps it.
pub fn end_with_parent() {
    let parent = std::env::var(PARENT_VARIABLE).ok().and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw);
    if parent.is_none() || parent != rustix::process::getppid() {
        return;
    }
    if let Err(errno) = set_parent_process_death_signal(Some(rustix::process::Signal::TERM)) {
        log::warn!("if the process that runs the command of --run is killed, this daemon serves on: {errno}");
    }
}

/// Serves the disk while the command runs. Returns the exit status of this process. The error says why the command was not
/// run, or why its end could not be awaited.
pub fn run(run: &RunCommand) -> Result<u8, String> {
    let set: SigSet = SIGNALS.into_iter().collect();
    // std gives the processes that it starts an empty mask.
    set.thread_block().map_err(|errno| failed("cannot block signals")(errno.into()))?;
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(|errno| failed("cannot receive signals")(errno.into()))?;
    let place = Place::create().map_err(failed("cannot create a directory for a socket (TMPDIR says where)"))?;
    let socket = run.socket.clone().unwrap_or_else(|| place.path.join("disk.sock"));
    let command = with_paths(&run.command, &socket, run.control.as_deref())?;
    let mut running = Running::start(run, &place, &socket, signals)?;
    match running.wait_until_ready()? {
        Ready::Listens => {}
        Ready::Ended(status) => return Ok(status.code().map_or(1, |code| code as u8)),
        Ready::Signal(signal) => {
            running.end_daemon()?;
            return Ok(128 + signal as u8);
        }
    }
    let outcome = Command::new("/bin/sh").arg("-c").arg(command).spawn();
    let status = match outcome.map_err(failed("cannot run /bin/sh")) {
        Ok(command) => running.wait_for(command),
        Err(error) => {
            logging::message(error);
            Ok(CANNOT_RUN)
        }
    };
    let ended = running.end_daemon()?;
    let status = status?;
    if !ended && status == 0 {
        return Ok(1);
    }
    Ok(status)
}

/// The text for an error at `what`.
fn failed(what: &'static str) -> impl Fn(io::Error) -> String {
    move |error| format!("--run: {what}: {error}")
}

/// Puts the paths of the sockets into the command. They become words of a shell, so they must be plain.
fn with_paths(command: &str, socket: &Path, control: Option<&Path>) -> Result<String, String> {
    let mut text = command.to_owned();
    for (mark, path) in [("{socket}", Some(socket)), ("{control}", control)] {
        let Some(path) = path.filter(|_| command.contains(mark)) else { continue };
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@".contains(c);
        match path.to_str().filter(|path| path.chars().all(is_plain)) {
            Some(path) => text = text.replace(mark, path),
            None => {
                return Err(format!(
                    "--run: the path '{}' in place of {mark} would be more than one word of the shell: use a path of letters, \
                     digits and / . _ -",
                    path.display()
                ));
            }
        }
    }
    Ok(text)
}

/// A directory that only this user can use. Dropping it removes it.
struct Place {
    path: PathBuf,
}

impl Place {
    fn create() -> io::Result<Place> {
        for attempt in 0..100 {
            let path = std::env::temp_dir().join(format!("virtioblkd-{}-{attempt}", std::process::id()));
            match std::fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Place { path }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::from(io::ErrorKind::AlreadyExists))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            logging::message(format_args!("cannot remove '{}': {error}", self.path.display()));
        }
    }
}

/// What happened before the daemon listened.
enum Ready {
    Listens,
    Ended(ExitStatus),
    Signal(Signal),
}

/// The daemon, and what is waited for.
struct Running {
    daemon: Child,
    /// The process that serves the disk: the child, or the one that took over from it in an upgrade. `None`: it has ended.
    server: Option<OwnedFd>,
    /// The daemon's messages to its service manager, which is this process.
    notices: UnixDatagram,
    signals: SignalFd,
}

/// A source of [`Running::wait`] is ready.
struct Woken {
    command_ended: bool,
    server_ended: bool,
}

/// What the daemon's messages said (sd_notify(3)).
#[derive(Default)]
struct Notices {
    /// The daemon listens.
    is_ready: bool,
    /// An upgrade replaced the process that serves the disk.
    server_replaced: bool,
}

impl Running {
    fn start(run: &RunCommand, place: &Place, socket: &Path, signals: SignalFd) -> Result<Running, String> {
        let address = place.path.join("notify");
        let notices =
            UnixDatagram::bind(&address).map_err(failed("cannot bind the socket for the daemon's messages"))?;
        notices.set_nonblocking(true).map_err(failed("cannot use the socket for the daemon's messages"))?;
        let program = std::env::current_exe().map_err(failed("cannot find this program's own file"))?;
        let mut command = Command::new(program);
        command.args(&run.arguments).env("NOTIFY_SOCKET", &address).process_group(0);
        command.env(PARENT_VARIABLE, std::process::id().to_string());
        if run.socket.is_none() {
            command.args([OsString::from("--socket-path"), socket.into()]);
        }
        let daemon = command.spawn().map_err(failed("cannot start the daemon"))?;
        let server = pidfd_open(Pid::from_child(&daemon), PidfdFlags::empty())
            .map_err(|errno| failed("cannot watch the daemon")(errno.into()))?;
        Ok(Running { daemon, server: Some(server), notices, signals })
    }

    /// Waits until the daemon listens. It has as long as its storage takes.
    fn wait_until_ready(&mut self) -> Result<Ready, String> {
        loop {
            let woken = self.wait(None)?;
            if self.read_notices().is_ready {
                return Ok(Ready::Listens);
            }
            // There is no command yet, so a signal of the terminal is for this process.
            if let Some((signal, _)) = self.read_signal() {
                return Ok(Ready::Signal(signal));
            }
            if woken.server_ended {
                let status = self.daemon.wait().map_err(failed("cannot wait for the daemon"))?;
                return Ok(Ready::Ended(status));
            }
        }
    }

    /// Waits for the command's end and passes signals on to it. Returns its status.
    fn wait_for(&mut self, mut command: Child) -> Result<u8, String> {
        let failed = failed("cannot wait for the command");
        let pidfd = pidfd_open(Pid::from_child(&command), PidfdFlags::empty()).map_err(|errno| failed(errno.into()))?;
        loop {
            let woken = self.wait(Some(&pidfd))?;
            // An upgrade's new daemon may be named by the time that the old one has ended.
            let server_ended = !self.read_notices().server_replaced && woken.server_ended;
            while let Some(signal) = self.next_signal() {
                // SRCH: the command has ended meanwhile.
                let _ = pidfd_send_signal(&pidfd, as_rustix(signal));
            }
            if woken.command_ended {
                let status = command.wait().map_err(failed)?;
                return Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)) as u8);
            }
            if server_ended && self.server.take().is_some() {
                logging::message("the daemon has ended before the command of --run: the command is ended");
                let _ = pidfd_send_signal(&pidfd, rustix::process::Signal::TERM);
            }
        }
    }

    /// Ends the daemon and waits for it: it drains and syncs first. Returns whether it ended well. A signal to this process
    /// is passed on to it; a second SIGTERM or SIGINT ends it at once.
    fn end_daemon(&mut self) -> Result<bool, String> {
        self.read_notices();
        let Some(server) = self.server.take() else { return Ok(false) };
        let _ = pidfd_send_signal(&server, rustix::process::Signal::TERM);
        self.server = Some(server);
        loop {
            let woken = self.wait(None)?;
            if self.read_notices().server_replaced {
                // An upgrade was under way: the new daemon ends, too.
                if let Some(server) = &self.server {
                    let _ = pidfd_send_signal(server, rustix::process::Signal::TERM);
                }
            } else if woken.server_ended {
                break;
            }
            // The daemon is in a group of its own, which the terminal sends nothing to.
            while let Some((signal, _)) = self.read_signal() {
                if let Some(server) = &self.server {
                    let _ = pidfd_send_signal(server, as_rustix(signal));
                }
            }
        }
        // A daemon that took over is no child of this process: its status is in its log only.
        self.daemon.wait().map(|status| status.success()).map_err(failed("cannot wait for the daemon"))
    }

    /// Sleeps until the command or the server ends, a message comes, or a signal.
    fn wait(&self, command: Option<&OwnedFd>) -> Result<Woken, String> {
        let mut sources = vec![
            PollFd::from_borrowed_fd(self.notices.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
        ];
        sources.extend(self.server.iter().chain(command).map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)));
        poll_until(&mut sources, None).map_err(failed("cannot wait"))?;
        let mut ended = sources[2..].iter().map(|source| !source.revents().is_empty());
        let server_ended = self.server.is_some() && ended.next().unwrap_or(false);
        Ok(Woken { server_ended, command_ended: ended.next().unwrap_or(false) })
    }

    /// Reads the daemon's messages. An upgrade's names a new process, which is the server from now on.
    fn read_notices(&mut self) -> Notices {
        let mut notices = Notices::default();
        let mut text = [0; 4096];
        while let Ok(length) = self.notices.recv(&mut text) {
            for state in String::from_utf8_lossy(&text[..length]).lines() {
                notices.is_ready |= state == "READY=1";
                let pid = state.strip_prefix("MAINPID=").and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw);
                if let Some(server) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) {
                    self.server = Some(server);
                    notices.server_replaced = true;
                }
            }
        }
        notices
    }

    /// The next signal that is to be passed on to the command. The terminal sends its signals to the command, too.
    fn next_signal(&self) -> Option<Signal> {
        while let Some((signal, is_of_terminal)) = self.read_signal() {
            if !is_of_terminal {
                return Some(signal);
            }
        }
        None
    }

    /// The next signal, and whether the terminal sent it.
    fn read_signal(&self) -> Option<(Signal, bool)> {
        while let Ok(Some(info)) = self.signals.read_signal() {
            if let Ok(signal) = Signal::try_from(info.ssi_signo as i32) {
                return Some((signal, info.ssi_code == libc::SI_KERNEL));
            }
        }
        None
    }
}

fn as_rustix(signal: Signal) -> rustix::process::Signal {
    match signal {
        Signal::SIGINT => rustix::process::Signal::INT,
        Signal::SIGHUP => rustix::process::Signal::HUP,
        Signal::SIGQUIT => rustix::process::Signal::QUIT,
        _ => rustix::process::Signal::TERM,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_words_of_the_command() {
        let text =
            with_paths("qemu path={socket} {control} {x}", Path::new("/run/a.sock"), Some(Path::new("/b"))).unwrap();
        assert_eq!(text, "qemu path=/run/a.sock /b {x}");
        for path in ["/a b", "/$(id)", "/a;b", "/a'b"] {
            assert!(
                with_paths("{socket}", Path::new(path), None).unwrap_err().contains("more than one word"),
                "{path}"
            );
            assert_eq!(
                with_paths("true", Path::new(path), None).unwrap(),
                "true",
                "a path that is not used may be any"
            );
        }
    }
}
