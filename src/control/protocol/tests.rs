//! Tests of the parser: which command a request is read as, and the error of an invalid one.

use std::time::Duration;

use super::*;

/// Reads a command as a client with all rights sends it.
pub(super) fn parse_command(command: &str, arguments: Value) -> Result<Command, Error> {
    parse(json!({"execute": command, "arguments": arguments}), true, Access::All).command
}

fn ask(text: &str) -> Result<Command, Error> {
    parse(serde_json::from_str(text).unwrap(), true, Access::All).command
}

fn refused(text: &str, code: &str, words: &[&str]) {
    let error = ask(text).unwrap_err();
    assert_eq!(error.code, code, "{text}: {error:?}");
    for word in words {
        assert!(error.desc.contains(word), "{text}: '{word}' is not in '{}'", error.desc);
    }
}

#[test]
fn commands_wait_for_the_negotiation() {
    for name in ["query-status", "no-such-command", "quit"] {
        let error = parse(json!({"execute": name}), false, Access::All).command.unwrap_err();
        assert_eq!((error.class, error.code), (Class::CommandNotFound, "not-negotiated"));
    }
    assert_eq!(parse(json!({"execute": "qmp_capabilities"}), false, Access::All).command, Ok(Command::QmpCapabilities));
    assert_eq!(ask(r#"{"execute":"qmp_capabilities"}"#).unwrap_err().code, "already-negotiated");
    let enable = json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}});
    assert_eq!(parse(enable, false, Access::All).command.unwrap_err().code, "bad-argument");
    let enable = json!({"execute": "qmp_capabilities", "arguments": {"enable": []}});
    assert_eq!(parse(enable, false, Access::All).command, Ok(Command::QmpCapabilities));
}

