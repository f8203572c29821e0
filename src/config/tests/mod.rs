//! Tests of every rule of the command line and of the configuration file.

mod errors;
mod file;
mod rbd;

use std::io::Write;

use super::*;
use crate::backend::point_in_time::ScratchOptions;
use crate::backend::rbd::{Encryption, RbdLock, RbdQuiesce};
use crate::engine::throttle::Words;

const REQUIRED: [&str; 2] = ["--socket-path=/run/d.sock", "--blk-file=/d.img"];

fn parse(args: &[&str]) -> Result<Invocation, ConfigError> {
    Config::from_args(["virtioblkd"].iter().chain(args))
}

fn good(more: &[&str]) -> Config {
    match parse(&[&REQUIRED, more].concat()) {
        Ok(Invocation::Run(config)) => *config,
        other => panic!("{more:?}: {other:?}"),
    }
}

fn limits(values: &[(&str, u64)]) -> Limits {
    let mut limits = Limits::default();
    for (name, value) in values {
        assert!(limits.set(Words::Libvirt, name, *value));
    }
    limits
}

fn bad(args: &[&str]) -> String {
    match parse(args) {
        Err(error) => error.to_string(),
        Ok(other) => panic!("{args:?} was accepted: {other:?}"),
    }
}

/// Writes a configuration file, which is removed when the returned handle is dropped.
fn config_file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn with_file(text: &str, more: &[&str]) -> Result<Invocation, ConfigError> {
    let file = config_file(text);
    parse(&[more, &["--config", file.path().to_str().unwrap()]].concat())
}

fn bad_file(text: &str) -> String {
    with_file(text, &REQUIRED).expect_err(text).to_string()
}

