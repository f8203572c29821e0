//! `virtioblkctl snapshot --to reflink:`: what it makes, where it is refused, and what a slow one costs.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use kit::driver::{ALL, Driver};
use kit::snapshot::{Agent, Daemon, Mood, Mounted, ctl, err, hooks, out, wait_until};
use serde_json::Value;

use super::scene::*;

/// XFS asks more of O_DIRECT on a file that shares blocks. A guest's partition table counts in sectors: they must stay.
#[test]
fn a_reflink_does_not_change_the_sectors_that_the_guest_sees() {
    let Some(xfs) = Mounted::xfs() else { return };
    let image = xfs.path().join("a.raw");
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    let sector = |disk: &Daemon| {
        let output = ctl().args(["--json", "--control"]).arg(disk.control()).arg("status").output().unwrap();
        let status: Value = serde_json::from_slice(&output.stdout).unwrap();
        status["logical-block-size"].as_u64().unwrap()
    };
    for mode in ["none", "writeback"] {
        let target = xfs.path().join(mode);
        let disk = Daemon::start(&image, mode);
        let before = sector(&disk);
        let to = format!("reflink:{}", target.display());
        receipt(&snapshot(&[&disk], "crash", &["--json", "--to", &to]).output().unwrap());
        // Sectors of 512 bytes are written while the file shares its blocks, and after a restart.
        for (disk, at) in [(disk, 3u64), (Daemon::start(&target, mode), 5)] {
            assert_eq!(sector(&disk), before, "{mode}");
            if before == 512 {
                let mut guest = Driver::connect_soon(&disk.socket(), 1, 16, 8192, ALL);
                guest.fill(0, &[at as u8; 512]);
                assert_eq!(guest.one(0, |guest, id| guest.write(0, at * 512, 0, 512, id)), 0);
                assert_eq!(guest.one(0, |guest, id| guest.read(0, (at - 1) * 512, 4096, 1536, id)), 0);
                let expected = [[7; 512], [at as u8; 512], [7; 512]].concat();
                assert_eq!(guest.fetch(4096, 1536), expected, "{mode}");
            }
        }
        let again = Daemon::start(&image, mode);
        assert_eq!(sector(&again), before, "{mode}: after a restart");
        drop(again);
        fs::write(&image, vec![7; 1 << 20]).unwrap();
    }
}

#[test]
fn a_reflink_is_the_image_at_the_instant() {
    let Some(xfs) = Mounted::xfs() else { return };
    let image = xfs.path().join("a.raw");
    let content: Vec<u8> = (0..3 << 20).map(|at: u32| (at % 251) as u8).collect();
    fs::write(&image, &content).unwrap();
    let disk = Daemon::start(&image, "none");
    let target = xfs.path().join("snap-a.raw");
    let to = format!("reflink:{}/snap-{{}}", xfs.path().display());
    let output = snapshot(&[&disk], "crash", &["--json", "--digest", "--to", &to]).output().unwrap();
    let receipt = receipt(&output);
    assert_eq!(fs::read(&target).unwrap(), content);
    assert_eq!(receipt["disks"][0]["target"], target.to_str().unwrap());
    let sum = Command::new("sha256sum").arg(&target).output().unwrap();
    assert!(out(&sum).starts_with(receipt["disks"][0]["sha256"].as_str().unwrap()));
    // It exists now.
    let fails = |to: &str, words: &[&str]| {
        let output = snapshot(&[&disk], "crash", &["--to", to]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        contains(&err(&output), words);
        assert!(!disk.is_held());
    };
    fails(&to, &["exists already"]);
    let partial = format!("reflink:{}/p", xfs.path().display());
    File::create(xfs.path().join("p.partial")).unwrap();
    fails(&partial, &["p.partial", "remove it"]);
    fails("reflink:/nonexistent/x", &["make its directory"]);
    let elsewhere = tempfile::tempdir().unwrap();
    fails(&format!("reflink:{}/x", elsewhere.path().display()), &["different filesystems", "copy:PATH"]);
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0, "nothing is left behind");
    // The file of this name is no longer the one that is served.
    fs::rename(&image, xfs.path().join("b.raw")).unwrap();
    fs::write(&image, &content).unwrap();
    fails(&format!("reflink:{}/y", xfs.path().display()), &["not the one that the daemon has open"]);
}

#[test]
fn a_reflink_is_refused_where_there_is_none() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let disk = Daemon::with_image(dir.path(), "a", 1 << 20);
    let to = format!("reflink:{}/x", dir.path().display());
    let output = snapshot(&[&disk], "crash", &["--to", &to]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    contains(&err(&output), &["cannot share blocks", "copy:PATH"]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");
}

/// An image in `count` extents, at least.
fn fragmented(path: &Path, count: u64) {
    let file = File::create(path).unwrap();
    file.set_len(count * 8192).unwrap();
    for at in 0..count {
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], at * 8192).unwrap();
    }
    file.sync_all().unwrap();
}

