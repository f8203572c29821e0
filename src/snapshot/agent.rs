//! Talks to QEMU's guest agent on its socket, with one JSON line each way, and synchronizes with it (QEMU,
//! docs/interop/qemu-ga-ref).
//!
//! The socket does not distinguish clients: replies to an earlier client may still arrive, and a request to an agent
//! that does not run waits in the channel until the agent runs. Each connection therefore begins with
//! `guest-sync-delimited`, which is repeated after every reply that was late. A byte 0xFF before the request makes the
//! agent drop what it was reading, and 0xFF before the reply with our number marks where the replies to us begin. The
//! agent carries out one command after the other, so a reply to the sync proves that every earlier request is done,
//! also a late freeze.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::{Value, json};

use super::bounded;
use super::wait::{CancelFd, WaitEnd, pause, wait};

/// The most bytes that are read for one reply, stale replies included.
const MAX_INPUT: usize = 4 << 20;
/// The most characters of an agent's error message that are shown.
const MAX_REASON: usize = 1000;
/// How often a sync without a reply is sent again, because the agent may have been restarted.
const SYNC_RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Why the agent did not carry out a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentError {
    /// The agent does not reply; it may carry the command out later.
    Silent(String),
    /// The agent cannot be reached.
    Lost(String),
    /// The agent refuses: it did nothing, or has undone what it did.
    Refused(String),
    /// A signal ended the wait; the agent may carry the command out later.
    Cancelled,
}

impl fmt::Display for AgentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AgentError::Silent(text) | AgentError::Lost(text) | AgentError::Refused(text) => f.write_str(text),
            AgentError::Cancelled => f.write_str("interrupted"),
        }
    }
}

/// A channel to a guest's agent.
pub trait AgentChannel {
    /// Sends a command and waits for the reply, for `timeout` at most. All earlier commands are done when the reply
    /// arrives. `cancel` ends the wait, but not the command.
    fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        timeout: Duration,
        cancel: CancelFd<'_>,
    ) -> Result<Value, AgentError>;
}

/// The agent's socket, as QEMU made it (`-chardev socket,path=...` with a `virtserialport` named
/// `org.qemu.guest_agent.0`).
pub struct AgentSocket {
    path: PathBuf,
    link: Option<AgentConnection>,
    next_id: u64,
}

/// A connection to the agent's socket.
struct AgentConnection {
    stream: UnixStream,
    input: Vec<u8>,
    /// No reply is outstanding: the next line is the reply to the next request.
    in_sync: bool,
}

impl AgentSocket {
    /// Creates a channel that connects when the first command is sent.
    pub fn new(path: &Path) -> Self {
        // The numbers differ from those of earlier clients, so that their stale replies are not taken for ours. The
        // agent accepts any number of at most 63 bits.
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let first = (clock.as_nanos() as u64 ^ u64::from(std::process::id()) << 40) >> 1;
        AgentSocket { path: path.to_owned(), link: None, next_id: first & (u64::MAX >> 2) }
    }

    fn shown(&self) -> String {
        format!("the guest agent at '{}'", self.path.display())
    }

    fn silent(&self) -> AgentError {
        AgentError::Silent(format!(
            "{} does not answer: check that qemu-guest-agent runs in the guest, that the guest is not paused, and that \
             no other program is connected to the socket (libvirt is, to those of its domains: give --libvirt DOMAIN)",
            self.shown()
        ))
    }

