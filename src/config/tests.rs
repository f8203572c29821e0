//! Tests of every rule of the command line and of the configuration file.

use std::io::Write;

use super::*;
use crate::backend::point_in_time::ScratchOptions;
use crate::backend::rbd::{Encryption, RbdLock, RbdQuiesce};

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

fn rbd(args: &[&str]) -> RbdOptions {
    match parse(&[&["--fd=3"], args].concat()) {
        Ok(Invocation::Run(config)) => match config.backend {
            BackendKind::Rbd(options) => *options,
            other => panic!("{args:?}: {other:?}"),
        },
        other => panic!("{args:?}: {other:?}"),
    }
}

#[test]
fn an_rbd_image_has_every_given_option_and_the_defaults_otherwise() {
    let none = rbd(&["--rbd=p/i", "--cache=unsafe"]);
    assert_eq!(none, RbdOptions::new("p/i".parse().unwrap(), CacheMode::Unsafe));
    assert_eq!(none.quiesce_timeout.as_secs(), 30);
    let all = [
        "--rbd=p/n/i@s",
        "--cache=writeback",
        "--read-only",
        "--logical-block-size=4096",
        "--discard=ignore",
        "--ceph-conf=/c",
        "--ceph-user=qemu",
        "--rbd-option=rbd_cache_size=1",
        "--rbd-option",
        "rbd cache-max dirty = a=b",
        "--rbd-allow-override",
        "--rbd-lock=auto",
        "--rbd-state-file=/s",
        "--rbd-encryption=luks2",
        "--rbd-passphrase-file=/w",
        "--rbd-quiesce=off",
        "--rbd-quiesce-timeout=45",
        "--ceph-library-path=/l",
    ];
    let expected = RbdOptions {
        name: "p/n/i@s".parse().unwrap(),
        mode: CacheMode::Writeback,
        conf: Some("/c".into()),
        user: "qemu".into(),
        options: vec![("rbd_cache_size".into(), "1".into()), ("rbd_cache_max_dirty".into(), "a=b".into())],
        allow_override: true,
        read_only: true,
        logical_block_size: 4096,
        discard_unmap: false,
        lock: RbdLock::Auto,
        state_file: Some("/s".into()),
        lock_later: false,
        encryption: Some((Encryption::Luks2, "/w".into())),
        quiesce: RbdQuiesce::Off,
        quiesce_timeout: std::time::Duration::from_secs(45),
        library_path: Some("/l".into()),
    };
    assert_eq!(rbd(&all), expected);
    assert_eq!(rbd(&["--rbd=p/i", "--rbd-lock=exclusive"]).lock, RbdLock::Exclusive);
    assert_eq!(rbd(&["--rbd=p/i", "--rbd-lock=none"]).lock, RbdLock::None);
}

#[test]
fn rbd_options_in_the_file_may_be_a_text_a_list_or_a_table() {
    let options = |text: &str, more: &[&str]| {
        let text = format!("rbd = \"p/i\"\n{text}");
        match good_file(&text, &[&["--fd=3"], more].concat()).backend {
            BackendKind::Rbd(options) => options.options,
            other => panic!("{other:?}"),
        }
    };
    let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
    assert_eq!(options("rbd-option = \"a=1\"", &[]), [pair("a", "1")]);
    assert_eq!(options("rbd-option = [\"a=1\", \"b = x\"]", &[]), [pair("a", "1"), pair("b", "x")]);
    assert_eq!(options("[rbd-option]\na = 1\nb = true", &[]), [pair("a", "1"), pair("b", "true")]);
    assert_eq!(options("[rbd-option]\na = 1", &["--rbd-option=c=3"]), [pair("c", "3")], "the command line wins");
    let wrong = |text: &str| with_file(text, &["--fd=3"]).expect_err(text).to_string();
    for (text, part) in [
        ("rbd-option = [\"a\"]", ":1: invalid value 'a'"),
        ("rbd-option = [[\"a=1\"]]", "array"),
        ("rbd-option = [1]", ":1: invalid value '1'"),
        ("rbd-lock = [\"none\"]", "array"),
    ] {
        assert!(wrong(text).contains(part), "{text}: {}", wrong(text));
    }
}

