//! A small client of the guest's agent: what an operator would type into its socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use super::WAIT_TIMEOUT;

/// One connection, in step with the agent.
pub struct Agent {
    stream: BufReader<UnixStream>,
}

impl Agent {
    /// Connects, and waits until the agent answers us and nobody else.
    pub fn connect(path: &Path) -> Agent {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let stream = UnixStream::connect(path).expect("QEMU listens on the agent's socket");
        stream.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a socket takes a timeout");
        let mut agent = Agent { stream: BufReader::new(stream) };
        // 0xFF ends whatever an earlier client had begun (qemu-ga-ref, guest-sync-delimited).
        agent.send(&[0xff]);
        agent.send_line(&json!({"execute": "guest-sync-delimited", "arguments": {"id": id}}));
        loop {
            let line = agent.line();
            let answer = line.rsplit(|byte| *byte == 0xff).next().expect("rsplit gives one part at least");
            if serde_json::from_slice::<Value>(answer).is_ok_and(|answer| answer["return"] == id) {
                return agent;
            }
        }
    }

    /// Runs a command; panics if it fails.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.try_execute(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// Runs a command. `Err`: the whole error object.
    pub fn try_execute(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        self.send_line(&json!({"execute": command, "arguments": arguments}));
        let line = self.line();
        let mut answer: Value = serde_json::from_slice(&line).expect("JSON");
        if answer.get("error").is_some() { Err(answer["error"].take()) } else { Ok(answer["return"].take()) }
    }

    /// Freezes; how many filesystems.
    pub fn freeze(&mut self) -> u64 {
        self.execute("guest-fsfreeze-freeze", json!({})).as_u64().expect("a count")
    }

    /// Thaws; how many filesystems.
    pub fn thaw(&mut self) -> u64 {
        self.execute("guest-fsfreeze-thaw", json!({})).as_u64().expect("a count")
    }

    /// Whether the guest is frozen, as far as its agent knows.
    pub fn is_frozen(&mut self) -> bool {
        match self.execute("guest-fsfreeze-status", json!({})).as_str() {
            Some("frozen") => true,
            Some("thawed") => false,
            other => panic!("guest-fsfreeze-status: {other:?}"),
        }
    }

    fn send_line(&mut self, request: &Value) {
        self.send(format!("{request}\n").as_bytes());
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).expect("QEMU takes what is for the agent");
    }

    fn line(&mut self) -> Vec<u8> {
        let mut line = Vec::new();
        let bytes = self.stream.read_until(b'\n', &mut line).expect("the guest's agent answers in time");
        assert_ne!(bytes, 0, "QEMU closed the agent's socket");
        line
    }
}
