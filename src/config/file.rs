//! Reads the configuration file: a flat TOML table whose keys are the long options. Each pair is translated into the
//! equivalent argument, so that the file and the command line share their rules and messages.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;

use clap::CommandFactory;
use toml::de::{DeTable, DeValue};

use super::args::Args;
use super::{ConfigError, refuse, strip, toml_error};
use crate::base::trust;

/// Options that are allowed on the command line only.
const ONLY_ARGUMENTS: [&str; 7] = ["config", "print-capabilities", "take-over", "check", "run", "help", "version"];
/// The largest configuration file in bytes. A larger file is something else, perhaps the image.
const MAX_FILE: u64 = 1 << 20;
/// Options that may be given several times: in the file, as a list or as a table of names and values.
const REPEATED: [&str; 3] = ["rbd-option", "copy-dir", "throttle"];
/// The options of [`REPEATED`] whose values have names, so that they may be tables.
const TABLES: [&str; 2] = ["rbd-option", "throttle"];
/// Options with permission bits, which must be in quotes because they are octal and a number in TOML is decimal.
const QUOTED: [&str; 2] = ["socket-mode", "control-mode"];

/// Reads the file. Returns its keys, each with the equivalent argument. Errors name the file, the line and the key.
pub(super) fn read(path: &Path) -> Result<Vec<(String, OsString)>, ConfigError> {
    let name = path.display();
    let mut text = String::new();
    let failed = |error: io::Error| {
        let fix = match error.kind() {
            io::ErrorKind::NotFound => "create it (virtioblkd.toml(5) has an example), or correct the path",
            io::ErrorKind::PermissionDenied => "let the user that starts virtioblkd read it",
            _ => "give a TOML file (virtioblkd.toml(5) has an example)",
        };
        ConfigError(format!("--config {name}: cannot read the configuration file: {error}; {fix}"))
    };
    let file = File::open(path).map_err(failed)?;
    trust::check_open(path, &file).map_err(|why| ConfigError(format!("--config {name}: {why}")))?;
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE {
        return refuse(format!(
            "--config {name}: the file is larger than {MAX_FILE} bytes; give a TOML configuration file"
        ));
    }
    parse(&name.to_string(), &text)
}

/// Names that are less similar than this have nothing in common but a few letters.
const LEAST_SIMILARITY: f64 = 0.75;

/// Returns the name in `known` that is most similar to `given`, for an error about an unknown name. Returns `None` if none is
/// similar.
pub(crate) fn nearest<'a>(known: impl Iterator<Item = &'a str>, given: &str) -> Option<&'a str> {
    let given = given.to_lowercase();
    let rated = known.map(|name| (strsim::jaro_winkler(name, &given), name));
    let (similarity, name) = rated.max_by(|one, other| one.0.total_cmp(&other.0))?;
    (similarity >= LEAST_SIMILARITY).then_some(name)
}

/// The keys that a configuration file may have: the long options, except those that are allowed on the command line only
/// and those for tests.
pub fn file_keys() -> Vec<String> {
    let command = Args::command();
    let keys = command.get_arguments().filter(|argument| !argument.is_hide_set());
    let keys = keys.filter_map(|argument| argument.get_long());
    keys.filter(|name| !ONLY_ARGUMENTS.contains(name)).map(str::to_owned).collect()
}

pub(super) fn parse(name: &str, text: &str) -> Result<Vec<(String, OsString)>, ConfigError> {
    let table = DeTable::parse(text).map_err(|error| {
        let line = error.span().map(|span| line_of(text, span));
        let place = line.map_or(String::new(), |line| format!(":{line}"));
        let content = line.and_then(|line| text.lines().nth(line - 1)).unwrap_or_default();
        ConfigError(format!("{name}{place}: not TOML: {}", toml_error::explain(error.message(), content)))
    })?;
    let mut arguments = Vec::new();
    for (key, value) in table.get_ref() {
        let place = format!("{name}:{}", line_of(text, key.span()));
        let key = key.get_ref().as_ref();
        check_section(&place, key, value.get_ref())?;
        check_key(&place, key)?;
        for word in argument_values(&place, key, value.get_ref())? {
            let argument = OsString::from(format!("--{key}={word}"));
            check_value(&place, key, &word, &argument)?;
            arguments.push((key.to_string(), argument));
        }
    }
    Ok(arguments)
}

