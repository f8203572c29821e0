//! Opening an RBD image: snapshots, encryption, options that override the mode, and errors that name their cause.

use kit::backend::Driver;
use kit::rbd_stub::{Stub, libraries};
use virtioblkd::backend::Backend;
use virtioblkd::backend::rbd::{Encryption, RbdOptions};
use virtioblkd::engine::CacheMode;

use super::rbd_listener::*;

#[test]
fn a_snapshot_is_read_only() {
    let mut stub = Stub::new(CacheMode::None);
    stub.options.name.snapshot = Some("s".into());
    let disk = stub.open();
    let geometry = disk.geometry();
    assert!(geometry.read_only && geometry.discard.is_none() && geometry.write_zeroes.is_none());
    assert!(disk.store().snapshots().is_none());
    assert!(disk.describe().ends_with("read-only"));
    disk.claim().activate().unwrap();
    assert_eq!(stub.count("locks"), 0);
    let mut driver = Driver::new(&disk, 1);
    assert_eq!(driver.read(0, 512), Ok(vec![0; 512]));
    assert_eq!(driver.run(write_op(0)), Err(EROFS));
    assert_eq!(trouble(&disk), None, "nobody has taken anything away");
}

#[test]
fn an_encrypted_image_is_smaller_and_opens_with_its_passphrase_only() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("passphrase");
    let mut stub = Stub::new(CacheMode::None);
    stub.set("stub_passphrase", "open sesame");
    for (text, format, part) in [
        ("open sesame\n", Encryption::Luks2, None),
        ("open sesame", Encryption::Luks, None),
        ("open sesame\n", Encryption::Luks1, Some("--rbd-encryption")),
        ("wrong", Encryption::Luks, Some("passphrase is wrong")),
        ("open sesame\n\n", Encryption::Luks2, Some("passphrase is wrong")),
        ("\n", Encryption::Luks2, Some("empty")),
    ] {
        std::fs::write(&file, text).unwrap();
        stub.options.encryption = Some((format, file.clone()));
        match (stub.try_open(), part) {
            (Ok(disk), None) => assert_eq!(disk.geometry().size, (8 << 20) - 4096),
            (Err(error), Some(part)) => assert!(error.to_string().contains(part), "{text:?}: {error}"),
            (Ok(_), Some(_)) => panic!("{text:?} opened it"),
            (Err(error), None) => panic!("{text:?}: {error}"),
        }
    }
    std::fs::remove_file(&file).unwrap();
    assert!(stub.try_open().err().expect("refused").to_string().contains("--rbd-passphrase-file"));
    std::fs::write(&file, "x").unwrap();
    stub.options = RbdOptions { library_path: Some(libraries(true).to_path_buf()), ..stub.options.clone() };
    assert!(stub.try_open().err().expect("refused").to_string().contains("--rbd-passphrase-file"));
}

#[test]
fn options_that_override_the_mode_are_refused_unless_allowed() {
    for (mode, wrong) in [
        (CacheMode::None, "rbd_cache=true"),
        (CacheMode::Directsync, "rbd_cache=true"),
        (CacheMode::Writeback, "rbd_cache=false"),
        (CacheMode::Writethrough, "rbd_cache_policy=writeback"),
        (CacheMode::Unsafe, "rbd_cache_writethrough_until_flush=true"),
    ] {
        for place in ["pool", "image"] {
            let mut stub = Stub::new(mode);
            stub.set("stub_override", &format!("{place}:{wrong}"));
            let error = stub.try_open().err().expect("refused").to_string();
            for part in [place, wrong.split('=').next().unwrap(), "--rbd-allow-override", mode.name()] {
                assert!(error.contains(part), "'{part}' is missing in: {error}");
            }
            stub.options.allow_override = true;
            stub.open();
        }
    }
    let mut stub = Stub::new(CacheMode::None);
    stub.set("rbd_cache", "true");
    assert!(stub.try_open().err().expect("refused").to_string().contains("--rbd-option"));
    let mut stub = Stub::new(CacheMode::Writeback);
    stub.set("stub_override", "image:rbd_disable_zero_copy_writes=false").options.allow_override = true;
    assert!(stub.try_open().err().expect("refused").to_string().contains("hang the disk"));
}

