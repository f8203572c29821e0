//! Reads the arguments of one command, and checks the type and bounds of each.

use std::time::Duration;

use serde_json::{Map, Value};

use super::Error;
use super::MAX_TIMEOUT;

/// The longest `who`, in bytes.
pub const MAX_WHO: usize = 256;

/// The arguments of one command. Each method removes the argument that it reads. Arguments that are left at the end are
/// unknown.
pub(in crate::control) struct Args<'a> {
    pub(super) command: &'a str,
    pub(super) given: Map<String, Value>,
}

impl Args<'_> {
    /// Reads a boolean argument. `None`: it is not given.
    pub(in crate::control) fn boolean(&mut self, name: &str) -> Result<Option<bool>, Error> {
        match self.given.remove(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong_type(name, "true or false", &other)),
        }
    }

    /// Reads a string of at most `longest` bytes. `None`: it is not given.
    pub(in crate::control) fn text(&mut self, name: &str, longest: usize) -> Result<Option<String>, Error> {
        match self.given.remove(name) {
            None => Ok(None),
            Some(Value::String(value)) if value.len() <= longest => Ok(Some(value)),
            Some(Value::String(_)) => Err(Error::argument(format!("'{name}' is longer than {longest} bytes"))),
            Some(other) => Err(wrong_type(name, "a string", &other)),
        }
    }

    /// Reads a time from 1 ms to [`MAX_TIMEOUT`]. `None`: it is not given.
    pub(in crate::control) fn milliseconds(&mut self, name: &str) -> Result<Option<Duration>, Error> {
        let most = MAX_TIMEOUT.as_millis() as u64;
        let Some(value) = self.given.remove(name) else { return Ok(None) };
        match value.as_u64() {
            Some(number) if (1..=most).contains(&number) => Ok(Some(Duration::from_millis(number))),
            None if !value.is_number() => Err(wrong_type(name, "a whole number of milliseconds", &value)),
            _ => Err(Error::argument(format!(
                "'{name}' must be a whole number of milliseconds from 1 to {most}, not {value}"
            ))),
        }
    }

    /// Reads a number of bytes. `None`: it is not given.
    pub(in crate::control) fn bytes(&mut self, name: &str) -> Result<Option<u64>, Error> {
        self.whole(name, "a whole number of bytes")
    }

    /// Reads a number. `None`: it is not given.
    pub(in crate::control) fn number(&mut self, name: &str) -> Result<Option<u64>, Error> {
        self.whole(name, "a whole number")
    }

    fn whole(&mut self, name: &str, wanted: &str) -> Result<Option<u64>, Error> {
        let Some(value) = self.given.remove(name) else { return Ok(None) };
        match value.as_u64() {
            Some(number) => Ok(Some(number)),
            None if !value.is_number() => Err(wrong_type(name, wanted, &value)),
            None => Err(Error::argument(format!("'{name}' must be {wanted}, not {value}"))),
        }
    }

    /// Fails if an argument is left, which the command does not know.
    pub(super) fn finish(self) -> Result<(), Error> {
        match self.given.keys().next() {
            None => Ok(()),
            Some(name) => {
                let desc = format!("{} has no argument '{}'", self.command, shown(name));
                Err(Error::argument(desc))
            }
        }
    }
}

fn wrong_type(name: &str, wanted: &str, value: &Value) -> Error {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    Error::argument(format!("'{name}' must be {wanted}, not {kind}"))
}

/// Cuts a name from a request, so that it fits into an error message.
pub(super) fn shown(name: &str) -> String {
    match name.char_indices().nth(64) {
        Some((end, _)) => format!("{}...", &name[..end]),
        None => name.to_owned(),
    }
}
