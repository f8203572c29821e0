//! Taking a socket's path: who has it, and what is left of it.

use super::*;
use std::os::unix::net::{UnixDatagram, UnixStream};

/// Waits until nothing listens at `path`: a program that another test starts has a copy of the socket until its exec.
fn wait_until_dead(path: &Path) {
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while UnixStream::connect(path).is_ok() {
        assert!(std::time::Instant::now() < end, "something still listens");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn mode_of(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn a_socket_has_its_exact_mode_from_the_start() {
    let dir = tempfile::tempdir().unwrap();
    for mode in [0o600, 0o660, 0o666, 0o777] {
        let path = dir.path().join(format!("{mode:o}"));
        let _listener = bind_unix(&path, mode).unwrap();
        assert_eq!(mode_of(&path), mode);
    }
    // What the kernel does without the chmod behind it: the window that must not be.
    let path = dir.path().join("bare");
    let socket = new_socket().unwrap();
    fchmod(&socket, Mode::from_raw_mode(0o600)).unwrap();
    bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    assert_eq!(mode_of(&path) & !0o600, 0);
}

#[test]
fn only_a_socket_of_our_own_is_given_permissions() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    let twice = dir.path().join("twice");
    let listener = bind_unix(&twice, 0o600).unwrap();
    fs::hard_link(&twice, dir.path().join("other")).unwrap();
    for path in [&file, &link, &twice] {
        assert!(matches!(OwnFile::open(path), Err(BindError::Replaced(_))), "{}", path.display());
    }
    drop(listener);
}

#[test]
fn a_correct_mode_is_not_set_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _listener = bind_unix(&path, 0o600).unwrap();
    let changed = |path: &Path| fs::metadata(path).map(|found| (found.ctime(), found.ctime_nsec())).unwrap();
    let before = changed(&path);
    std::thread::sleep(Duration::from_millis(50));
    OwnFile::open(&path).unwrap().set_mode(0o600).unwrap();
    assert_eq!(changed(&path), before, "chmod(2) was called");
    if std::os::unix::fs::chown(&path, Some(65534), None).is_err() {
        eprintln!("SKIPPED: not root, who alone can give files away");
        return;
    }
    let others = OwnFile::open(&path).unwrap();
    others.set_mode(0o600).expect("nothing to change");
    assert!(others.set_mode(0o666).unwrap_err().to_string().contains("65534"));
    assert!(others.set_group(Gid::from_raw(65534)).is_err());
    assert_eq!(mode_of(&path), 0o600);
}

#[test]
fn a_link_that_takes_the_sockets_place_keeps_its_target_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (target, path) = (dir.path().join("target"), dir.path().join("s"));
    fs::write(&target, "").unwrap();
    fs::set_permissions(&target, Permissions::from_mode(0o600)).unwrap();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        // The owner of the directory waits for the socket and puts a link in its place.
        scope.spawn(|| {
            let link = dir.path().join("link");
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                // It may be there still: the last rename found no socket.
                let _ = std::os::unix::fs::symlink(&target, &link);
                while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                    if fs::symlink_metadata(&path).is_ok_and(|found| found.file_type().is_socket()) {
                        // It may have gone meanwhile.
                        let _ = fs::rename(&link, &path);
                        break;
                    }
                }
            }
        });
        for _ in 0..3000 {
            // Replaced, or bound before the other one was there.
            let _ = bind_unix(&path, 0o666);
            let _ = fs::remove_file(&path);
        }
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(mode_of(&target), 0o600);
}

#[test]
fn a_dead_servers_socket_is_replaced_and_a_living_ones_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let first = bind_unix(&path, 0o600).unwrap();
    let error = bind_unix(&path, 0o600).unwrap_err();
    assert!(matches!(error, BindError::InUse(_)), "{error:?}");
    assert!(error.to_string().contains("already") && error.to_string().contains("/s'"));
    UnixStream::connect(&path).expect("the living server still has its socket");
    drop(first);
    wait_until_dead(&path);
    let second = bind_unix(&path, 0o600).expect("the dead server's is replaced");
    UnixStream::connect(&path).unwrap();
    drop(second);
    fs::remove_file(&path).unwrap();
    let _datagram = UnixDatagram::bind(&path).unwrap();
    assert!(matches!(bind_unix(&path, 0o600), Err(BindError::InUse(_))), "another process's socket, though no stream");
}

#[test]
fn a_server_too_busy_to_accept_is_alive() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _listener = bind_unix(&path, 0o600).unwrap();
    let address = SocketAddrUnix::new(&path).unwrap();
    let mut waiting = Vec::new();
    loop {
        let client = new_socket().unwrap();
        match connect(&client, &address) {
            Ok(()) => waiting.push(client),
            Err(errno) => break assert_eq!(errno, Errno::AGAIN),
        }
    }
    assert!(matches!(bind_unix(&path, 0o600), Err(BindError::InUse(_))));
}

#[test]
fn a_path_that_is_no_socket_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    for (path, word) in [(&file, "a file"), (&link, "symbolic"), (&dir.path().to_owned(), "directory")] {
        let error = bind_unix(path, 0o600).unwrap_err();
        assert!(matches!(error, BindError::NotASocket(..)), "{error:?}");
        assert!(error.to_string().contains(word), "{error}");
    }
    assert_eq!(fs::read(&file).unwrap(), b"precious");
}

#[test]
fn errors_name_the_cause() {
    let dir = tempfile::tempdir().unwrap();
    let error = bind_unix(&dir.path().join("x".repeat(200)), 0o600).unwrap_err();
    assert!(matches!(error, BindError::TooLong(_)) && error.to_string().contains("107"), "{error}");
    let length = MAX_PATH - dir.path().as_os_str().len() - 1;
    bind_unix(&dir.path().join("x".repeat(length)), 0o600).expect("107 bytes fit");
    let error = bind_unix(&dir.path().join("missing/s"), 0o600).unwrap_err();
    assert!(matches!(error, BindError::NoDirectory(_)), "{error:?}");
    assert!(error.to_string().contains("create it"), "{error}");
    let error = bind_unix(Path::new("/proc/s"), 0o600).unwrap_err();
    assert!(error.to_string().contains("/proc/s"), "{error}");
    // Root is never denied, so the test makes up the kernel's error.
    let error = BindError::new(Path::new("/there/s"), Errno::ACCESS);
    assert!(matches!(error, BindError::Denied(..)) && error.to_string().contains("/there/s"), "{error}");
}

#[test]
fn of_servers_that_start_at_once_one_binds_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..20 {
        let path = dir.path().join(format!("s{round}"));
        drop(bind_unix(&path, 0o600).unwrap());
        wait_until_dead(&path);
        let start = std::sync::Barrier::new(4);
        let won: Vec<_> = std::thread::scope(|scope| {
            let bind = || {
                start.wait();
                bind_unix(&path, 0o600)
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(bind)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(won.iter().filter(|result| result.is_ok()).count(), 1, "{won:?}");
        UnixStream::connect(&path).expect("and the winner's socket is there");
    }
}

#[test]
fn the_guard_removes_only_its_own_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let first = bind_unix(&path, 0o600).unwrap();
    let guard = SocketFile::of(&path).unwrap();
    fs::remove_file(&path).unwrap();
    // It may well get the same inode number.
    let _successor = bind_unix(&path, 0o600).unwrap();
    drop(guard);
    assert!(path.exists(), "a successor's socket stays");
    drop(first);
    let guard = SocketFile::of(&path).unwrap();
    drop(guard);
    assert!(!path.exists());
    assert!(SocketFile::of(&path).is_err());
}