fn line_of(text: &str, span: Range<usize>) -> usize {
    1 + text.as_bytes()[..span.start.min(text.len())].iter().filter(|byte| **byte == b'\n').count()
}

/// Refuses a section, such as `[disk]`, and a dotted key. Only the options of [`TABLES`] may be sections.
fn check_section(place: &str, key: &str, value: &DeValue<'_>) -> Result<(), ConfigError> {
    let is_section = match value {
        DeValue::Table(_) => !TABLES.contains(&key),
        DeValue::Array(values) => {
            !values.is_empty() && values.iter().all(|value| matches!(value.get_ref(), DeValue::Table(_)))
        }
        _ => false,
    };
    match is_section {
        false => Ok(()),
        true if TABLES.contains(&key) => {
            refuse(format!("{place}: write [{key}] once, in single brackets, before its options"))
        }
        true => refuse(format!(
            "{place}: '{key}' is a section or a table, and options are in none: remove the line [{key}] or the prefix '{key}.', \
             and write each option as key = value. The only sections are [{}], at the end of the file",
            TABLES.join("] and [")
        )),
    }
}

fn check_key(place: &str, key: &str) -> Result<(), ConfigError> {
    let command = Args::command();
    let known = || command.get_arguments().filter_map(|argument| argument.get_long());
    if ONLY_ARGUMENTS.contains(&key) {
        return refuse(format!("{place}: '{key}' can only be given on the command line, as --{key}"));
    }
    if known().any(|name| name == key) {
        return Ok(());
    }
    let own = super::with_own_name(&format!("--{key}"));
    if own[2..] != *key {
        return refuse(format!("{place}: unknown key '{key}'; in this file it is '{}'", &own[2..]));
    }
    let allowed = known().filter(|name| !ONLY_ARGUMENTS.contains(name));
    match nearest(allowed, &key.replace('_', "-")) {
        Some(name) => refuse(format!("{place}: unknown key '{key}'; the nearest known one is '{name}'")),
        None => refuse(format!("{place}: unknown key '{key}'; virtioblkd.toml(5) lists the known ones")),
    }
}

/// Translates a key's value into the values of arguments. An option that may be repeated can have a list or a table.
fn argument_values(place: &str, key: &str, value: &DeValue<'_>) -> Result<Vec<String>, ConfigError> {
    match value {
        DeValue::Array(values) if REPEATED.contains(&key) => {
            values.iter().map(|value| argument_value(place, key, value.get_ref())).collect()
        }
        DeValue::Table(table) if REPEATED.contains(&key) => table
            .iter()
            .map(|(name, value)| Ok(format!("{}={}", name.get_ref(), argument_value(place, key, value.get_ref())?)))
            .collect(),
        value => Ok(vec![argument_value(place, key, value)?]),
    }
}

/// Translates one value into the value of an argument.
fn argument_value(place: &str, key: &str, value: &DeValue<'_>) -> Result<String, ConfigError> {
    match value {
        DeValue::String(text) => Ok(text.to_string()),
        DeValue::Integer(number) if QUOTED.contains(&key) => {
            refuse(format!("{place}: {key} is octal, so write it in quotes, such as {key} = \"0660\" (found {number})"))
        }
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Ok(number.to_string()),
            Err(error) => refuse(format!("{place}: {key} = {number}: {error}")),
        },
        DeValue::Boolean(truth) => Ok(truth.to_string()),
        other => refuse(format!(
            "{place}: {key} is of type {}; give text in quotes, a whole number, or true or false",
            other.type_str()
        )),
    }
}

/// Parses the argument alone, so that an error can name the line.
fn check_value(place: &str, key: &str, word: &str, argument: &OsString) -> Result<(), ConfigError> {
    let Err(error) = Args::command().try_get_matches_from([OsString::from("virtioblkd"), argument.clone()]) else {
        return Ok(());
    };
    match std::error::Error::source(&error) {
        Some(reason) => refuse(format!("{place}: invalid value '{word}' for {key}: {reason}")),
        None => refuse(format!("{place}: {key}: {}", strip(&error).lines().next().unwrap_or("it is not valid"))),
    }
}