fn good_file(text: &str, more: &[&str]) -> Config {
    match with_file(text, more) {
        Ok(Invocation::Run(config)) => *config,
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn only_the_required_options_give_the_defaults() {
    assert_eq!(
        good(&[]),
        Config {
            listen: Listen::Path { path: "/run/d.sock".into(), mode: 0o600, group: None },
            backend: BackendKind::File("/d.img".into()),
            is_raw: false,
            read_only: false,
            cache: CacheMode::None,
            control: None,
            num_queues: 256,
            queue_size: 1024,
            serial: String::new(),
            logical_block_size: None,
            discard_unmap: true,
            discard_granularity: None,
            stable_writes: StableWrites::Auto,
            on_error: OnError::Enospc,
            poll_max: Duration::ZERO,
            limits: Limits::default(),
            max_hold: None,
            locking: Locking::Auto,
            pid_file: None,
            log_level: LevelFilter::Info,
            sandbox: SandboxLevel::On,
            user: None,
            copy_dirs: Vec::new(),
            scratch: None,
            take_over: None,
        }
    );
}

#[test]
fn every_option_sets_its_field() {
    let config = good(&[
        "--format=raw",
        "--read-only",
        "--cache=directsync",
        "--control-path",
        "/run/c.sock",
        "--control-mode=0660",
        "--control-access=read-only",
        "--num-queues=4",
        "--queue-size",
        "128",
        "--serial=disk one",
        "--logical-block-size=4096",
        "--discard=ignore",
        "--stable-writes=detect",
        "--on-error=stop",
        "--poll-max-ns=32768",
        "--throttle=total-iops-sec=500,write-bytes-sec=10M",
        "--throttle",
        "size-iops-sec=4K",
        "--max-hold=90s",
        "--locking=off",
        "--socket-mode=0o666",
        "--socket-group=kvm",
        "--pid-file=/run/d.pid",
        "--log-level=trace",
        "--sandbox=no-filter",
        "--user=nobody",
        "--copy-dir=/backup",
        "--copy-dir",
        "/more",
        "--scratch=/fast",
        "--scratch-size=512M",
    ]);
    assert_eq!(
        config,
        Config {
            listen: Listen::Path { path: "/run/d.sock".into(), mode: 0o666, group: Some("kvm".into()) },
            backend: BackendKind::File("/d.img".into()),
            is_raw: true,
            read_only: true,
            cache: CacheMode::Directsync,
            control: Some(ControlSocket { path: "/run/c.sock".into(), mode: 0o660, others: Access::ReadOnly }),
            num_queues: 4,
            queue_size: 128,
            serial: "disk one".into(),
            logical_block_size: Some(4096),
            discard_unmap: false,
            discard_granularity: None,
            stable_writes: StableWrites::Detect,
            on_error: OnError::Stop,
            poll_max: Duration::from_nanos(32768),
            limits: limits(&[("total-iops-sec", 500), ("write-bytes-sec", 10 << 20), ("size-iops-sec", 4096)]),
            max_hold: Some(Duration::from_secs(90)),
            locking: Locking::Off,
            pid_file: Some("/run/d.pid".into()),
            log_level: LevelFilter::Trace,
            sandbox: SandboxLevel::NoFilter,
            user: Some("nobody".into()),
            copy_dirs: vec!["/backup".into(), "/more".into()],
            scratch: Some(ScratchOptions { directory: "/fast".into(), size: 512 << 20 }),
            take_over: None,
        }
    );
}

#[test]
fn a_socket_group_may_connect_unless_the_mode_forbids_it() {
    let mode = |more: &[&str]| match good(more).listen {
        Listen::Path { mode, .. } => mode,
        Listen::Fd(_) => panic!("no --fd was given"),
    };
    assert_eq!(mode(&[]), 0o600);
    assert_eq!(mode(&["--socket-group=kvm"]), 0o660);
    assert_eq!(mode(&["--socket-group=kvm", "--socket-mode=600"]), 0o600);
}

#[test]
fn every_cache_mode_is_accepted_by_its_name() {
    for mode in CacheMode::ALL {
        assert_eq!(good(&["--cache", mode.name()]).cache, mode);
    }
}

#[test]
fn backends_for_tests_are_parsed_with_their_sizes() {
    let backend = |kind: &str| match parse(&["--fd=3", "--backend", kind]) {
        Ok(Invocation::Run(config)) => config.backend,
        other => panic!("{kind}: {other:?}"),
    };
    assert_eq!(backend("null"), BackendKind::Null(1 << 30));
    assert_eq!(backend("null:2T"), BackendKind::Null(2 << 40));
    assert_eq!(backend("mem:64M"), BackendKind::Mem(64 << 20));
    assert_eq!(backend("mem:8K"), BackendKind::Mem(8192));
    assert_eq!(backend("mem:512"), BackendKind::Mem(512));
    assert!(bad(&["--fd=3", "--backend=null", "--blk-file=/d"]).contains("--blk-file"));
    assert!(bad(&["--fd=3", "--backend=file"]).contains("--blk-file PATH"));
    for wrong in ["mem", "mem:", "mem:0", "mem:511", "mem:9999999999G", "mem:16777215T", "mem:-1", "mem:M", "nil"] {
        assert!(bad(&["--fd=3", "--backend", wrong]).contains(wrong), "{wrong}");
    }
}

#[test]
fn print_capabilities_ignores_all_other_options() {
    let expected = Ok(Invocation::Print(format!("{CAPABILITIES}\n")));
    assert_eq!(parse(&["--print-capabilities"]), expected);
    assert_eq!(parse(&["--cache=wrong", "--print-capabilities", "--unheard-of"]), expected);
    let value: serde_json::Value = serde_json::from_str(CAPABILITIES).unwrap();
    assert_eq!(value["type"], "block");
    assert_eq!(value["features"], serde_json::json!(["read-only", "blk-file"]));
}

#[test]
fn help_lists_every_option_that_is_not_hidden() {
    let Ok(Invocation::Print(help)) = parse(&["--help"]) else { panic!("--help prints") };
    for argument in Args::command().get_arguments() {
        let name = format!("--{}", argument.get_long().expect("long options only"));
        assert_eq!(help.contains(&name), !argument.is_hide_set(), "{name}");
    }
    let Ok(Invocation::Print(version)) = parse(&["--version"]) else { panic!("--version prints") };
    assert_eq!(version, format!("virtioblkd {}\n", crate::base::version::VERSION));
}

#[test]
fn the_names_of_other_servers_are_known_on_the_command_line() {
    let config = parse(&["--socket=/run/d.sock", "--file", "/images/a.raw"]).unwrap();
    let Invocation::Run(config) = config else { panic!("{config:?}") };
    assert_eq!(config.backend.file(), Some(Path::new("/images/a.raw")));
    assert!(bad_file("socket = \"/s\"").contains("in this file it is 'socket-path'"));
    let own = ["--socket=/s", "--socket", "--file", "--socket-group", "/file", "--fd=3"].map(with_own_name);
    assert_eq!(own, ["--socket-path=/s", "--socket-path", "--blk-file", "--socket-group", "/file", "--fd=3"]);
    let known: Vec<String> = Args::command()
        .get_arguments()
        .flat_map(|it| it.get_all_aliases().unwrap_or_default())
        .map(|alias| format!("--{alias}"))
        .collect();
    assert_eq!(known, ALIASES.map(|(alias, _)| alias));
}

#[test]
fn a_command_to_run_gets_a_daemon_without_that_option() {
    let file = config_file("control-path = \"/run/d.ctl\"\n");
    let path = file.path().to_str().unwrap();
    let parsed = parse(&["--run", "qemu {socket}", "--blk-file=/a", "--config", path, "--cache", "unsafe"]).unwrap();
    let Invocation::RunCommand(run) = parsed else { panic!("{parsed:?}") };
    assert_eq!(run.command, "qemu {socket}");
    assert_eq!(run.arguments, ["--blk-file=/a", "--config", path, "--cache", "unsafe"]);
    assert_eq!((run.socket, run.control), (None, Some("/run/d.ctl".into())));
    let parsed = parse(&["--run=true", "--blk-file=/a", "--socket-path", "/s"]).unwrap();
    let Invocation::RunCommand(run) = parsed else { panic!("{parsed:?}") };
    assert_eq!((run.arguments.len(), run.socket), (3, Some("/s".into())));
    assert!(bad(&["--run=true"]).contains("no image given"));
    assert!(bad(&["--run=true", "--blk-file=/a", "--fd=3"]).contains("--fd"));
    assert!(bad(&["--run={control}", "--blk-file=/a"]).contains("--control-path"));
}