#[test]
fn a_reflink_that_cannot_end_within_the_lease_is_refused_before_anything_is_held() {
    let Some(xfs) = Mounted::xfs() else { return };
    let image = xfs.path().join("a.raw");
    fragmented(&image, 30_000);
    let disk = Daemon::start(&image, "writeback");
    let agent = Agent::start(Mood::Good, &[disk.control()]);
    let to = format!("reflink:{}/snap", xfs.path().display());
    let run = |lease: &str| {
        let options = ["--json", "--lease", lease, "--to", &to, "--qga", agent.path.to_str().unwrap()];
        snapshot(&[&disk], "filesystem", &options).output().unwrap()
    };
    let output = run("20ms");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    contains(&err(&output), &["30000 extents", "--lease (20ms)", "copy:PATH", "xfs_fsr"]);
    assert_eq!(agent.asked("guest-fsfreeze-freeze"), 0, "the guest was frozen for nothing");
    assert_eq!(names(&xfs.path()), ["a.raw"]);
    // With room enough it is taken.
    assert_eq!(receipt(&run("10m"))["level"], "filesystem");
    assert!(fs::read(xfs.path().join("snap")).unwrap() == fs::read(&image).unwrap());
}

/// The guest and the disk go on when the lease is over, although the clone hangs in the kernel; nothing is published.
#[test]
fn a_reflink_that_hangs_is_given_up_when_the_lease_is_over() {
    let Some(xfs) = Mounted::xfs() else { return };
    let image = xfs.path().join("a.raw");
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    let disk = Daemon::start(&image, "writeback");
    let agent = Agent::start(Mood::Good, &[disk.control()]);
    let dir = tempfile::tempdir().unwrap();
    // The hook comes after everything was prepared.
    let freeze = format!("PATH=$PATH:/usr/sbin:/sbin; exec fsfreeze -f {}", xfs.path().display());
    let directory = hooks(dir.path(), &freeze, "true");
    let to = format!("reflink:{}/snap", xfs.path().display());
    let options = ["--lease", "2s", "--to", &to, "--hooks", directory.to_str().unwrap()];
    let mut command = snapshot(&[&disk], "application", &options);
    let output = command.arg("--qga").arg(&agent.path).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    contains(&err(&output), &["did not end within --lease", "copy:PATH", "snap.partial"]);
    agent.wait_thawed();
    assert!(!disk.is_held());
    disk.wait_for_log(&["ended by resume"]);
    // It ends when the filesystem goes on.
    assert!(xfs.set_frozen(false), "it was not frozen");
    wait_until("nothing is left behind", || names(&xfs.path()) == ["a.raw"]);
}

#[test]
fn a_reflink_on_btrfs_is_without_checksums_if_the_image_is() {
    let Some(btrfs) = Mounted::btrfs() else { return };
    let content = vec![7; 1 << 20];
    let directory = btrfs.path().join("nocow");
    fs::create_dir(&directory).unwrap();
    let flags = rustix::fs::IFlags::NOCOW;
    rustix::fs::ioctl_setflags(File::open(&directory).unwrap(), flags).unwrap();
    // A file takes the flag from its directory; so there are four cases.
    for (at, (image, target)) in
        [("a", "a.snap"), ("nocow/b", "b.snap"), ("nocow/c", "nocow/c.snap"), ("d", "nocow/d.snap")].iter().enumerate()
    {
        let image = btrfs.path().join(image);
        fs::write(&image, &content).unwrap();
        let is_nocow = |path: &Path| rustix::fs::ioctl_getflags(File::open(path).unwrap()).unwrap().contains(flags);
        assert_eq!(is_nocow(&image), at == 1 || at == 2);
        let disk = Daemon::start(&image, "writeback");
        let target = btrfs.path().join(target);
        let to = format!("reflink:{}", target.display());
        receipt(&snapshot(&[&disk], "crash", &["--json", "--to", &to]).output().unwrap());
        assert!(fs::read(&target).unwrap() == content);
        assert_eq!(is_nocow(&target), is_nocow(&image));
    }
}

/// A daemon that was broken into names the image of another guest, and a process that cannot be checked.
#[test]
fn a_reflink_is_made_only_of_a_file_that_the_daemon_has_open() {
    use std::io::{BufRead, BufReader, Write};
    let dir = tempfile::tempdir().unwrap();
    let (control, other) = (dir.path().join("control"), dir.path().join("other.raw"));
    fs::write(&other, [1; 4096]).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(&control).unwrap();
    let status = serde_json::json!({"return": {"image-path": other, "image": "a", "daemon": {"pid": 1}}});
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let requests = BufReader::new(stream.try_clone().unwrap()).lines();
            let greeting = serde_json::json!({"QMP": {"version": {}, "capabilities": []}});
            // The client goes when it likes.
            let _ = writeln!(stream, "{greeting}");
            for request in requests.map_while(Result::ok) {
                let is_status = request.contains("query-status");
                let reply = if is_status { status.clone() } else { serde_json::json!({"return": {}}) };
                let _ = writeln!(stream, "{reply}");
            }
        }
    });
    let to = format!("reflink:{}", dir.path().join("target").display());
    let mut command = ctl();
    command.args(["snapshot", "--level", "crash", "--to", &to, "--disk"]).arg(&control);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    contains(&err(&output), &["other.raw", "is not the one that the daemon has open"]);
}
