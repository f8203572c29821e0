//! The new daemon's side of an upgrade in place ([`crate::upgrade`]): takes over from the one behind a control socket.
//! Whatever fails before that one says `Go` ends this process, and the other serves on.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::{Value, json};

use super::Served;
use super::front_ends::FrontEnds;
use crate::base::logging;
use crate::config::{Config, Listen};
use crate::control::client::{Client, REPLY_TIMEOUT};
use crate::upgrade::{
    self, Channel, Descriptors, FilesTakenOver, FromNew, FromOld, GAVE_UP, Hello, Starter, State, VERSION,
};
use crate::virtio::device::hand_over::Steps;
use crate::virtio::vhost_user::save_restore::SavedSession;

/// For the other one's answers. It may have much to sync before the last of them, while its guest runs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
const SYNC_TIMEOUT: Duration = Duration::from_secs(600);

/// Why this process does not take over: the cause and the mend.
#[derive(Debug)]
pub struct TakeOverError(PathBuf, String);

impl fmt::Display for TakeOverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--take-over '{}': {}", self.0.display(), self.1)
    }
}

impl std::error::Error for TakeOverError {}

/// A daemon that is ready to give its disk away.
pub(super) struct TakeOver {
    path: PathBuf,
    channel: Channel,
    hello: Hello,
    descriptors: Descriptors,
    keeps: FilesTakenOver,
    starter: Option<Starter>,
}

/// Files that are the same for the daemon before us.
#[derive(Default)]
pub(super) struct Taken {
    pub(super) front: Option<UnixListener>,
    pub(super) control: Option<UnixListener>,
    pub(super) pid_file: Option<File>,
}

impl TakeOver {
    /// Asks the daemon behind the control socket `path`, and compares what it serves with `served`. Main, when the image
    /// is open.
    pub(super) fn begin(path: &Path, served: &dyn Served) -> Result<TakeOver, TakeOverError> {
        // A shell's job, or a terminal that closes, is not to end what outlives it. A leader of a session is free already.
        if let Err(errno) = rustix::process::setsid() {
            log::debug!("no session of our own: {errno}");
        }
        let refuse = |why: String| TakeOverError(path.to_owned(), why);
        let starter = Starter::of_this_process().map_err(|error| refuse(error.to_string()))?;
        if starter.as_ref().is_some_and(Starter::has_given_up) {
            return Err(refuse(GAVE_UP.into()));
        }
        let mut client = Client::connect(path).map_err(|failure| refuse(failure.message))?;
        let ask = client.ask("hand-over", json!({ "version": VERSION }), REPLY_TIMEOUT);
        ask.map_err(|failure| match failure.code.as_str() {
            "unknown-command" => refuse("the running virtioblkd is too old for that: restart it instead".into()),
            _ => refuse(failure.message),
        })?;
        let stream = client.into_stream().map_err(|failure| refuse(failure.message))?;
        let channel = Channel::new(stream).map_err(|error| refuse(error.to_string()))?;
        let pipe: Result<Vec<OwnedFd>, io::Error> = starter.iter().map(Starter::copy).collect();
        let pipe = pipe.map_err(|error| refuse(error.to_string()))?;
        channel.send(&FromNew::Begin, &pipe, ANSWER_TIMEOUT).map_err(|error| refuse(no_listener(&error)))?;
        let (hello, descriptors) = match hear(&channel, ANSWER_TIMEOUT).map_err(refuse)? {
            (FromOld::Hello(hello), descriptors) => (*hello, Descriptors::new(descriptors)),
            _ => return Err(refuse(OUT_OF_TURN.into())),
        };
        let take_over =
            TakeOver { path: path.to_owned(), channel, hello, descriptors, keeps: FilesTakenOver::default(), starter };
        let Some(facts) = served.facts() else {
            return Err(take_over.give_up("an image in memory ends with its process"));
        };
        take_over.hello.disk.allow(&facts).map_err(|why| take_over.give_up(&why))?;
        Ok(take_over)
    }

    /// Takes over the sockets and the pid file that the configuration names, too; the rest is ours to make.
    pub(super) fn files(&mut self, config: &Config) -> Result<Taken, TakeOverError> {
        let same = |ours: Option<&PathBuf>, theirs: Option<&PathBuf>| match (ours, theirs) {
            (Some(ours), Some(theirs)) => std::path::absolute(ours).is_ok_and(|ours| ours == *theirs),
            _ => false,
        };
        let front = match &config.listen {
            Listen::Path { path, .. } => same(Some(path), self.hello.front_path.as_ref()),
            // One that was given to the daemon before us, under whatever number.
            Listen::Fd(_) if self.hello.front_path.is_none() => true,
            // The number may mean anything here.
            Listen::Fd(_) => return Err(self.give_up("--fd: it serves on a path of its own: give --socket-path")),
        };
        let control = self.hello.control.clone();
        let control = control.filter(|(path, _)| same(config.control.as_ref().map(|it| &it.path), Some(path)));
        let pid_file = self.hello.pid_file.clone();
        let pid_file = pid_file.filter(|(path, _)| same(config.pid_file.as_ref(), Some(path)));
        self.keeps = FilesTakenOver { front, control: control.is_some(), pid_file: pid_file.is_some() };
        let front_socket = self.hello.front_socket;
        let front = front.then(|| self.take(front_socket)).transpose()?;
        let control = control.map(|(_, number)| self.take(number)).transpose()?;
        let pid_file = pid_file.map(|(_, number)| self.take(number)).transpose()?;
        Ok(Taken { front: front.map(Into::into), control: control.map(Into::into), pid_file: pid_file.map(Into::into) })
    }

