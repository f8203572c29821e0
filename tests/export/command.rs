//! `virtioblkctl snapshot --to nbd:`: the real daemon in its sandbox, a guest, and a client.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use kit::front_end::{ALL, FrontEnd};
use kit::upgrade::{Disk, SIZE, contains, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use virtioblkd::internal::control::client::Client;

use super::clients::{ask, connect_to, read};

const OK: u8 = 0;

/// A served image that is full of this byte, whose copies and scratch may go beside it.
fn filled(byte: u8) -> Disk {
    let dir = kit::programs::disk_dir();
    fs::write(dir.path().join("disk.img"), vec![byte; SIZE]).unwrap();
    let options = ["--blk-file", "disk.img", "--cache", "writeback", "--copy-dir", "."];
    Disk::serve_in(dir, &options)
}

fn guest(disk: &Disk) -> FrontEnd {
    FrontEnd::connect(&disk.path("vhost"), 1, 64, ALL)
}

/// Overwrites all of it, a part of each cluster at a time.
fn overwrite(guest: &mut FrontEnd) {
    for at in (0..SIZE).step_by(32 << 10) {
        assert_eq!(guest.write(0, (at / 512) as u64, &[0x77; 4096]), OK, "the guest saw an error");
    }
}

fn snapshot(disks: &[&Disk], more: &[&str]) -> Command {
    let mut command = kit::snapshot::ctl();
    command.args(["--json", "snapshot", "--level", "crash"]).args(more);
    for disk in disks {
        command.arg("--disk").arg(disk.path("control"));
        command.arg("--to").arg(format!("nbd:{}", disk.path("nbd").display()));
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Waits until the sockets are there and their instant can be read: the daemon accepts nobody before.
fn started(command: &mut Command, disks: &[&Disk]) -> Child {
    let child = command.spawn().unwrap();
    for disk in disks {
        wait_until("the export", || {
            let copies: Value = serde_json::from_str(&disk.ctl_ok(&["--json", "copies"])).unwrap();
            copies.as_array().is_some_and(|list| list.iter().any(|copy| copy["state"] == "running"))
        });
    }
    child
}

fn receipt(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// All of the export.
fn contents(disk: &Disk) -> Vec<u8> {
    // The export's name is the control socket's.
    let mut stream = UnixStream::connect(disk.path("nbd")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    // An old client: NBD_OPT_EXPORT_NAME without a name.
    std::io::Write::write_all(&mut stream, b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    let mut export = [0; 10];
    stream.read_exact(&mut export).unwrap();
    assert_eq!(export[..8], (SIZE as u64).to_be_bytes());
    ask(&mut stream, 0, SIZE as u32);
    let mut data = vec![0; 16 + SIZE];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(data[4..8], [0; 4], "no error");
    data.split_off(16)
}

#[test]
fn disks_of_one_instant_are_read_while_their_guests_go_on() {
    let disks = [filled(1), filled(2)];
    let all: Vec<&Disk> = disks.iter().collect();
    let mut guests = disks.each_ref().map(guest);
    let child = started(snapshot(&all, &["--idle", "2s"]).arg("--lease").arg("10s"), &all);
    for (disk, (guest, byte)) in all.iter().zip(guests.iter_mut().zip([1, 2])) {
        assert_eq!(contents(disk), vec![byte; SIZE]);
        overwrite(guest);
        assert_eq!(contents(disk), vec![byte; SIZE]);
    }
    let output = child.wait_with_output().unwrap();
    let receipt = receipt(&output);
    contains(&String::from_utf8_lossy(&output.stderr), &["nbd+unix:///control?socket=", "/nbd"]);
    for (at, disk) in all.iter().enumerate() {
        let done = &receipt["disks"][at];
        assert_eq!((&done["way"], &done["copy"]["state"]), (&"nbd".into(), &"completed".into()), "{receipt}");
        assert_eq!(done["copy"]["export"]["read-bytes"], 2 * SIZE as u64, "{receipt}");
        assert!(!disk.path("nbd").exists(), "the socket is removed");
        assert_eq!(disk.image()[..4096], [0x77; 4096], "the guest's data is in the image");
    }
}

#[test]
fn an_export_in_the_background_is_shown_and_cancelled() {
    let disk = filled(3);
    let taken = receipt(&snapshot(&[&disk], &["--background", "--idle", "600s"]).output().unwrap());
    let copy = taken["disks"][0]["copy"]["copy"].as_str().unwrap().to_owned();
    assert_eq!((&taken["detached"], &taken["disks"][0]["copy"]["state"]), (&true.into(), &"running".into()));
    let mut client = connect_to(&disk.path("nbd"), b"control");
    assert_eq!(read(&mut client, 0, 512).unwrap(), [3; 512]);
    contains(&disk.ctl_ok(&["copies"]), &[&copy, "running", "NBD export control of 4.0 MiB", "client(s)"]);
    let refused = snapshot(&[&disk], &[]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    contains(&String::from_utf8_lossy(&refused.stderr), &["a server is listening"]);
    assert_eq!(
        disk.ctl_ok(&["copies", "cancel", &copy]),
        format!("{copy} is cancelled; its clients' connections end\n")
    );
    wait_until("nobody listens", || UnixStream::connect(disk.path("nbd")).is_err());
    contains(&disk.ctl_ok(&["copies"]), &[&copy, "cancelled"]);
    // The socket that is left is replaced.
    receipt(&snapshot(&[&disk], &["--background"]).output().unwrap());
    assert_eq!(contents(&disk), vec![3; SIZE]);
}

#[test]
fn the_map_is_that_of_nbdinfo() {
    let dir = kit::programs::disk_dir();
    let image = fs::File::create(dir.path().join("disk.img")).unwrap();
    image.set_len(SIZE as u64).unwrap();
    for at in [0, 4096, 1 << 20, (2 << 20) + 8192, SIZE as u64 - 4096] {
        std::os::unix::fs::FileExt::write_all_at(&image, &[1; 4096], at).unwrap();
    }
    let disk = Disk::serve_in(dir, &["--blk-file", "disk.img", "--cache", "writeback", "--copy-dir", "."]);
    let none = disk.ctl(&["map"]);
    assert_eq!(none.status.code(), Some(1));
    contains(&String::from_utf8_lossy(&none.stderr), &["no export runs", "--to nbd:"]);
    receipt(&snapshot(&[&disk], &["--background", "--idle", "600s"]).output().unwrap());
    let map: Value = serde_json::from_str(&disk.ctl_ok(&["--json", "map"])).unwrap();
    let lengths = map.as_array().unwrap().iter().map(|extent| extent["length"].as_u64().unwrap());
    assert_eq!(lengths.sum::<u64>(), SIZE as u64, "{map}");
    assert_eq!(map, serde_json::from_str::<Value>(&disk.ctl_ok(&["--json", "map", "copy-1"])).unwrap());
    let uri = format!("nbd+unix:///control?socket={}", disk.path("nbd").display());
    let nbdinfo = |arguments: &[&str]| match Command::new("nbdinfo").args(arguments).arg(&uri).output() {
        Ok(output) if output.status.success() => Some(String::from_utf8(output.stdout).unwrap()),
        Ok(output) => panic!("{output:?}"),
        Err(error) => {
            eprintln!("SKIPPED: nbdinfo is not installed (scripts/install-test-deps): {error}");
            None
        }
    };
    // Once more when the guest has gone on: what is saved has holes of whole clusters only.
    for has_gone_on in [false, true] {
        if has_gone_on {
            overwrite(&mut guest(&disk));
        }
        if let Some(theirs) = nbdinfo(&["--map", "--json"]) {
            let value = |text: &str| serde_json::from_str::<Value>(text).unwrap();
            assert_eq!(value(&disk.ctl_ok(&["--json", "map"])), value(&theirs));
        }
        if let Some(theirs) = nbdinfo(&["--map"]) {
            let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            assert_eq!(words(&disk.ctl_ok(&["map"])), words(&theirs));
        }
    }
    let wrong = disk.ctl(&["map", "copy-7"]);
    contains(&String::from_utf8_lossy(&wrong.stderr), &["copy-7", "virtioblkctl copies"]);
}

#[test]
fn an_export_ends_with_the_command_that_began_it() {
    let disk = filled(4);
    let mut guest = guest(&disk);
    for how in [Signal::INT, Signal::KILL] {
        let mut child = started(&mut snapshot(&[&disk], &["--idle", "600s"]), &[&disk]);
        overwrite(&mut guest);
        kill_process(Pid::from_child(&child), how).unwrap();
        assert_ne!(child.wait().unwrap().code(), Some(0));
        wait_until("the export ends", || UnixStream::connect(disk.path("nbd")).is_err());
        if how == Signal::INT {
            assert!(!disk.path("nbd").exists());
        }
        overwrite(&mut guest);
    }
}

#[test]
fn an_upgrade_or_a_kill_ends_an_export_and_the_guest_goes_on() {
    let disk = filled(5);
    let mut guest = guest(&disk);
    receipt(&snapshot(&[&disk], &["--background"]).output().unwrap());
    let mut client = connect_to(&disk.path("nbd"), b"control");
    assert_eq!(read(&mut client, 0, 512).unwrap(), [5; 512]);
    overwrite(&mut guest);
    let old = disk.pid();
    // One that is refused leaves the export alone.
    assert!(!disk.ctl(&["upgrade", "--", "--read-only"]).status.success());
    assert_eq!((disk.pid(), read(&mut client, 4096, 512).unwrap()), (old, vec![5; 512]));
    disk.upgrade(&[]);
    assert_ne!(disk.pid(), old);
    overwrite(&mut guest);
    // The reason, or the end of the connection: the old process may be gone already.
    assert_eq!(client.read(&mut [0; 1]).unwrap_or(0), 0, "no data after the end");
    contains(&disk.log(), &["an upgrade has begun"]);
    receipt(&snapshot(&[&disk], &["--background"]).output().unwrap());
    let mut client = connect_to(&disk.path("nbd"), b"control");
    assert_eq!(read(&mut client, 0, 512).unwrap(), [0x77; 512]);
    kill_process(disk.pid(), Signal::KILL).unwrap();
    assert_eq!(client.read(&mut [0; 1]).unwrap_or(0), 0, "the kernel closes the connection");
}

#[test]
fn what_cannot_be_exported_is_refused() {
    let disk = Disk::serve(&[]);
    let refused = snapshot(&[&disk], &[]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    contains(&String::from_utf8_lossy(&refused.stderr), &["--scratch", "--copy-dir"]);
    assert!(!disk.path("nbd").exists(), "the socket is removed");
    let timeout = Duration::from_secs(60);
    let mut client = Client::connect_within(&disk.path("control"), timeout).unwrap();
    let code = |failure: Result<Value, virtioblkd::internal::control::client::Failure>| failure.unwrap_err().code;
    assert_eq!(code(client.execute("getfd", json!({"fdname": "a"}), timeout)), "no-descriptor");
    assert_eq!(code(client.execute("closefd", json!({"fdname": "a"}), timeout)), "no-descriptor");
    let prepare = json!({"fdname": "a", "name": "vda"});
    assert_eq!(code(client.execute("export-prepare", prepare.clone(), timeout)), "no-descriptor");
    let (stream, _other) = UnixStream::pair().unwrap();
    let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let network = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for wrong in [stream.as_fd(), datagram.as_fd(), network.as_fd()] {
        client.pass_descriptor("getfd", json!({"fdname": "a"}), wrong, timeout).unwrap();
        assert_eq!(code(client.execute("export-prepare", prepare.clone(), timeout)), "no-descriptor");
    }
    for _ in 0..3 {
        let listener = UnixListener::bind(disk.path("other")).unwrap();
        client.pass_descriptor("getfd", json!({"fdname": "a"}), listener.as_fd(), timeout).unwrap();
        client.execute("closefd", json!({"fdname": "a"}), timeout).unwrap();
        drop(listener);
        wait_until("the daemon has closed it", || UnixStream::connect(disk.path("other")).is_err());
        fs::remove_file(disk.path("other")).unwrap();
    }
}
