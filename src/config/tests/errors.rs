//! Tests of the errors of the command line.

use super::*;

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
        ("--throttle", "fast", "use NAME=VALUE"),
        ("--throttle", "total-iops=5", "the nearest known one is 'total-iops-sec'"),
        ("--throttle", "total-iops-sec=5K", "without a unit"),
        ("--throttle", "total-bytes-sec=5X", "10M"),
        ("--throttle", "group-name=a", "not built yet"),
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
    let table: [(&[&str], &str); 18] = [
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
        (&["--blk-file=/d", "--run="], "--run"),
        (&["--blk-file=/d", "--run= "], "--run needs a command"),
        (&["--socket-path=", "--blk-file=/d"], "--socket-path"),
        (&["--fd=3", "--blk-file=/d", "--throttle=total-iops-sec=5,total-iops-sec=6"], "given twice"),
        (&["--fd=3", "--blk-file=/d", "--throttle=total-iops-sec-max=5"], "needs total-iops-sec"),
    ];
    for (args, part) in table {
        assert!(bad(args).contains(part), "{args:?}: {}", bad(args));
    }
    assert!(bad(&[&REQUIRED[..], &["--cache=none", "--cache=unsafe"]].concat()).contains("--cache"));
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