    fn take(&mut self, number: usize) -> Result<OwnedFd, TakeOverError> {
        self.descriptors.take(number).map_err(|error| self.give_up(&error.to_string()))
    }

    /// Tells the other one why it goes on serving.
    pub(super) fn give_up(&self, why: &str) -> TakeOverError {
        if let Err(error) = self.channel.send(&FromNew::Failed(why.to_owned()), &[], ANSWER_TIMEOUT) {
            log::debug!("the other daemon does not hear why: {error}");
        }
        TakeOverError(self.path.clone(), why.to_owned())
    }

    /// Takes the guest over. When this returns well its rings run here. Returns the figures, and whether an attendant is
    /// missed. Main, when all that can fail was done.
    pub(super) fn finish(
        mut self,
        served: &dyn Served,
        front_ends: &mut FrontEnds,
    ) -> Result<(Value, bool), TakeOverError> {
        let refuse = |why| TakeOverError(self.path.clone(), why);
        say(&self.channel, &FromNew::Ready(self.keeps)).map_err(refuse)?;
        let (state, descriptors) = match hear(&self.channel, SYNC_TIMEOUT).map_err(refuse)? {
            (FromOld::State(state), descriptors) => (*state, Descriptors::new(descriptors)),
            _ => return Err(refuse(OUT_OF_TURN.into())),
        };
        let State { since, drained_in, counts, front_end } = state;
        served.go_on_counting(&counts);
        served.take_over().map_err(|error| self.give_up(&error.to_string()))?;
        let adopted = front_end.map(|(number, record)| Self::restore_session(number, record, descriptors, front_ends));
        let adopted = adopted.transpose().map_err(|why| {
            // Before the other one hears of it: it wants the image back.
            served.give_back();
            self.give_up(&why)
        })?;
        // One that knows no starters does not look itself.
        if self.starter.as_ref().is_some_and(Starter::has_given_up) {
            served.give_back();
            return Err(self.give_up(GAVE_UP));
        }
        say(&self.channel, &FromNew::Prepared).map_err(refuse)?;
        match hear(&self.channel, ANSWER_TIMEOUT).map_err(refuse)? {
            (FromOld::Go, _) => {}
            _ => return Err(refuse(OUT_OF_TURN.into())),
        }
        // From here on the guest is ours, whatever happens.
        if let Some((go, running)) = adopted
            && (go.send(()).is_err() || running.recv().is_err())
        {
            log::error!("the front-end's thread has ended; see above");
        }
        let pause = upgrade::monotonic().saturating_sub(since);
        match self.descriptors.take(self.hello.log) {
            Ok(log) => logging::go_on_to(&log, self.hello.log_is_journal),
            Err(error) => log::warn!("the log of the daemon before us cannot be gone on with: {error}"),
        }
        let microseconds = |nanoseconds: u64| nanoseconds / 1000;
        let figures = json!({
            "from-pid": self.hello.pid,
            "pause-us": microseconds(pause),
            "drained-us": microseconds(drained_in),
        });
        Ok((figures, self.hello.misses_attendant))
    }

    /// Brings the front-end's connection to where it was, with its rings stopped; how to let them run, and to hear that
    /// they do.
    fn restore_session(
        number: usize,
        record: crate::upgrade::session_state::SessionState,
        mut descriptors: Descriptors,
        front_ends: &mut FrontEnds,
    ) -> Result<(mpsc::Sender<()>, mpsc::Receiver<()>), String> {
        let stream = descriptors.take(number).map(UnixStream::from).map_err(|error| error.to_string())?;
        let (prepared, is_prepared) = mpsc::channel();
        let (go, may_go) = mpsc::channel();
        let (running, is_running) = mpsc::channel();
        let steps = Steps { prepared, go: may_go, running };
        let started = front_ends.restore_session(SavedSession { stream, record, descriptors }, steps);
        started.map_err(|error| format!("no thread or descriptor left for the front-end: {error}"))?;
        is_prepared.recv().unwrap_or_else(|_| Err("the front-end's thread ended".into()))?;
        Ok((go, is_running))
    }
}

/// Tells whoever started us, on standard output: the daemon before us has ended, or will at once.
pub(super) fn tell(figures: &Value) {
    let line = format!("{}\n", json!({ "took-over": figures }));
    if !logging::print_in_time(&line) {
        log::debug!("nobody reads on standard output that the guest was taken over");
    }
}

const OUT_OF_TURN: &str = "the running virtioblkd said something out of turn; please report it as a defect";

fn say(channel: &Channel, message: &FromNew) -> Result<(), String> {
    channel.send(message, &[], ANSWER_TIMEOUT).map_err(|error| no_listener(&error))
}

fn no_listener(error: &io::Error) -> String {
    format!("the running virtioblkd does not listen: {error}")
}

fn hear(channel: &Channel, timeout: Duration) -> Result<(FromOld, Vec<OwnedFd>), String> {
    match channel.receive(timeout) {
        Ok((FromOld::Refused(why), _)) => Err(why),
        Ok(heard) => Ok(heard),
        Err(error) => Err(format!("the running virtioblkd: {error}; see its log")),
    }
}
