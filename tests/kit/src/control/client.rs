//! A QMP client of a control socket.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::WAIT_TIMEOUT;

/// A QMP client that keeps the events it meets.
pub struct Client {
    pub reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Client {
    pub fn new(stream: UnixStream) -> Self {
        Client { reader: BufReader::new(stream), events: VecDeque::new() }
    }

    /// A client that has read the greeting and negotiated, on a connection that it reads no longer than a test is patient.
    pub fn negotiated(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(WAIT_TIMEOUT)).expect("a timeout");
        let mut client = Client::new(stream);
        client.line();
        client.ask("qmp_capabilities", json!({})).expect("negotiated");
        client
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.reader.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    /// The next line, whatever it is. An ended connection is a failure.
    pub fn line(&mut self) -> Value {
        let mut line = String::new();
        assert!(self.reader.read_line(&mut line).unwrap() > 0, "the server closed the connection");
        assert!(line.ends_with("\r\n"), "{line}");
        serde_json::from_str(&line).unwrap()
    }

    /// The next reply; events on the way are kept.
    pub fn reply(&mut self) -> Value {
        loop {
            let line = self.line();
            if line.get("event").is_none() {
                return line;
            }
            self.events.push_back(line);
        }
    }

    /// Asks and waits. `Err` is the error's code.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        self.send(json!({"execute": command, "arguments": arguments}).to_string());
        let mut reply = self.reply();
        match reply["error"]["code"].as_str() {
            Some(code) => Err(code.to_owned()),
            None => Ok(reply["return"].take()),
        }
    }

    /// `copy-prepare`; the copy's name. A busy machine may be taken for a target that hangs: then it is asked for again.
    pub fn prepare_copy(&mut self, arguments: Value) -> String {
        let end = Instant::now() + WAIT_TIMEOUT;
        loop {
            match self.ask("copy-prepare", arguments.clone()) {
                Ok(prepared) => return prepared["copy"].as_str().unwrap().to_owned(),
                Err(code) => assert!(code == "target" && Instant::now() < end, "{code}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// `quiesce`; its token.
    pub fn quiesce(&mut self, arguments: Value) -> String {
        self.ask("quiesce", arguments).unwrap()["token"].as_str().unwrap().to_owned()
    }

    /// The next event, which must be this one; its data.
    pub fn event(&mut self, name: &str) -> Value {
        let mut event = self.events.pop_front().unwrap_or_else(|| self.line());
        assert_eq!(event["event"], name, "{event}");
        assert!(event["timestamp"]["seconds"].as_u64().unwrap() > 1_600_000_000);
        event["data"].take()
    }

    /// The server closes the connection and sends no more than what it owes.
    pub fn ends(&mut self) {
        let mut line = String::new();
        assert_eq!(self.reader.read_line(&mut line).unwrap(), 0, "{line}");
    }
}
