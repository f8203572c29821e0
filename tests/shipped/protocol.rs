//! docs/control-protocol.md, the reply to `query-qmp-schema`, and a running daemon agree: the same commands, arguments, replies,
//! events and error codes. Every example of the page has the schema's types, and those that a disk in a file can answer are sent
//! to a real daemon.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use kit::control::schema::{EmptyWord, entry, type_fault};
use kit::documents::{blocks, read};
use kit::guest::{Qmp, Server, sparse_image};
use kit::programs::disk_dir;
use serde_json::{Value, json};
use virtioblkd::engine::cache::CacheMode;

const PAGE: &str = "docs/control-protocol.md";

/// Commands whose examples no daemon of this test can answer: those of Ceph's snapshots and their attendant, those that need a
/// descriptor (tests/export/command.rs sends them), and those that end the daemon or the protocol.
const NOT_SENT: [&str; 9] = [
    "image-snapshot",
    "image-snapshot-keep",
    "image-snapshot-remove",
    "prepared",
    "getfd",
    "closefd",
    "export-prepare",
    "hand-over",
    "quit",
];

fn server(dir: &Path) -> (Server, PathBuf) {
    let image = sparse_image(dir, 64 << 20);
    // So that a copy with a limit takes longer than the test.
    let data = std::fs::OpenOptions::new().write(true).open(&image).and_then(|mut file| file.write_all(&[1; 8 << 20]));
    data.expect("room");
    (Server::start(&image, CacheMode::None, &[]), image)
}

fn schema(server: &Server) -> Vec<Value> {
    let reply = Qmp::connect(&server.control()).execute("query-qmp-schema", json!({}));
    reply.as_array().expect("a list").clone()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no string"))
}

/// The page's sections: title and text.
fn sections() -> Vec<(String, String)> {
    let page = read(PAGE);
    let mut parts = page.split("\n### ");
    parts.next();
    let part = |part: &str| {
        let (title, rest) = part.split_once('\n').expect("a title");
        (title.to_owned(), rest.split("\n## ").next().unwrap_or_default().to_owned())
    };
    parts.map(part).collect()
}

/// The rows of a section's table: name, type, and whether the member may be absent.
fn rows(section: &str) -> BTreeSet<(String, String, bool)> {
    let lines = section.lines().filter(|line| line.starts_with("| `"));
    let row = |line: &str| {
        let line = line.replace("\\|", "!");
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let quoted = |cell: &str| cell.split('`').nth(1).unwrap_or_default().replace('!', "|");
        let optional = cells[2].ends_with("optional") || cells[3].ends_with("May be absent");
        (quoted(cells[1]), quoted(cells[2]), optional)
    };
    lines.map(row).collect()
}

/// The same of an object type.
fn members(schema: &[Value], kind: &str) -> BTreeSet<(String, String, bool)> {
    let members = entry(schema, kind)["members"].as_array().expect("an object").clone();
    let row = |member: &Value| {
        (text(&member["name"]).to_owned(), text(&member["type"]).to_owned(), member.get("default").is_some())
    };
    members.iter().map(row).collect()
}

#[test]
fn the_page_and_the_schema_of_a_running_daemon_have_the_same_entries() {
    let dir = disk_dir();
    let (server, _) = server(dir.path());
    let schema = schema(&server);
    let sections = sections();
    let mut titles: BTreeSet<&str> = BTreeSet::new();
    for (title, section) in &sections {
        assert!(titles.insert(title), "{PAGE} has two sections '{title}'");
        let entry = entry(&schema, title);
        let kind = match text(&entry["meta-type"]) {
            "command" => {
                let returns = format!("Returns `{}`", text(&entry["ret-type"]));
                assert!(section.contains(&returns), "{PAGE}, {title}: it lacks \"{returns}\"");
                assert!(section.contains("```qmp"), "{PAGE}, {title}: it has no example");
                text(&entry["arg-type"])
            }
            "event" => {
                assert!(section.contains("```qmp"), "{PAGE}, {title}: it has no example");
                text(&entry["arg-type"])
            }
            "enum" if title == "ErrorCode" => continue,
            "enum" => {
                let named: BTreeSet<&str> =
                    section.split('`').skip(1).step_by(2).filter(|it| !it.contains("--")).collect();
                let values: BTreeSet<&str> = entry["values"].as_array().expect("a list").iter().map(text).collect();
                assert_eq!(named, values, "{PAGE}, {title}");
                continue;
            }
            _ => title,
        };
        if section.contains("the members of `CopyStatus`") {
            assert_eq!(members(&schema, kind), members(&schema, "CopyStatus"), "{title}");
        } else {
            assert_eq!(rows(section), members(&schema, kind), "{PAGE}, {title}");
        }
    }
    for entry in &schema {
        let (name, kind) = (text(&entry["name"]), text(&entry["meta-type"]));
        let needed = !["builtin", "array", "alternate"].contains(&kind) && !name.ends_with("-arg");
        assert!(!needed || titles.contains(name), "{PAGE} has no section '{name}'");
    }
    let page = read(PAGE);
    let codes = page.split("## Error codes").nth(1).and_then(|rest| rest.split("\n## ").next()).expect("a section");
    let codes: BTreeSet<&str> =
        codes.lines().filter(|line| line.starts_with("| `")).filter_map(|line| line.split('`').nth(1)).collect();
    let known: BTreeSet<&str> =
        entry(&schema, "ErrorCode")["values"].as_array().expect("a list").iter().map(text).collect();
    assert_eq!(codes, known, "{PAGE}, error codes");
}