#[test]
fn quiesce_has_defaults() {
    let defaults =
        QuiesceArgs { timeout: Duration::from_secs(10), lease: Duration::from_secs(30), detached: false, who: None };
    assert_eq!(ask(r#"{"execute":"quiesce"}"#), Ok(Command::Quiesce(defaults)));
    let given =
        ask(r#"{"execute":"quiesce","arguments":{"timeout-ms":1,"lease-ms":3600000,"detached":true,"who":"backup"}}"#);
    let wanted = QuiesceArgs {
        timeout: Duration::from_millis(1),
        lease: Duration::from_secs(3600),
        detached: true,
        who: Some("backup".into()),
    };
    assert_eq!(given, Ok(Command::Quiesce(wanted)));
}

#[test]
fn wrong_requests_say_what_is_wrong() {
    refused(r#"{}"#, "bad-request", &["execute"]);
    refused(r#"{"execute":3}"#, "bad-request", &["execute", "string"]);
    refused(r#"{"execute":"quit","arguments":[]}"#, "bad-request", &["arguments", "object"]);
    refused(r#"{"execute":"quit","argument":{}}"#, "bad-request", &["'argument'"]);
    refused(r#"{"execute":"quitt"}"#, "unknown-command", &["quitt", "query-commands"]);
    refused(r#"{"execute":"quit","arguments":{"now":true}}"#, "bad-argument", &["quit", "now"]);
    refused(r#"{"execute":"quiesce","arguments":{"timeout":5}}"#, "bad-argument", &["quiesce", "'timeout'"]);
    refused(r#"{"execute":"quiesce","arguments":{"timeout-ms":"5"}}"#, "bad-argument", &["timeout-ms", "a string"]);
    for wrong in ["0", "-1", "1.5", "3600001", "1e300", "18446744073709551616"] {
        let text = format!(r#"{{"execute":"quiesce","arguments":{{"lease-ms":{wrong}}}}}"#);
        refused(&text, "bad-argument", &["lease-ms", "3600000"]);
    }
    refused(r#"{"execute":"quiesce","arguments":{"detached":1}}"#, "bad-argument", &["detached", "a number"]);
    refused(r#"{"execute":"resume"}"#, "bad-argument", &["token", "all"]);
    refused(r#"{"execute":"resume","arguments":{"all":true,"token":"x"}}"#, "bad-argument", &["not both"]);
    refused(r#"{"execute":"resume","arguments":{"token":7}}"#, "bad-argument", &["token", "a number"]);
    refused(r#"{"execute":"renew-lease"}"#, "bad-argument", &["token"]);
    let long = json!({"execute": "quiesce", "arguments": {"who": "x".repeat(257)}}).to_string();
    refused(&long, "bad-argument", &["who", "256"]);
    let long = json!({"execute": "\u{e9}".repeat(5000)}).to_string();
    assert!(ask(&long).unwrap_err().desc.len() < 300, "a long name is cut");
    assert_eq!(parse(json!([1]), true, Access::All).command.unwrap_err().code, "bad-request");
}

#[test]
fn the_id_is_echoed_whatever_it_is() {
    for id in [json!(1), json!("a"), json!(null), json!({"b": [1, 2]})] {
        let request = parse(json!({"execute": "nonsense", "id": id}), true, Access::All);
        assert_eq!(request.id.as_ref(), Some(&id));
        let text = reply(request.id.as_ref(), Err(request.command.unwrap_err()));
        let value: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(value["id"], id);
        assert_eq!(value["error"]["class"], "CommandNotFound");
        assert_eq!(value["error"]["code"], "unknown-command");
    }
    assert_eq!(reply(None, Ok(json!({}))), b"{\"return\":{}}\r\n");
}

#[test]
fn every_command_is_listed() {
    assert_eq!(command_list(Access::All).as_array().unwrap().len(), COMMANDS.len());
}

/// The commands that each access adds, by name: a new command must be added here deliberately.
#[test]
fn each_access_has_its_commands() {
    let names = |access| -> Vec<String> {
        let list = command_list(access);
        list.as_array().unwrap().iter().map(|command| command["name"].as_str().unwrap().to_owned()).collect()
    };
    let (asks, operates, all) = (names(Access::ReadOnly), names(Access::Operate), names(Access::All));
    let queries =
        ["qmp_capabilities", "query-commands", "query-version", "query-qmp-schema", "query-status", "query-stats"];
    assert_eq!(asks, [&queries[..], &["query-copies"]].concat());
    let added: Vec<&String> = all.iter().filter(|name| !operates.contains(name)).collect();
    let expected =
        ["getfd", "closefd", "export-prepare", "block_set_io_throttle", "query-command-line", "hand-over", "quit"];
    assert_eq!(added, expected);
    for name in &all {
        for (access, allowed) in [(Access::ReadOnly, &asks), (Access::Operate, &operates), (Access::All, &all)] {
            let negotiated = name != "qmp_capabilities";
            let refused = parse(json!({"execute": name}), negotiated, access).command;
            let refused = refused.is_err_and(|error| error.code == "not-allowed");
            assert_eq!(refused, !allowed.contains(name), "{name} with {access}");
        }
    }
    let resize = |force| json!({"execute": "resize", "arguments": {"force": force}});
    assert!(parse(resize(false), true, Access::Operate).command.is_ok());
    let error = parse(resize(true), true, Access::Operate).command.unwrap_err();
    assert_eq!(error.code, "not-allowed");
    assert!(error.desc.contains("force") && error.desc.contains("root"), "{}", error.desc);
    assert!(parse(resize(true), true, Access::All).command.is_ok());
}

#[test]
fn a_message_is_one_line() {
    let text = event("IO_ERROR", json!({"message": "two\nlines"}), UNIX_EPOCH + Duration::from_micros(1_500_000));
    let text = String::from_utf8(text).unwrap();
    assert_eq!(text.matches('\n').count(), 1);
    let value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["timestamp"], json!({"seconds": 1, "microseconds": 500_000}));
    let greeting: Value = serde_json::from_slice(&greeting()).unwrap();
    assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64());
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));
}
