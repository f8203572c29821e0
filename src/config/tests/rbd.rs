//! Tests of the options of an RBD image.

use super::*;

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
