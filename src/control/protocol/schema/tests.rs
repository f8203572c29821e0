//! The schema has every command, argument, reply, event and error code of the code, and nothing else.

use std::collections::BTreeSet;
use std::path::Path;

use kit::control::schema::{EmptyWord, entry, type_fault};

use super::*;
use crate::control::access::Access;
use crate::control::protocol::{commands, parse};

/// A value of each type, for arguments.
fn sample(kind: &str) -> Value {
    match kind {
        "str" => json!("/x"),
        "int" => json!(1),
        "bool" => json!(false),
        _ => json!([]),
    }
}

fn members(list: &str) -> Vec<(&str, &str)> {
    list.split(", ").filter_map(|member| member.split_once(": ")).collect()
}

/// Arguments with which a command is accepted.
fn least(command: &str, list: &str) -> Value {
    let needed = members(list).into_iter().filter(|(name, _)| !name.ends_with('?'));
    let mut arguments: Value = needed.map(|(name, kind)| (name.to_owned(), sample(kind))).collect();
    if command == "resume" {
        arguments["token"] = json!("x");
    }
    arguments
}

fn ask(command: &str, arguments: &Value) -> Result<(), String> {
    let request = json!({"execute": command, "arguments": arguments});
    let read = parse(request, command != "qmp_capabilities", Access::All).command;
    read.map(|_| ()).map_err(|error| error.desc)
}

#[test]
fn the_schema_has_the_commands_of_the_code_in_their_order() {
    let code: Vec<&str> = commands::COMMANDS.iter().map(|(name, ..)| *name).collect();
    let schema: Vec<&str> = COMMANDS.iter().map(|(name, ..)| *name).collect();
    assert_eq!(schema, code);
}

#[test]
fn each_command_takes_the_arguments_of_the_schema_and_no_others() {
    let all: BTreeSet<(&str, &str)> = COMMANDS
        .iter()
        .flat_map(|(_, list, _)| members(list))
        .map(|(name, kind)| (name.trim_end_matches('?'), kind))
        .collect();
    for (command, list, _) in COMMANDS {
        let base = least(command, list);
        assert_eq!(ask(command, &base), Ok(()), "{command} {base}");
        let own: Vec<(&str, &str)> =
            members(list).into_iter().map(|(name, kind)| (name.trim_end_matches('?'), kind)).collect();
        for (name, kind) in &all {
            let mut arguments = base.clone();
            arguments[name] = sample(kind);
            let refused = ask(command, &arguments).is_err_and(|why| why.contains("has no argument"));
            let is_known = own.iter().any(|(own, _)| own == name);
            assert_eq!(refused, !is_known, "{command}: '{name}' of the type {kind}");
        }
        // Each argument that must be there is missed.
        for (name, _) in members(list).into_iter().filter(|(name, _)| !name.ends_with('?')) {
            let mut arguments = base.clone();
            arguments.as_object_mut().expect("an object").remove(name);
            assert!(ask(command, &arguments).is_err(), "{command} without {name}");
        }
    }
}

/// Every reply and event of the recorded conversation, whose figures are none of them absent.
#[test]
fn every_recorded_reply_and_event_is_of_the_schemas_types() {
    let schema = schema();
    let schema = schema.as_array().expect("a list");
    let mut seen = BTreeSet::new();
    for line in include_str!("../../service/recorded.jsonl").lines() {
        let text = &line[line.find('{').expect("an object")..];
        let text = text.replace("\"pid\":PID", "\"pid\":1").replace("TIMESTAMP", "{}");
        let message: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let (kind, value) = if let Some(event) = message["event"].as_str() {
            seen.insert(event.to_owned());
            (entry(schema, event)["arg-type"].clone(), &message["data"])
        } else if message.get("error").is_some() {
            (json!("ErrorCode"), &message["error"]["code"])
        } else {
            let command = message["id"].as_str().expect("the command's name");
            seen.insert(command.to_owned());
            (entry(schema, command)["ret-type"].clone(), &message["return"])
        };
        let fault = type_fault(schema, kind.as_str().expect("a string"), value, EmptyWord::Allowed);
        assert_eq!(fault, None, "{text}");
    }
    assert!(seen.len() > 30, "{seen:?}");
}

#[test]
fn every_type_that_the_schema_names_is_in_it_once() {
    let schema = schema();
    let schema = schema.as_array().expect("a list");
    let mut names = BTreeSet::new();
    for item in schema {
        assert!(names.insert(item["name"].to_string()), "{} is there twice", item["name"]);
        let own = ["arg-type", "ret-type", "element-type"].map(|key| item[key].as_str());
        let members = item["members"].as_array().into_iter().flatten().map(|member| member["type"].as_str());
        for name in own.into_iter().chain(members).flatten() {
            entry(schema, name);
        }
    }
    // A reply that a client reads slowly must fit into its connection's buffer.
    assert!(Value::from(schema.clone()).to_string().len() < 64 * 1024);
}

/// The words that follow one of `starts` as a string literal, in every file below `dir`.
fn literals(dir: &Path, starts: &[&str], found: &mut BTreeSet<String>) {
    for file in std::fs::read_dir(dir).expect("a directory") {
        let path = file.expect("an entry").path();
        if path.is_dir() {
            literals(&path, starts, found);
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a source");
        for start in starts {
            for (at, _) in text.match_indices(start) {
                let rest = text[at + start.len()..].trim_start();
                let word: Option<&str> = rest.strip_prefix('"').and_then(|rest| rest.split('"').next());
                found.extend(word.filter(|word| !word.contains([' ', '{'])).map(str::to_owned));
            }
        }
    }
}

fn source(dir: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(dir)
}

#[test]
fn the_schema_has_the_events_that_the_service_sends() {
    let mut sent = BTreeSet::new();
    literals(&source("control/service"), &["event(", "send_to("], &mut sent);
    sent.retain(|word| word.chars().all(|c| c.is_ascii_uppercase() || c == '_'));
    let schema: BTreeSet<String> = EVENTS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let unknown: Vec<&String> = sent.difference(&schema).collect();
    assert!(unknown.is_empty(), "the schema lacks {unknown:?}");
    // The names of these are put together.
    let others = ["COPY_COMPLETED", "COPY_FAILED", "COPY_CANCELLED", "PREPARE", "RELEASED"];
    let never: Vec<&String> = schema.difference(&sent).filter(|name| !others.contains(&name.as_str())).collect();
    assert!(never.is_empty(), "nothing sends {never:?}");
}

#[test]
fn the_schema_has_every_error_code_and_each_is_used() {
    let mut used = BTreeSet::new();
    for dir in ["control", "upgrade", "server", "disk", "backend"] {
        literals(&source(dir), &["Error::new(", "Error::command(", "code: "], &mut used);
    }
    let known: BTreeSet<String> = ERROR_CODES.iter().map(|code| (*code).to_owned()).collect();
    let unknown: Vec<&String> = used.difference(&known).collect();
    assert!(unknown.is_empty(), "the schema lacks {unknown:?}");
    let never: Vec<&String> = known.difference(&used).collect();
    assert!(never.is_empty(), "nothing sends {never:?}");
}