    /// Connects if necessary, and waits until the agent's next reply is one to us.
    fn synchronize(&mut self, deadline: Instant, cancel: CancelFd<'_>) -> Result<(), AgentError> {
        if self.link.is_none() {
            self.link =
                Some(AgentConnection { stream: self.open(deadline, cancel)?, input: Vec::new(), in_sync: false });
        }
        while self.link.as_ref().is_some_and(|link| !link.in_sync) {
            self.next_id += 1;
            let id = self.next_id;
            let request = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
            self.send(format!("\u{00}{request}\n").into_bytes(), true)?;
            let again = (Instant::now() + SYNC_RETRY_INTERVAL).min(deadline);
            loop {
                match self.line(again, cancel) {
                    Ok(line) => {
                        // The bytes before the 0xFF belong to an earlier client.
                        let at = line.iter().rposition(|byte| *byte == 0xff);
                        let answer = at.and_then(|at| bounded::parse(&line[at + 1..]).ok());
                        if answer.is_some_and(|answer| answer["return"] == id) {
                            self.link()?.in_sync = true;
                            break;
                        }
                        // The agent may send such lines without end.
                        if Instant::now() >= deadline {
                            return Err(self.silent());
                        }
                    }
                    Err(AgentError::Silent(_)) if Instant::now() < deadline => break,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn link(&mut self) -> Result<&mut AgentConnection, AgentError> {
        let shown = self.shown();
        self.link.as_mut().ok_or_else(|| AgentError::Lost(format!("{shown} closed the connection")))
    }

    fn send(&mut self, mut bytes: Vec<u8>, delimited: bool) -> Result<(), AgentError> {
        if delimited {
            // 0xFF is not valid in UTF-8 and makes the agent's parser start again.
            bytes[0] = 0xff;
        }
        match self.link()?.stream.write_all(&bytes) {
            Ok(()) => Ok(()),
            // The channel is full, because no agent in the guest reads it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.link = None;
                Err(self.silent())
            }
            Err(error) => {
                self.link = None;
                Err(AgentError::Lost(format!("{} cannot be written to: {error}", self.shown())))
            }
        }
    }

    /// Reads the next line, without its newline.
    fn line(&mut self, deadline: Instant, cancel: CancelFd<'_>) -> Result<Vec<u8>, AgentError> {
        let (mut searched, mut read) = (0, 0);
        loop {
            let silent = self.silent();
            let shown = self.shown();
            let link = self.link()?;
            if let Some(end) = link.input[searched..].iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = link.input.drain(..=searched + end).collect();
                line.pop();
                return Ok(line);
            }
            searched = link.input.len();
            if searched > MAX_INPUT || read > MAX_INPUT {
                self.link = None;
                return Err(AgentError::Lost(format!("{shown} sends without end: it is no guest agent")));
            }
            match wait(&[link.stream.as_fd()], cancel, deadline) {
                Ok(WaitEnd::Ready(_)) => {}
                Ok(WaitEnd::Cancelled) => return Err(AgentError::Cancelled),
                Ok(WaitEnd::TimedOut) => return Err(silent),
                Err(error) => return Err(AgentError::Lost(format!("{shown}: poll: {error}"))),
            }
            let mut buffer = [0; 16 * 1024];
            match link.stream.read(&mut buffer) {
                Ok(0) => {
                    self.link = None;
                    return Err(AgentError::Lost(format!("{shown} closed the connection: does the guest still run?")));
                }
                Ok(count) => {
                    read += count;
                    link.input.extend_from_slice(&buffer[..count]);
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => {
                    self.link = None;
                    return Err(AgentError::Lost(format!("{shown}: {error}")));
                }
            }
        }
    }

    fn open(&self, deadline: Instant, cancel: CancelFd<'_>) -> Result<UnixStream, AgentError> {
        let lost = |errno: Errno| {
            let fix = match errno {
                Errno::NOENT => ": start the guest, and give the socket of its agent's channel",
                Errno::CONNREFUSED => ": no program listens there; does the guest still run?",
                Errno::ACCESS | Errno::PERM => ": be root or QEMU's user",
                Errno::NAMETOOLONG | Errno::INVAL => ": a socket's path has at most 107 bytes",
                _ => "",
            };
            AgentError::Lost(format!("{} cannot be reached: {}{fix}", self.shown(), io::Error::from(errno)))
        };
        let address = SocketAddrUnix::new(&self.path).map_err(lost)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(lost)?;
        loop {
            match connect(&socket, &address) {
                Ok(()) => return Ok(UnixStream::from(socket)),
                // The queue of connections to accept is full.
                Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {
                    match pause(Duration::from_millis(50), cancel) {
                        Ok(true) => {}
                        Ok(false) => return Err(AgentError::Cancelled),
                        Err(error) => return Err(AgentError::Lost(format!("{}: poll: {error}", self.shown()))),
                    }
                }
                Err(Errno::AGAIN | Errno::INTR) => return Err(self.silent()),
                Err(errno) => return Err(lost(errno)),
            }
        }
    }
}

impl AgentChannel for AgentSocket {
    fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        timeout: Duration,
        cancel: CancelFd<'_>,
    ) -> Result<Value, AgentError> {
        let deadline = Instant::now() + timeout;
        self.synchronize(deadline, cancel)?;
        let request = request(command, arguments);
        self.link()?.in_sync = false;
        self.send(format!("{request}\n").into_bytes(), false)?;
        let line = self.line(deadline, cancel)?;
        self.link()?.in_sync = true;
        answer(&self.shown(), command, &line).inspect_err(|error| {
            if matches!(error, AgentError::Lost(_)) {
                self.link = None;
            }
        })
    }
}

impl AsFd for AgentConnection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The request for a command, in the agent's JSON.
pub fn request(command: &str, arguments: Value) -> Value {
    match arguments.is_null() {
        true => json!({"execute": command}),
        false => json!({"execute": command, "arguments": arguments}),
    }
}

/// Parses a reply: `{"return": ...}` or `{"error": {"class", "desc"}}`. `who` names the agent in errors.
pub fn answer(who: &str, command: &str, line: &[u8]) -> Result<Value, AgentError> {
    let malformed = || {
        let start = String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned();
        AgentError::Lost(format!("{who} answers {command} with text that is not a reply: {start:?}"))
    };
    let mut value = bounded::parse(line).map_err(|_| malformed())?;
    if let Some(error) = value.get("error") {
        let why = error["desc"].as_str().or(error["class"].as_str()).unwrap_or("it gives no reason");
        let why: String = why.chars().take(MAX_REASON).collect();
        return Err(AgentError::Refused(format!("{who} refuses {command}: {why}")));
    }
    value.get_mut("return").map(Value::take).ok_or_else(malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;

    #[test]
    fn an_agent_that_sends_without_end_is_given_up_in_time() {
        for text in ["{}\n", "[1,", "\n"] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("qga");
            let listener = UnixListener::bind(&path).unwrap();
            std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                while stream.write_all(text.repeat(1000).as_bytes()).is_ok() {}
            });
            let (done, result) = mpsc::channel();
            std::thread::spawn(move || {
                let asked =
                    AgentSocket::new(&path).execute("guest-ping", Value::Null, Duration::from_millis(500), None);
                done.send(asked)
            });
            let asked = result.recv_timeout(Duration::from_secs(60)).expect("it waits for ever");
            assert!(matches!(asked, Err(AgentError::Silent(_) | AgentError::Lost(_))), "{asked:?}");
        }
    }

    #[test]
    fn an_answer_is_read_within_bounds() {
        let big = [b"{\"return\": [".to_vec(), b"1,".repeat(1_000_000), b"1]}".to_vec()].concat();
        assert!(matches!(answer("it", "guest-info", &big), Err(AgentError::Lost(_))));
        let long = format!("{{\"error\": {{\"desc\": \"{}\"}}}}", "x".repeat(1 << 20));
        let Err(AgentError::Refused(text)) = answer("it", "guest-info", long.as_bytes()) else { panic!("not refused") };
        assert!(text.len() < 2000);
    }
}
