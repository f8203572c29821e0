//! A small QMP client, for QEMU's monitor and for the quiesce socket, which speaks the same dialect.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use super::{WAIT_TIMEOUT, wait_until};

/// One connection.
pub struct Qmp {
    stream: BufReader<UnixStream>,
    /// Events that came before a reply, oldest first.
    pub events: Vec<Value>,
}

impl Qmp {
    /// Connects (the socket may still be about to appear), reads the greeting, negotiates.
    pub fn connect(path: &Path) -> Qmp {
        let mut stream = None;
        wait_until(&format!("a QMP socket at {}", path.display()), || {
            stream = UnixStream::connect(path).ok();
            stream.is_some()
        });
        let stream = stream.expect("connected");
        stream.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a socket takes a timeout");
        let mut qmp = Qmp { stream: BufReader::new(stream), events: Vec::new() };
        let greeting = qmp.read();
        assert!(greeting["QMP"]["version"].is_object(), "a QMP greeting, got {greeting}");
        qmp.execute("qmp_capabilities", json!({}));
        qmp
    }

    /// Runs a command; panics if it fails.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.try_execute(command, arguments).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// Runs a command. `Err`: the whole error object.
    pub fn try_execute(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).unwrap_or_else(|error| panic!("{command}: {error}"));
        loop {
            let mut message = self.read();
            if message.get("event").is_some() {
                self.events.push(message);
            } else if message.get("error").is_some() {
                return Err(message["error"].take());
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// The next event of this name, waited for.
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            if let Some(found) = self.events.iter().position(|event| event["event"] == name) {
                return self.events.remove(found);
            }
            let message = self.read();
            assert!(message.get("event").is_some(), "waiting for {name}, got {message}");
            self.events.push(message);
        }
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        let bytes = self.stream.read_line(&mut line).expect("a QMP message in time");
        assert_ne!(bytes, 0, "the QMP peer hung up");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("not JSON ({error}): {line}"))
    }
}