/// The messages of the page's examples: whether the client sends it, and the message.
fn examples() -> Vec<(bool, Value)> {
    let mut messages: Vec<(bool, String)> = Vec::new();
    for line in blocks(PAGE).iter().filter(|block| block.language == "qmp").flat_map(|block| block.text.lines()) {
        match (line.strip_prefix("-> "), line.strip_prefix("<- ")) {
            (Some(sent), _) => messages.push((true, sent.to_owned())),
            (_, Some(received)) => messages.push((false, received.to_owned())),
            _ => messages.last_mut().expect("a line before it").1 += line,
        }
    }
    let parse = |text: &str| serde_json::from_str(text).unwrap_or_else(|error| panic!("{PAGE}: {error}: {text}"));
    messages.iter().map(|(sent, text)| (*sent, parse(text))).collect()
}

#[test]
fn every_example_is_of_the_schemas_types_and_a_real_daemon_replies_as_it_says() {
    let dir = disk_dir();
    let (server, image) = server(dir.path());
    let schema = schema(&server);
    let mut qmp = Qmp::connect(&server.control());
    let (mut command, mut sent, mut seen) = (String::new(), 0, BTreeSet::new());
    let mut token = Value::Null;
    let check = |kind: &Value, value: &Value| {
        let fault = type_fault(&schema, text(kind), value, EmptyWord::Refused);
        assert_eq!(fault, None, "{PAGE}: {value}");
    };
    for (is_sent, message) in examples() {
        if let Some(event) = message["event"].as_str() {
            check(&entry(&schema, event)["arg-type"], &message["data"]);
            seen.insert(event.to_owned());
        } else if is_sent {
            text(&message["execute"]).clone_into(&mut command);
            seen.insert(command.clone());
            let arguments = message.get("arguments").cloned().unwrap_or(json!({}));
            check(&entry(&schema, &command)["arg-type"], &arguments);
            if NOT_SENT.contains(&command.as_str()) || command == "qmp_capabilities" {
                continue;
            }
            let mut arguments = arguments;
            if command == "copy-start" {
                token = qmp.execute("quiesce", json!({}))["token"].clone();
            }
            if !arguments["token"].is_null() {
                arguments["token"] = token.clone();
            }
            if !arguments["target"].is_null() {
                arguments["target"] = json!(image.with_file_name("copy.img"));
            }
            // So that the copy still runs when further examples name it.
            if !arguments["bandwidth"].is_null() {
                arguments["bandwidth"] = json!(1);
            }
            let reply = qmp.execute(&command, arguments);
            check(&entry(&schema, &command)["ret-type"], &reply);
            if command == "quiesce" {
                token = reply["token"].clone();
            }
            sent += 1;
        } else if let Some(reply) = message.get("return") {
            check(&entry(&schema, &command)["ret-type"], reply);
        }
    }
    assert!(sent > 15, "only {sent} examples were sent");
    for entry in &schema {
        let needed = ["command", "event"].contains(&text(&entry["meta-type"]));
        assert!(!needed || seen.contains(text(&entry["name"])), "{PAGE} has no example of {}", entry["name"]);
    }
}
