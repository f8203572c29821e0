//! The command line and the configuration file, through the real program: texts and exit statuses.

use std::process::{Command, Output};

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_virtioblkd")).args(args).output().expect("the program starts")
}

/// What a wrong configuration says on stderr; the status must be 2, and stdout empty.
fn refused(args: &[&str]) -> String {
    let output = run(args);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
    assert!(output.stdout.is_empty());
    assert!(text.starts_with("virtioblkd: "), "{text}");
    text
}

fn printed(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(0), "{args:?}");
    assert!(output.stderr.is_empty());
    String::from_utf8(output.stdout).unwrap()
}

fn assert_all(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "'{part}' is missing in: {text}");
    }
}

#[test]
fn capabilities_as_qemus_conventions_want_them() {
    let expected = "{\"type\":\"block\",\"features\":[\"read-only\",\"blk-file\"]}\n";
    assert_eq!(printed(&["--print-capabilities"]), expected);
    assert_eq!(printed(&["--blk-file=/none", "--print-capabilities", "--read-only", "--fd=x"]), expected);
}

#[test]
fn help_names_every_option() {
    let help = printed(&["--help"]);
    let options = [
        "--socket-path",
        "--fd",
        "--blk-file",
        "--format",
        "--read-only",
        "--print-capabilities",
        "--cache",
        "--control-path",
        "--control-mode",
        "--control-access",
        "--num-queues",
        "--queue-size",
        "--serial",
        "--logical-block-size",
        "--discard",
        "--discard-granularity",
        "--locking",
        "--socket-mode",
        "--socket-group",
        "--pid-file",
        "--check",
        "--run",
        "--config",
        "--log-level",
        "--rbd",
        "--ceph-conf",
        "--ceph-user",
        "--rbd-option",
        "--rbd-allow-override",
        "--rbd-lock",
        "--rbd-state-file",
        "--rbd-encryption",
        "--rbd-passphrase-file",
        "--rbd-quiesce",
        "--rbd-quiesce-timeout",
        "--ceph-library-path",
        "--help",
        "--version",
    ];
    assert_all(&help, &options);
    assert_all(&help, &["none (O_DIRECT", "directsync", "writeback", "writethrough", "unsafe"]);
}

#[test]
fn the_version_is_printed() {
    let version = virtioblkd::internal::base::version::VERSION;
    assert!(version.starts_with(env!("CARGO_PKG_VERSION")), "{version}");
    assert_eq!(printed(&["--version"]), format!("virtioblkd {version}\n"));
}

#[test]
fn an_answer_that_cannot_be_written_is_a_failure() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_virtioblkd"))
        .arg("--print-capabilities")
        .stdout(full)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_all(&String::from_utf8(output.stderr).unwrap(), &["stdout", "No space left"]);
}

#[test]
fn a_wrong_command_line_ends_with_status_2() {
    assert_all(&refused(&[]), &["no socket given", "--socket-path", "--fd"]);
    assert_all(&refused(&["--fd=3"]), &["no image given", "--blk-file"]);
    assert_all(&refused(&["--fd=3", "--blk-file=/d", "--cache=fast"]), &["--cache", "'fast'", "writethrough"]);
    assert_all(&refused(&["--fd=3", "--socket-path=/s", "--blk-file=/d"]), &["exclude each other"]);
    assert_all(&refused(&["--queue-size", "100"]), &["--queue-size", "'100'", "power of two"]);
    assert_all(&refused(&["--blk-fil=/d"]), &["--blk-fil", "--blk-file"]);
}

#[test]
fn a_wrong_disk_file_ends_with_status_2_and_its_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.toml");
    let path = path.to_str().unwrap();
    std::fs::write(path, "blk-file = \"/d\"\ncahce = \"none\"\n").unwrap();
    assert_all(&refused(&["--fd=3", "--config", path]), &[path, ":2:", "'cahce'", "'cache'"]);
    std::fs::write(path, "blk-file = \"/d\"\n\ncache = \"fast\"\n").unwrap();
    assert_all(&refused(&["--fd=3", "--config", path]), &[path, ":3:", "cache", "'fast'", "writeback"]);
    std::fs::remove_file(path).unwrap();
    assert_all(&refused(&["--fd=3", "--config", path]), &[path, "--config", "No such file"]);
}

#[test]
fn a_file_that_others_may_change_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.toml");
    std::fs::write(&path, "blk-file = \"/nonexistent\"\nsocket-path = \"s\"\n").unwrap();
    let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    let option = format!("--config={}", path.display());
    mode(0o666);
    assert_all(&refused(&[&option]), &["disk.toml", "may be written by everybody", "chmod go-w"]);
    mode(0o644);
    assert!(!String::from_utf8(run(&[&option]).stderr).unwrap().contains("chmod"), "the image is what it lacks");
}