#[test]
fn an_open_error_names_its_cause() {
    let table: [(&str, i32, &[&str]); 10] = [
        ("stub_connect", libc::ETIMEDOUT, &["cluster", "mon host", "--ceph-conf"]),
        ("stub_connect", libc::EPERM, &["client.admin", "--ceph-user"]),
        ("stub_connect", libc::ENOENT, &["keyring"]),
        ("stub_connect", libc::EIO, &["cluster"]),
        ("stub_pool", libc::ENOENT, &["pool pool", "ceph osd pool ls"]),
        ("stub_pool", libc::EIO, &["pool pool"]),
        ("stub_open", libc::ENOENT, &["pool/image", "rbd ls pool"]),
        ("stub_open", libc::EPERM, &["pool/image", "profile rbd"]),
        ("stub_open", libc::ESHUTDOWN, &["pool/image", "blocklist"]),
        ("stub_open", libc::EIO, &["pool/image", "ceph status"]),
    ];
    for (option, errno, parts) in table {
        let mut stub = Stub::new(CacheMode::None);
        let error = stub.set(option, &errno.to_string()).try_open().err().expect("refused").to_string();
        for part in parts {
            assert!(error.contains(part), "'{part}' is missing in: {error}");
        }
    }
    let mut stub = Stub::new(CacheMode::None);
    stub.set("stub_unknown", "rbd_speed").set("rbd_speed", "high");
    let error = stub.try_open().err().expect("refused").to_string();
    assert!(error.contains("rbd_speed=high") && error.contains("no option"), "{error}");
    let mut stub = Stub::new(CacheMode::None);
    stub.options.conf = Some("/missing.conf".into());
    let error = stub.try_open().err().expect("refused").to_string();
    assert!(error.contains("/missing.conf") && error.contains("--ceph-conf"), "{error}");
    let mut stub = Stub::new(CacheMode::None);
    stub.set("stub_size", "511");
    assert!(stub.try_open().err().expect("refused").to_string().contains("rbd resize"));
}

#[test]
fn the_program_says_what_is_missing_and_ends_with_status_1() {
    let dir = tempfile::tempdir().unwrap();
    let run = |libraries: &std::path::Path, more: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_virtioblkd"))
            .arg("--socket-path")
            .arg(dir.path().join("socket"))
            .arg("--ceph-library-path")
            .arg(libraries)
            .args(["--rbd=pool/image"])
            .args(more)
            .output()
            .expect("the program starts");
        assert_eq!(output.status.code(), Some(1));
        assert!(!dir.path().join("socket").exists(), "a socket for a disk that is not there");
        String::from_utf8(output.stderr).unwrap()
    };
    let text = run(dir.path(), &[]);
    assert!(text.contains("librados.so.2") && text.contains("--ceph-library-path"), "{text}");
    let text = run(libraries(false), &["--rbd-option=stub_open=2", "--ceph-user=qemu"]);
    assert!(text.contains("RBD image pool/image") && text.contains("rbd ls pool"), "{text}");
    let text = run(libraries(false), &["--rbd-option=rbd_cache=true"]);
    assert!(text.contains("cache mode none") && text.contains("--rbd-allow-override"), "{text}");
}

/// A cluster that is gone for good must not keep the process: everything is synced by then.
#[test]
fn a_second_signal_ends_a_program_whose_image_does_not_close() {
    use std::io::BufRead;
    use std::os::unix::process::ExitStatusExt;
    let dir = tempfile::tempdir().unwrap();
    let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_virtioblkd"))
        .arg("--socket-path")
        .arg(dir.path().join("socket"))
        .arg("--ceph-library-path")
        .arg(libraries(false))
        .args(["--rbd=pool/image", "--rbd-option=stub_close=hangs"])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut log = std::io::BufReader::new(program.stderr.take().unwrap()).lines();
    let mut until = |words: &str| assert!(log.any(|line| line.unwrap().contains(words)), "it never said: {words}");
    let pid = rustix::process::Pid::from_child(&program);
    until("serving on");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    until("drained and synced");
    assert_eq!(program.try_wait().unwrap(), None, "the image closed");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(program.wait().unwrap().signal(), Some(15));
}