#[test]
fn options_that_contradict_an_rbd_image_are_refused() {
    let table: [(&[&str], &str); 11] = [
        (&["--rbd=p/i", "--rbd-lock=none", "--rbd-state-file=/s"], "concerns the image's lock"),
        (&["--rbd=p/i", "--blk-file=/d"], "exclude each other"),
        (&["--rbd=p/i", "--backend=null"], "exclude each other"),
        (&["--rbd=p/i", "--locking=off"], "--rbd-lock"),
        (&["--rbd=i"], "POOL/IMAGE"),
        (&["--rbd=p/i", "--rbd-encryption=luks"], "--rbd-passphrase-file"),
        (&["--rbd=p/i", "--rbd-passphrase-file=/f"], "--rbd-encryption"),
        (&["--rbd=p/i", "--ceph-conf=/f", "--rbd-state-file=/f"], "both '/f'"),
        (&["--rbd=p/i", "--rbd=p/j"], "--rbd"),
        (&["--blk-file=/d", "--rbd-lock=auto"], "--rbd POOL/IMAGE"),
        (&["--blk-file=/d", "--ceph-conf=/c"], "--rbd POOL/IMAGE"),
    ];
    for (args, part) in table {
        let message = bad(&[&["--fd=3"], args].concat());
        assert!(message.contains(part), "{args:?}: {message}");
    }
}

#[test]
fn the_error_of_a_wrong_value_names_its_option_and_what_is_allowed() {
    let table = [
        ("--cache", "write-back", "writeback, writethrough, unsafe"),
        ("--fd", "2", "3 or more"),
        ("--fd", "x", "3 or more"),
        ("--num-queues", "0", "1 to 256"),
        ("--num-queues", "257", "1 to 256"),
        ("--num-queues", "99999", "1 to 256"),
        ("--queue-size", "1", "power of two from 2 to 32768"),
        ("--queue-size", "100", "power of two from 2 to 32768"),
        ("--queue-size", "65536", "power of two from 2 to 32768"),
        ("--serial", "123456789012345678901", "at most 20 printable ASCII"),
        ("--serial", "gr\u{fc}n", "at most 20 printable ASCII"),
        ("--serial", "a\nb", "at most 20 printable ASCII"),
        ("--logical-block-size", "1024", "512 or 4096"),
        ("--format", "qcow2", "qemu-img convert -f qcow2 -O raw"),
        ("--discard", "on", "unmap or ignore"),
        ("--discard-granularity", "0", "power of two from 512 to 1G"),
        ("--discard-granularity", "256", "power of two from 512 to 1G"),
        ("--discard-granularity", "48K", "power of two from 512 to 1G"),
        ("--discard-granularity", "2G", "power of two from 512 to 1G"),
        ("--stable-writes", "on", "auto, copy, detect or off"),
        ("--sandbox", "paranoid", "on, no-filter or off"),
        ("--locking", "on", "auto, in-use or off"),
        ("--socket-mode", "0888", "octal"),
        ("--socket-mode", "1777", "octal"),
        ("--socket-mode", "+660", "octal"),
        ("--control-mode", "rw", "octal"),
        ("--control-access", "all", "operate or read-only"),
        ("--read-only", "yes", "true or false"),
        ("--rbd", "pool", "POOL/IMAGE"),
        ("--ceph-user", "client.admin", "without 'client.'"),
        ("--rbd-option", "rbd_cache", "OPTION=VALUE"),
        ("--rbd-option", "=true", "OPTION=VALUE"),
        ("--rbd-lock", "shared", "auto, exclusive or none"),
        ("--rbd-encryption", "luks3", "luks, luks1 or luks2"),
        ("--rbd-allow-override", "on", "true or false"),
        ("--rbd-quiesce", "true", "on, attended or off"),
        ("--rbd-quiesce-timeout", "0", "1 to 45"),
        ("--rbd-quiesce-timeout", "46", "1 to 45"),
        ("--log-level", "loud", "error, warn, info, debug or trace"),
    ];
    for (option, value, allowed) in table {
        let message = bad(&[REQUIRED[1], &format!("{option}={value}")]);
        for part in [option, value, allowed] {
            assert!(message.contains(part), "{option}={value}: '{part}' is missing in: {message}");
        }
    }
}

