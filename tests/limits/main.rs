//! UNSAFE. What the system refuses the program: io_uring, descriptors. Each ends in words that say what to change.
//!
//! The unsafe calls install a system call filter in the child before it becomes the program.
#![allow(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use kit::driver::{ALL, Driver};
use rustix::process::{Resource, Rlimit, setrlimit};
use virtioblkd::engine::CacheMode;

/// The program on an image of its own, its socket and its command.
fn program(dir: &Path) -> Command {
    let image = dir.join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
    command.arg("--blk-file").arg(image).arg("--socket-path").arg(dir.join("s"));
    command.arg("--control-path").arg(dir.join("c")).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// Waits for the end of a program that cannot start; one that serves is ended.
fn ended(dir: &Path, command: &mut Command) -> (Output, bool) {
    let mut child = command.spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    let mut served = false;
    while !served && child.try_wait().unwrap().is_none() {
        served = dir.join("s").exists();
        assert!(Instant::now() < end, "it neither serves nor ends");
        std::thread::sleep(Duration::from_millis(1));
    }
    if served {
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }
    (child.wait_with_output().unwrap(), served)
}

/// A filter (seccomp(2)) that makes io_uring_setup fail with `errno`, as a container's or an old kernel does.
fn refuse_io_uring(errno: i32) -> std::io::Result<()> {
    // The number is the same on every architecture (since Linux 5.1).
    let setup = libc::SYS_io_uring_setup as u32;
    let statement = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut filter = [
        // The system call's number is the first field of struct seccomp_data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, setup, 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32, 0, 0),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: plain values, as prctl(2) asks for them.
    let unprivileged = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: the program and its filter live through the call, which copies them.
    let filtered = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if unprivileged != 0 || filtered != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

#[test]
fn without_io_uring_it_does_not_start_and_says_what_to_change() {
    for (errno, words) in [
        (libc::ENOSYS, &["CONFIG_IO_URING", "seccomp profile"][..]),
        (libc::EPERM, &["kernel.io_uring_disabled", "seccomp profile"]),
        (libc::ENOMEM, &["RLIMIT_MEMLOCK", "ulimit -l", "LimitMEMLOCK="]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut command = program(dir.path());
        // SAFETY: between fork and exec only prctl(2) is called, and nothing is allocated.
        unsafe { command.pre_exec(move || refuse_io_uring(errno)) };
        let (output, served) = ended(dir.path(), &mut command);
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(!served && output.status.code() == Some(1), "{errno}: {log}");
        let image = dir.path().join("disk.img");
        for word in words.iter().chain([&image.to_str().unwrap()]) {
            assert!(log.contains(word), "{errno}: '{word}' is missing in: {log}");
        }
        assert!(!dir.path().join("s").exists() && !dir.path().join("c").exists());
    }
}

#[test]
fn without_descriptors_it_does_not_start_and_says_what_to_change() {
    let mut failures = 0;
    // From too few for the shared libraries to more than it needs.
    for limit in 4..24 {
        let dir = tempfile::tempdir().unwrap();
        let mut command = program(dir.path());
        let few = Rlimit { current: Some(limit), maximum: Some(limit) };
        // SAFETY: between fork and exec only setrlimit(2) is called, and nothing is allocated.
        unsafe { command.pre_exec(move || Ok(setrlimit(Resource::Nofile, few)?)) };
        let (output, _) = ended(dir.path(), &mut command);
        if !output.status.success() {
            let log = String::from_utf8(output.stderr).unwrap();
            if log.contains("error while loading shared libraries") {
                // The program never ran. It depends on what the test itself inherited whether this happens.
                continue;
            }
            assert!(log.contains("RLIMIT_NOFILE") && log.contains("ulimit -n"), "{limit}: {log}");
            failures += 1;
        }
    }
    assert!(failures > 0, "it needs no descriptors?");
}

#[test]
fn no_more_queues_are_offered_than_there_are_descriptors_for() {
    let dir = tempfile::tempdir().unwrap();
    let few = Rlimit { current: Some(120), maximum: Some(120) };
    let mut command = program(dir.path());
    // SAFETY: between fork and exec only setrlimit(2) is called, and nothing is allocated.
    unsafe { command.pre_exec(move || Ok(setrlimit(Resource::Nofile, few)?)) };
    let child = command.spawn().unwrap();
    let socket = dir.path().join("s");
    for _ in 0..10 {
        let mut guest = Driver::connect_soon(&socket, 4, 16, 4096, ALL);
        for queue in 0..4 {
            assert_eq!(guest.one(queue, |guest, id| guest.write(queue, 0, 0, 512, id)), 0);
        }
        drop(guest);
        // Refused, not left without an answer; or turned away, if the last one is not gone yet.
        assert!(Driver::connect(&socket, 5, 16, 4096, ALL).is_err());
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && log.contains("4 queues are offered instead of 256"), "{log}");
    assert!(log.contains("RLIMIT_NOFILE") && !log.contains("error:"), "{log}");
}

/// A write beyond the limit of a file's size fails as EFBIG. The signal of it would end the program, and with it every
/// disk that an unlimited front-end still holds open.
#[test]
fn a_limit_of_the_files_size_fails_the_write_and_nothing_else() {
    const LIMIT: u64 = 1 << 19;
    for mode in CacheMode::ALL {
        let dir = tempfile::tempdir().unwrap();
        let mut command = program(dir.path());
        command.args(["--cache", &mode.to_string()]);
        let small = Rlimit { current: Some(LIMIT), maximum: Some(LIMIT) };
        // SAFETY: between fork and exec only setrlimit(2) is called, and nothing is allocated.
        unsafe { command.pre_exec(move || Ok(setrlimit(Resource::Fsize, small)?)) };
        let child = command.spawn().unwrap();
        let mut guest = Driver::connect_soon(&dir.path().join("s"), 1, 16, 1 << 19, ALL);
        // Small and large: by a call of the ring's thread, and through io_uring.
        for len in [4096, 1 << 18, (1 << 18) + 4096] {
            assert_eq!(guest.one(0, |guest, id| guest.write(0, 0, 0, len, id)), 0, "{mode}: {len} bytes below");
            assert_eq!(guest.one(0, |guest, id| guest.write(0, LIMIT, 0, len, id)), -libc::EIO, "{mode}: {len} bytes");
            assert_eq!(guest.one(0, |guest, id| guest.read(0, LIMIT, 0, len, id)), 0, "{mode}: reads have no limit");
        }
        guest.one(0, |guest, id| guest.write_zeroes(0, LIMIT, 4096, false, id));
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 0, 0, 512, id)), 0, "{mode}: it serves on");
        drop(guest);
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM).unwrap();
        let output = child.wait_with_output().unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && log.contains("File too large"), "{mode}: {log}");
    }
}
