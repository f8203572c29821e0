//! Tests of the configuration file: its keys, what overrides them, and its errors.

use super::*;

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
        [throttle]
        total-iops-sec = 500
        write-bytes-sec = "10M"
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
        "--throttle=total-iops-sec=500,write-bytes-sec=10M",
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
    assert!(bad_file("\n[disk]\ncache = \"none\"\n").contains(":2: 'disk' is a section"));
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
    assert!(message.contains("create it") && message.contains("or correct the path"), "{message}");
    assert!(bad(&["--config=/"]).contains("--config"));
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(2 << 20).unwrap();
    assert!(bad(&["--config", file.path().to_str().unwrap()]).contains("larger than"));
}