#[test]
fn missing_and_contradicting_options_are_refused() {
    let table: [(&[&str], &str); 14] = [
        (&["--blk-file=/d"], "no socket given"),
        (&["--socket-path=/s"], "no image given"),
        (&["--socket-path=/s", "--fd=3", "--blk-file=/d"], "exclude each other"),
        (&["--fd=3", "--socket-mode=0600", "--blk-file=/d"], "bound the socket of --fd"),
        (&["--fd=3", "--socket-group=kvm", "--blk-file=/d"], "bound the socket of --fd"),
        (&["--fd=3", "--blk-file=/d", "--control-mode=0600"], "--control-path"),
        (&["--fd=3", "--blk-file=/d", "--control-access=operate"], "--control-path"),
        (&["--fd=3", "--blk-file=/d", "--scratch-size=1G"], "needs --scratch"),
        (&["--socket-path=/s", "--blk-file=/s"], "both '/s'"),
        (&["--socket-path=/s", "--blk-file=/d", "--control-path=/s"], "both '/s'"),
        (&["--socket-path=/s", "--blk-file=/d", "--control-path=/c", "--pid-file=/c"], "both '/c'"),
        (&["--socket-path=/s", "--blk-file=/d", "--sockt-mode=0600"], "--socket-mode"),
        (&["--socket-path=/s", "--blk-file=/d", "disk"], "disk"),
        (&["--socket-path=", "--blk-file=/d"], "--socket-path"),
    ];
    for (args, part) in table {
        assert!(bad(args).contains(part), "{args:?}: {}", bad(args));
    }
    assert!(bad(&[&REQUIRED[..], &["--cache=none", "--cache=unsafe"]].concat()).contains("--cache"));
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
fn a_key_of_the_file_means_the_same_as_its_option() {
    let text = r#"
        # A disk.
        socket-path = "/run/d.sock"
        blk-file = "/d.img"
        read-only = true
        cache = "writethrough"
        control-path = "/run/c.sock"
        control-mode = "0660"
        control-access = "read-only"
        num-queues = 4
        queue-size = 0x80
        serial = "disk one"
        logical-block-size = 4_096
        discard = "ignore"
        locking = "off"
        socket-mode = "0666"
        socket-group = "kvm"
        pid-file = "/run/d.pid"
        log-level = "debug"
        sandbox = "off"
        user = "nobody"
        copy-dir = ["/backup", "/more"]
        scratch = "/fast"
        scratch-size = "4G"
    "#;
    let arguments = [
        "--read-only",
        "--cache=writethrough",
        "--control-path=/run/c.sock",
        "--control-mode=0660",
        "--control-access=read-only",
        "--num-queues=4",
        "--queue-size=128",
        "--serial=disk one",
        "--logical-block-size=4096",
        "--discard=ignore",
        "--locking=off",
        "--socket-mode=0666",
        "--socket-group=kvm",
        "--pid-file=/run/d.pid",
        "--log-level=debug",
        "--sandbox=off",
        "--user=nobody",
        "--copy-dir=/backup",
        "--copy-dir=/more",
        "--scratch=/fast",
        "--scratch-size=4G",
    ];
    assert_eq!(good_file(text, &[]), good(&arguments));
}

#[test]
fn the_command_line_overrides_the_file() {
    let file = "cache = \"unsafe\"\nread-only = true\nqueue-size = 64\n";
    let config = good_file(file, &[&REQUIRED[..], &["--cache=directsync", "--read-only=false"]].concat());
    assert_eq!(config.cache, CacheMode::Directsync);
    assert!(!config.read_only);
    assert_eq!(config.queue_size, 64);
}

#[test]
fn a_socket_on_the_command_line_overrides_either_kind_of_socket_in_the_file() {
    let file = "socket-path = \"/run/file.sock\"\nsocket-mode = \"0666\"\nblk-file = \"/d\"\n";
    assert_eq!(good_file(file, &["--fd=3"]).listen, Listen::Fd(3));
    let config = good_file("fd = 7\nblk-file = \"/d\"\n", &["--socket-path=/s"]);
    assert_eq!(config.listen, Listen::Path { path: "/s".into(), mode: 0o600, group: None });
}

#[test]
fn the_error_of_an_unknown_key_names_its_line_and_the_nearest_known_key() {
    for (key, nearest) in
        [("cahce", "cache"), ("blk_file", "blk-file"), ("Queue-Size", "queue-size"), ("socketpath", "socket-path")]
    {
        let message = bad_file(&format!("# a disk\nserial = \"x\"\n{key} = \"y\"\n"));
        for part in [":3:", &format!("'{key}'"), &format!("'{nearest}'")] {
            assert!(message.contains(part), "'{part}' is missing in: {message}");
        }
    }
    assert!(bad_file("\n[disk]\ncache = \"none\"\n").contains(":2: unknown key 'disk'"));
}

#[test]
fn the_error_of_a_wrong_value_in_the_file_names_its_line() {
    let table: [(&str, &[&str]); 10] = [
        ("\ncache = \"fast\"", &[":2:", "cache", "'fast'", "writeback"]),
        ("queue-size = 100", &[":1:", "queue-size", "'100'", "power of two"]),
        ("num-queues = -1", &[":1:", "num-queues", "'-1'", "1 to 256"]),
        ("num-queues = 99999999999999999999", &[":1:", "num-queues"]),
        ("num-queues = 1.5", &[":1:", "num-queues", "float"]),
        ("cache = [\"none\"]", &[":1:", "cache", "array"]),
        ("socket-mode = 660", &[":1:", "socket-mode", "quotes", "660"]),
        ("read-only = \"maybe\"", &[":1:", "read-only", "true or false"]),
        ("config = \"/other\"", &[":1:", "'config'", "command line"]),
        ("pid-file = \"\"", &[":1:", "pid-file"]),
    ];
    for (text, parts) in table {
        let message = bad_file(text);
        for part in parts {
            assert!(message.contains(part), "{text}: '{part}' is missing in: {message}");
        }
    }
}

#[test]
fn a_file_that_is_not_a_readable_toml_file_is_refused() {
    assert!(bad_file("cache = none\n").contains(":1: not TOML"));
    assert!(bad_file("serial = \"a\"\nserial = \"b\"\n").contains(":2: not TOML"));
    let message = bad(&["--config=/does/not/exist.toml"]);
    assert!(message.contains("/does/not/exist.toml") && message.contains("--config"), "{message}");
    assert!(bad(&["--config=/"]).contains("--config"));
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(2 << 20).unwrap();
    assert!(bad(&["--config", file.path().to_str().unwrap()]).contains("larger than"));
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
fn the_discard_granularity_requires_discard_unmap() {
    for (text, bytes) in [("512", 512), ("32K", 32 << 10), ("1G", 1 << 30)] {
        assert_eq!(good(&["--discard-granularity", text]).discard_granularity, Some(bytes));
        let config = good_file(&format!("discard-granularity = \"{text}\""), &REQUIRED);
        assert_eq!(config.discard_granularity, Some(bytes));
    }
    good(&["--discard-granularity=32K", "--discard=unmap"]);
    let why = bad(&[REQUIRED[0], REQUIRED[1], "--discard-granularity=32K", "--discard=ignore"]);
    assert!(why.contains("--discard-granularity needs --discard unmap"), "{why}");
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
