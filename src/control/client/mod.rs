//! A client of the control socket: connects, negotiates, sends requests and reads replies and events. `virtioblkctl`,
//! its snapshots, libvirt's hook and a daemon that takes over use it. Each wait has a deadline, unless the caller gives
//! none.

mod open;

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg};
use rustix::event::{PollFd, PollFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::base::wait::wait_until;
use open::open;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::protocol::return_types::Status;

/// How long a daemon may take to reply to any request except `quiesce`.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest line in bytes. virtioblkd sends no longer one.
const MAX_LINE: usize = 16 << 20;

/// The most bytes of events that are kept while a reply is awaited. virtioblkd disconnects a client long before.
const MAX_EVENT_BYTES: usize = 16 << 20;

/// Why a command failed: a code for programs and a message for people.
#[derive(Debug)]
pub struct Failure {
    /// The daemon's error code (docs/control-protocol.md), or one of this client: `no-daemon`, `no-permission`,
    /// `no-answer`, `not-virtioblkd`.
    pub code: String,
    /// What failed, why, and how to fix it.
    pub message: String,
}

impl Failure {
    /// Creates a failure that this program detected.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Failure { code: code.into(), message: message.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// One line that the daemon sent.
pub enum Message {
    /// The reply to the oldest request that has none yet.
    Reply(Result<Value, Failure>),
    /// An event, as the whole JSON message.
    Event(Value),
}

/// A connection to a daemon that has negotiated.
pub struct Client {
    stream: UnixStream,
    name: String,
    input: Vec<u8>,
    events: VecDeque<Value>,
    /// The length of all `events` as text.
    event_bytes: usize,
    /// The process that wrote everything which was read.
    writer: Writer,
}

/// The process that wrote the bytes that were read, according to the kernel (SCM_CREDENTIALS, unix(7)).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Writer {
    /// Nothing was read yet.
    None,
    /// One process wrote all bytes: its user, and its id in our process namespace (0: it has none there).
    Process(u32, i32),
    /// Several processes wrote the bytes, or an unknown one did.
    Unknown,
}

impl Client {
    /// Connects and negotiates, within [`REPLY_TIMEOUT`].
    pub fn connect(path: &Path) -> Result<Self, Failure> {
        Self::connect_within(path, REPLY_TIMEOUT)
    }

    /// Like [`Client::connect`], within `timeout`.
    pub fn connect_within(path: &Path, timeout: Duration) -> Result<Self, Failure> {
        let deadline = Instant::now() + timeout;
        let stream = open(path, deadline)?;
        let name = path.display().to_string();
        let mut client =
            Client { stream, name, input: Vec::new(), events: VecDeque::new(), event_bytes: 0, writer: Writer::None };
        // Sent before the greeting is read: a vhost-user socket sends no greeting, but hangs up after a message that it
        // does not know. A daemon that refuses us may have hung up already; then its reason is read below.
        let _ = client.send("qmp_capabilities", json!({}));
        let greeting = client.line(Some(deadline)).map_err(|failure| client.ungreeted(failure))?;
        if let Some(failure) = refusal(&greeting) {
            return Err(failure);
        }
        if !greeting["QMP"].is_object() {
            return Err(Failure::new("not-virtioblkd", format!("'{}' does not speak QMP: {greeting}", client.name)));
        }
        client.reply(deadline)?;
        Ok(client)
    }

    /// Returns the user that wrote everything which was read so far. `None`: several users did, or the user is unknown.
    /// SO_PEERCRED would name the user that created the socket, which is root for a daemon that became another user
    /// later.
    pub fn writer(&self) -> Option<u32> {
        match self.writer {
            Writer::Process(uid, _) => Some(uid),
            Writer::None | Writer::Unknown => None,
        }
    }

    /// Returns the process that wrote everything which was read so far, in our process namespace. `None`: several
    /// processes did, or the process is unknown or outside of our namespace. The id comes from the kernel, not from the
    /// daemon.
    pub fn writer_pid(&self) -> Option<u32> {
        match self.writer {
            Writer::Process(_, pid) => u32::try_from(pid).ok().filter(|pid| *pid > 0),
            Writer::None | Writer::Unknown => None,
        }
    }

    /// Returns the stream, on which another protocol is spoken after the last reply. Fails if more than that reply was
    /// read.
    pub(crate) fn into_stream(self) -> Result<UnixStream, Failure> {
        match self.input.is_empty() {
            true => Ok(self.stream),
            false => Err(Failure::new("not-virtioblkd", format!("'{}' says more than it was asked", self.name))),
        }
    }

    /// Sends a request and waits for its reply. [`Client::next`] returns the events that arrive meanwhile.
    pub fn execute(&mut self, command: &str, arguments: Value, timeout: Duration) -> Result<Value, Failure> {
        self.send(command, arguments)?;
        self.reply(Instant::now() + timeout)
    }

    /// Sends `query-status` and waits for the reply.
    pub fn query_status(&mut self, timeout: Duration) -> Result<Status, Failure> {
        parse(self.execute("query-status", json!({}), timeout)?)
    }

    fn reply(&mut self, deadline: Instant) -> Result<Value, Failure> {
        loop {
            match self.message(Some(deadline))? {
                Message::Reply(reply) => return reply,
                Message::Event(event) => self.keep(event)?,
            }
        }
    }

    /// Keeps an event for [`Client::next`]. Fails if the daemon sends so many that memory would run out.
    fn keep(&mut self, event: Value) -> Result<(), Failure> {
        self.event_bytes += event.to_string().len();
        if self.event_bytes > MAX_EVENT_BYTES {
            return Err(Failure::new("not-virtioblkd", format!("'{}' sends events without end", self.name)));
        }
        self.events.push_back(event);
        Ok(())
    }

    fn kept(&mut self) -> Option<Value> {
        let event = self.events.pop_front();
        if self.events.is_empty() {
            self.event_bytes = 0;
        }
        event
    }

    /// Sends a request together with a descriptor, and waits for the reply as [`Client::execute`] does.
    pub fn pass_descriptor(
        &mut self,
        command: &str,
        arguments: Value,
        descriptor: BorrowedFd<'_>,
        timeout: Duration,
    ) -> Result<Value, Failure> {
        let request = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor];
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        let parts = [IoSlice::new(request.as_bytes())];
        let sent = sendmsg(&self.stream, &parts, &mut ancillary, SendFlags::NOSIGNAL);
        let sent = sent.map_err(|errno| self.lost(&errno.into()))?;
        // Rarely anything is left.
        self.stream.write_all(&request.as_bytes()[sent..]).map_err(|error| self.lost(&error))?;
        self.reply(Instant::now() + timeout)
    }

    /// Sends a request; [`Client::next`] returns its reply.
    pub fn send(&mut self, command: &str, arguments: Value) -> Result<(), Failure> {
        let request = json!({"execute": command, "arguments": arguments});
        // A request is far smaller than the socket's buffer. If it does not fit, the daemon does not read.
        self.stream.write_all(format!("{request}\n").as_bytes()).map_err(|error| self.lost(&error))
    }

    /// Returns the next event or reply. Without a deadline it waits for ever.
    pub fn next(&mut self, deadline: Option<Instant>) -> Result<Message, Failure> {
        match self.kept() {
            Some(event) => Ok(Message::Event(event)),
            None => self.message(deadline),
        }
    }

    /// Returns the next event or reply if it has arrived. Never waits. For callers that poll several daemons.
    pub fn try_next(&mut self) -> Result<Option<Message>, Failure> {
        match self.kept() {
            Some(event) => Ok(Some(Message::Event(event))),
            None => self.try_message(),
        }
    }

    /// Returns the reply if it has arrived. [`Client::next`] returns the events before it. Never waits.
    pub fn try_reply(&mut self) -> Result<Option<Result<Value, Failure>>, Failure> {
        loop {
            match self.try_message()? {
                Some(Message::Reply(reply)) => return Ok(Some(reply)),
                Some(Message::Event(event)) => self.keep(event)?,
                None => return Ok(None),
            }
        }
    }

    fn try_message(&mut self) -> Result<Option<Message>, Failure> {
        while !self.input.contains(&b'\n') {
            if !wait_readable(&self.stream, Some(Instant::now())).map_err(|error| self.lost(&error))? {
                return Ok(None);
            }
            if self.input.len() > MAX_LINE {
                return Err(Failure::new("not-virtioblkd", format!("'{}' does not speak QMP", self.name)));
            }
            self.read_more(Some(Instant::now()))?;
        }
        self.message(Some(Instant::now())).map(Some)
    }

    /// Whether [`Client::next`] would return a message without reading from the socket.
    pub fn has_more(&self) -> bool {
        !self.events.is_empty() || self.input.contains(&b'\n')
    }

    fn message(&mut self, deadline: Option<Instant>) -> Result<Message, Failure> {
        let mut value = self.line(deadline)?;
        if value.get("event").is_some() {
            return Ok(Message::Event(value));
        }
        Ok(Message::Reply(match refusal(&value) {
            Some(failure) => Err(failure),
            None => Ok(value["return"].take()),
        }))
    }

    fn line(&mut self, deadline: Option<Instant>) -> Result<Value, Failure> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.input[searched..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=searched + end).collect();
                return serde_json::from_slice(&line).map_err(|error| {
                    Failure::new("not-virtioblkd", format!("'{}' does not speak QMP: {error}", self.name))
                });
            }
            searched = self.input.len();
            if searched > MAX_LINE {
                return Err(Failure::new("not-virtioblkd", format!("'{}' does not speak QMP", self.name)));
            }
            // Also where something can be read at once: a daemon may send without end.
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Err(self.no_answer());
            }
            self.read_more(deadline)?;
        }
    }

    fn read_more(&mut self, deadline: Option<Instant>) -> Result<(), Failure> {
        if !wait_readable(&self.stream, deadline).map_err(|error| self.lost(&error))? {
            return Err(self.no_answer());
        }
        let mut buffer = [0; 16 * 1024];
        match self.receive(&mut buffer) {
            Ok(0) => Err(self.lost(&io::Error::from(io::ErrorKind::UnexpectedEof))),
            Ok(count) => {
                self.input.extend_from_slice(&buffer[..count]);
                Ok(())
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(()),
            Err(error) => Err(self.lost(&error)),
        }
    }

    /// Reads bytes and records which process wrote them. The kernel closes descriptors that come with them, because
    /// there is no room for them.
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = nix::cmsg_space!(UnixCredentials);
        let mut into = [IoSliceMut::new(buffer)];
        let message = recvmsg::<()>(self.stream.as_raw_fd(), &mut into, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let mut from = Writer::Unknown;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmCredentials(credentials) = part {
                from = Writer::Process(credentials.uid(), credentials.pid());
            }
        }
        if message.bytes > 0 {
            self.writer = if self.writer == Writer::None || self.writer == from { from } else { Writer::Unknown };
        }
        Ok(message.bytes)
    }

    /// Returns the failure of a connection that ended before the greeting. The likely cause is the wrong socket, not
    /// the daemon.
    fn ungreeted(&self, failure: Failure) -> Failure {
        if failure.code != "no-daemon" || !self.input.is_empty() {
            return failure;
        }
        let message = format!(
            "'{}' closed the connection without a greeting: it is not a control socket (give the one of virtioblkd's \
             --control-path, not of --socket-path), or its daemon is ending (see its log)",
            self.name
        );
        Failure::new("no-daemon", message)
    }

    fn lost(&self, error: &io::Error) -> Failure {
        let why = match error.kind() {
            io::ErrorKind::WouldBlock => "it reads no requests".to_owned(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                "it closed the connection".to_owned()
            }
            _ => error.to_string(),
        };
        Failure::new(
            "no-daemon",
            format!("the daemon behind '{}' is lost: {why}. See its log, and whether it still runs", self.name),
        )
    }

    fn no_answer(&self) -> Failure {
        Failure::new(
            "no-answer",
            format!(
                "no answer from '{}' in time: its daemon is stopped or stuck (see its log), or this is not a quiesce \
                 socket (give the one of virtioblkd's --control-path, not of --socket-path)",
                self.name
            ),
        )
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Deserializes a value that the daemon sent.
pub fn parse<T: DeserializeOwned>(value: Value) -> Result<T, Failure> {
    serde_json::from_value(value).map_err(|error| {
        let message = format!(
            "cannot read the daemon's reply ({error}): use the virtioblkctl of the daemon's version, or --json"
        );
        Failure::new("internal", message)
    })
}

fn refusal(value: &Value) -> Option<Failure> {
    let error = value.get("error")?;
    let code = error["code"].as_str().or(error["class"].as_str()).unwrap_or("unknown");
    Some(Failure::new(code, in_cli_words(error["desc"].as_str().unwrap_or("the daemon gave no reason"))))
}

/// Replaces words of the protocol in the daemon's advice by those of `virtioblkctl`, which the user can type.
fn in_cli_words(text: &str) -> String {
    const WORDS: [(&str, &str); 7] = [
        ("query-status", "'virtioblkctl status'"),
        ("query-stats", "'virtioblkctl stats'"),
        ("query-copies", "'virtioblkctl copies'"),
        ("timeout-ms", "--timeout"),
        ("lease-ms", "--lease"),
        ("renew-lease", "'virtioblkctl renew'"),
        ("'detached': true", "'virtioblkctl quiesce' without a command"),
    ];
    WORDS.iter().fold(text.to_owned(), |text, (protocol, cli)| text.replace(protocol, cli))
}

fn wait_readable(socket: impl AsFd, deadline: Option<Instant>) -> io::Result<bool> {
    wait_until(&mut [PollFd::new(&socket, PollFlags::IN)], deadline)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::control::quiesce::{EndReason, Refusal};
    use crate::control::service::replies::{no_such_hold, refused};

    /// The daemon's errors have the words of the protocol, and `virtioblkctl` shows its own words.
    #[test]
    fn an_error_advises_clients_of_arguments_and_operators_of_options() {
        for (error, protocol, cli) in [
            (refused(Refusal::Timeout), &["timeout-ms", "query-stats"][..], &["--timeout", "'virtioblkctl stats'"][..]),
            (
                no_such_hold(Some(EndReason::LeaseExpired), false),
                &["lease-ms", "renew-lease"],
                &["--lease", "'virtioblkctl renew'"],
            ),
            (no_such_hold(Some(EndReason::ConnectionClosed), false), &["'detached': true"], &["without a command"]),
        ] {
            let line: Value = serde_json::from_slice(&crate::control::protocol::reply(None, Err(error))).unwrap();
            let said = line["error"]["desc"].as_str().unwrap();
            let shown = refusal(&line).unwrap().message;
            assert!(protocol.iter().all(|word| said.contains(word) && !shown.contains(word)), "{said}: {shown}");
            assert!(cli.iter().all(|word| shown.contains(word)), "{shown}");
        }
    }

    /// A broken daemon holds nobody up, however much it sends.
    #[test]
    fn events_without_end_are_no_answer() {
        let place = tempfile::tempdir().unwrap();
        for event_bytes in [10, 1 << 20] {
            let path = place.path().join(format!("control-{event_bytes}"));
            let listener = UnixListener::bind(&path).unwrap();
            let flooding = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(b"{\"QMP\": {}}\n{\"return\": {}}\n").unwrap();
                let event = format!("{}\n", json!({"event": "X", "data": "x".repeat(event_bytes)}));
                while stream.write_all(event.as_bytes()).is_ok() {}
            });
            let mut client = Client::connect(&path).unwrap();
            let start = Instant::now();
            let failure = client.execute("query-status", json!({}), Duration::from_millis(300)).unwrap_err();
            assert!(start.elapsed() < Duration::from_secs(60), "{failure:?}");
            assert!(["no-answer", "not-virtioblkd"].contains(&failure.code.as_str()), "{failure:?}");
            drop(client);
            flooding.join().unwrap();
        }
    }
}
