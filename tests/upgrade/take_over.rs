//! Upgrade in place: another process takes a guest over, under load, from any cache mode to any other; whatever fails
//! leaves it where it is. All with the real programs, in their sandbox.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use kit::driver::load::{Load, holds};
use kit::driver::{ALL, Driver, F_FLUSH};
use kit::snapshot::{Agent, Mood};
use kit::upgrade::{Disk, NewDaemon, SIZE, contains, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const MODES: [&str; 5] = ["none", "directsync", "writeback", "writethrough", "unsafe"];

/// Holds the disk and looks whether the image has all that was acknowledged.
fn check(disk: &Disk, load: &Load, what: &str) {
    let token = disk.ctl_ok(&["quiesce"]);
    let acknowledged = load.acknowledged();
    holds(&disk.image(), &acknowledged, what);
    disk.ctl_ok(&["resume", token.trim()]);
}

#[test]
fn a_guest_under_load_goes_from_every_mode_to_every_other() {
    let disk = Disk::serve(&["--cache", "none"]);
    let load = Load::start(&disk.path("vhost"));
    load.wait_for(100);
    let mut pauses = Vec::new();
    // A way along every pair.
    for step in 0..MODES.len() {
        for mode in MODES.iter().cycle().skip(step).step_by(step + 1).take(MODES.len() + 1) {
            let figures = disk.upgrade(&["--cache", mode]);
            assert_eq!(disk.status()["cache-mode"], json!(mode));
            pauses.push(figures["pause-us"].as_u64().unwrap());
            load.wait_for(100);
        }
        check(&disk, &load, "between");
    }
    pauses.sort_unstable();
    eprintln!("pauses in microseconds: median {}, longest {}", pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
    check(&disk, &load, "at the end");
    let acknowledged = load.stop();
    disk.ctl_ok(&["quit"]);
    wait_until("the daemon ends", || !disk.path("pid").exists());
    holds(&disk.image(), &acknowledged, "after the end");
}

#[test]
fn an_upgrade_does_not_repeat_the_warning_of_files_that_remain() {
    let dir = kit::programs::disk_dir();
    fs::create_dir(dir.path().join("beneath")).unwrap();
    fs::write(dir.path().join("disk.img"), vec![0; SIZE]).unwrap();
    let disk = Disk::serve_in(dir, &["--blk-file", "disk.img"]);
    let warning = "will remain when virtioblkd ends";
    disk.wait_for_log(&["the files of --socket-path and --control-path and --pid-file", warning]);
    let output = disk.ctl(&["upgrade"]);
    assert!(output.status.success(), "{output:?}");
    let log = disk.wait_for_log(&["took the guest over"]) + &String::from_utf8(output.stderr).unwrap();
    assert_eq!(log.matches(warning).count(), 1, "{log}");
}

#[test]
fn counters_continue_after_an_upgrade() {
    let disk = Disk::serve(&["--cache", "none"]);
    let load = Load::start(&disk.path("vhost"));
    load.wait_for(200);
    load.stop();
    wait_until("nothing is in flight", || disk.status()["connected"] == false);
    let counted = |disk: &Disk| -> Value { serde_json::from_str(&disk.ctl_ok(&["stats", "--json"])).unwrap() };
    let before = counted(&disk);
    assert!(before["total"]["writes"].as_u64().unwrap() >= 200, "{before}");
    assert!(before["latency"]["request"]["write"]["sum-ns"].as_u64().unwrap() > 0, "{before}");
    for mode in ["none", "writeback"] {
        disk.upgrade(&["--cache", mode]);
        let after = counted(&disk);
        for figure in ["reads", "read-bytes", "writes", "written-bytes", "flushes", "syncs", "interrupts"] {
            assert_eq!(after["total"][figure], before["total"][figure], "{figure}");
        }
        assert_eq!(after["latency"]["request"], before["latency"]["request"]);
    }
    // Nobody is connected; a guest that comes counts on.
    let load = Load::start(&disk.path("vhost"));
    load.wait_for(100);
    let before = counted(&disk);
    disk.upgrade(&[]);
    load.wait_for(100);
    let after = counted(&disk);
    for part in ["/total/writes", "/rings/0/writes"] {
        let figure = |stats: &Value| stats.pointer(part).and_then(Value::as_u64).unwrap_or_else(|| panic!("{stats}"));
        assert!(figure(&after) >= figure(&before), "{part}: {before}, then {after}");
    }
    load.stop();
    disk.end();
}

#[test]
fn a_watch_goes_on_over_an_upgrade_and_ends_with_the_disk() {
    let disk = Disk::serve(&[]);
    let mut watch = Command::new(env!("CARGO_BIN_EXE_virtioblkctl"));
    watch.current_dir(&disk.dir).args(["--control", "control", "watch"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut watch = watch.spawn().unwrap();
    let printed = Arc::new(Mutex::new(String::new()));
    let lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let reader = {
        let printed = printed.clone();
        std::thread::spawn(move || lines.for_each(|line| *printed.lock().unwrap() += &(line.unwrap() + "\n")))
    };
    let has_printed = |what: &str| printed.lock().unwrap().contains(what);
    let held_until_printed = |who: &str| {
        // It may not have connected yet.
        wait_until(who, || {
            let token = disk.ctl_ok(&["quiesce", "--who", who]);
            disk.ctl_ok(&["resume", token.trim()]);
            has_printed(who)
        });
    };
    held_until_printed("before");
    disk.upgrade(&[]);
    wait_until("UPGRADE", || has_printed("UPGRADE"));
    held_until_printed("after");
    disk.end();
    reader.join().unwrap();
    assert!(has_printed("SHUTDOWN"));
    let output = watch.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    contains(&said, &["another process has taken the disk over", "the daemon has ended"]);
}

#[test]
fn copy_dirs_are_added_or_replaced_and_reported() {
    let dirs = [(); 3].map(|()| tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    let [first, second, third] = dirs.each_ref().map(|dir| dir.path().to_str().unwrap());
    let disk = Disk::serve(&["--copy-dir", first]);
    let arguments = |disk: &Disk| {
        let line = disk.client().ask("query-command-line", json!({})).unwrap();
        line["arguments"].to_string()
    };
    let missing = format!("copy-dir={second}/missing");
    contains(&disk.refuses(&["--add", &missing]), &["/missing'", "create the directory first", "serves on"]);
    disk.ctl_ok(&["upgrade", "--add", &format!("copy-dir={second}")]);
    contains(&arguments(&disk), &[first, second]);
    let output = disk.ctl(&["upgrade", "--", "--copy-dir", third]);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    contains(&said, &[first, second, "is dropped", "--add copy-dir="]);
    let now = arguments(&disk);
    assert!(now.contains(third) && !now.contains(first), "{now}");
    disk.end();
}

/// Asks for the hand-over as far as the first answer.
fn begin(disk: &Disk) -> NewDaemon {
    let mut new = NewDaemon::connect(disk);
    new.say(&json!("Begin"), 0);
    assert!(new.hear()["Hello"]["disk"]["image"].as_str().unwrap().starts_with("file "));
    new
}

fn ready(new: &mut NewDaemon) {
    new.say(&json!({"Ready": {"front": true, "control": true, "pid_file": true}}), 0);
}

/// A new daemon that dies, gives up, talks nonsense or says nothing, at each step: the old one serves on, under load.
#[test]
fn if_the_new_daemon_fails_before_the_commit_the_old_one_serves_on() {
    let disk = Disk::serve(&["--cache", "writeback"]);
    let load = Load::start(&disk.path("vhost"));
    let failures = || disk.log().matches("serves on").count();
    let goes_on = |what: &str, before: usize| {
        wait_until(what, || failures() > before);
        load.wait_for(50);
        check(&disk, &load, what);
        assert_eq!(disk.pid(), Pid::from_child(&disk.child));
    };
    for (step, what) in ["dies", "gives up", "talks nonsense", "talks out of turn"].iter().enumerate() {
        // With its rings at rest the old one waits five seconds, and may have closed the connection.
        let end = |mut new: NewDaemon| {
            let _ = match step {
                0 => return,
                1 => new.try_say(&json!({"Failed": "no luck"}), 0),
                2 => new.stream.write_all(&[0xff; 64]),
                _ => new.try_say(&json!("Begin"), 0),
            };
        };
        let before = failures();
        end(begin(&disk));
        goes_on(&format!("a new daemon {what} at first"), before);
        let mut new = begin(&disk);
        ready(&mut new);
        assert!(new.hear()["State"]["front_end"].is_array());
        // The driver may have some answers to take yet.
        assert!(load.stands_still() || load.stands_still(), "the old one goes on before it may");
        end(new);
        goes_on(&format!("a new daemon {what} with the state"), before + 1);
    }
    let before = failures();
    let mut silent = begin(&disk);
    ready(&mut silent);
    silent.hear();
    goes_on("a new daemon says nothing", before);
    assert!(silent.hear()["Refused"].as_str().unwrap().contains("in time"));
    disk.wait_for_log(&[
        "it hung up",
        "no luck",
        "not a message of virtioblkd",
        "out of turn",
        "nothing, or not all, in time",
    ]);
    // And the next one has it.
    disk.upgrade(&[]);
    load.wait_for(50);
    check(&disk, &load, "after all");
    load.stop();
}

/// The connection and everything else is the old one's again: it can still be told things.
#[test]
fn a_program_that_does_not_take_over_changes_nothing() {
    let disk = Disk::serve(&["--cache", "none"]);
    let load = Load::start(&disk.path("vhost"));
    load.wait_for(50);
    fs::write(disk.path("other.img"), vec![0; SIZE]).unwrap();
    fs::write(disk.path("small.img"), vec![0; SIZE / 2]).unwrap();
    let cases: [(&[&str], &[&str]); 11] = [
        (&["--", "--cache", "sometimes"], &["--cache", "sometimes"]),
        (&["--", "--blk-file", "missing.img"], &["missing.img", "no such file"]),
        (&["--", "--blk-file", "other.img"], &["another one", "leave out --blk-file", "its messages are above"]),
        (&["--", "--blk-file", "small.img"], &["another one"]),
        (&["--", "--read-only"], &["read-only", "--read-only"]),
        (&["--", "--logical-block-size", "4096"], &["logical block size", "512", "4096"]),
        (&["--", "--num-queues", "1"], &["number of queues", "--num-queues"]),
        (&["--", "--control-path", "no/such/directory"], &["no/such/directory", "create it first"]),
        (&["--binary", "/bin/true"], &["did not take over", "it may not be virtioblkd", "--binary", "serves on"]),
        (&["--binary", "/bin/echo"], &["did not take over", "it may not be virtioblkd", "serves on"]),
        (&["--binary", "no-such-program"], &["no-such-program", "serves on"]),
    ];
    for (arguments, words) in cases {
        contains(&disk.refuses(arguments), words);
        load.wait_for(20);
    }
    kit::programs::make_script(&disk.path("hangs"), "#!/bin/sh\nexec sleep 1000\n");
    contains(&disk.refuses(&["--timeout", "300ms", "--binary", "./hangs"]), &["--timeout", "serves on"]);
    load.wait_for(20);
    check(&disk, &load, "at the end");
    load.stop();
    disk.end();
}

#[test]
fn a_disk_in_memory_is_not_handed_over() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let disk = Disk::serve_in(dir, &["--backend", "mem:4M"]);
    let mut guest = Driver::connect_soon(&disk.path("vhost"), 1, 64, 1 << 20, ALL);
    contains(&disk.refuses(&[]), &["lives in this process", "serves on"]);
    assert_eq!(guest.one(0, |guest, id| guest.write(0, 0, 0, 4096, id)), 0);
}

#[test]
fn an_upgrade_is_refused_while_a_hold_or_copy_would_be_lost() {
    let disk = Disk::serve(&["--cache", "writeback", "--copy-dir", "."]);
    let mut guest = Driver::connect_soon(&disk.path("vhost"), 1, 64, 1 << 20, ALL);
    let mut client = disk.client();
    let token = client.quiesce(json!({}));
    contains(&disk.refuses(&[]), &["held", "resume"]);
    let target = disk.path("copy.img");
    let copy = client.prepare_copy(json!({"target": target, "bandwidth": 4096}));
    client.ask("copy-start", json!({"copy": copy, "token": token})).unwrap();
    client.ask("resume", json!({"token": token})).unwrap();
    guest.fill(0, &[3; 4096]);
    assert_eq!(guest.one(0, |guest, id| guest.write(0, 4096, 0, 4096, id)), 0);
    contains(&disk.refuses(&[]), &["copy", "cancel"]);
    client.ask("copy-cancel", json!({"copy": copy})).unwrap();
    wait_until("the copy is gone", || client.ask("query-copies", json!({})).unwrap()[0]["state"] == "cancelled");
    assert_eq!(client.ask("hand-over", json!({"version": 2})), Err("no-upgrade".into()));
    disk.upgrade(&[]);
    // Whoever watched is told, and finds the new one.
    wait_until("the last words", || client.line()["event"] == "SHUTDOWN");
    client.ends();
    disk.client().quiesce(json!({}));
    assert_eq!(guest.one(0, |guest, id| guest.read(0, 4096, 8192, 4096, id)), 0);
    assert_eq!(guest.fetch(8192, 4096), [3; 4096]);
    // While a hand-over lasts nothing that would end with this process begins.
    disk.ctl_ok(&["resume", "--all"]);
    let mut client = disk.client();
    let mut new = begin(&disk);
    assert_eq!(client.ask("quiesce", json!({})), Err("upgrading".into()));
    assert_eq!(client.ask("hand-over", json!({"version": 1})), Err("upgrading".into()));
    assert_eq!(client.ask("resize", json!({})), Err("upgrading".into()));
    new.say(&json!({"Failed": "enough"}), 0);
    wait_until("it is over", || client.ask("quiesce", json!({})).is_ok());
}

/// Requests that take long are finished first; those that take too long keep the guest where it is.
#[test]
fn an_upgrade_completes_requests_in_flight_or_is_given_up() {
    let disk = Disk::serve(&["--cache", "none", "--backend", "slow:100"]);
    let mut guest = Driver::connect_soon(&disk.path("vhost"), 1, 64, 1 << 20, ALL);
    for round in 0..6 {
        // A driver that sleeps until it is interrupted.
        for id in 0..16 {
            guest.write(0, id * 4096, 0, 4096, id);
        }
        guest.kick(0);
        std::thread::scope(|scope| {
            let upgrade = scope.spawn(|| disk.upgrade(&[]));
            let mut done: Vec<u64> = Vec::new();
            while done.len() < 16 {
                done.extend(guest.wait(0).iter().map(|&(id, result)| {
                    assert_eq!(result, 0);
                    id
                }));
            }
            done.sort_unstable();
            assert_eq!(done, (0..16).collect::<Vec<_>>(), "round {round}");
            upgrade.join().unwrap();
        });
    }
    disk.upgrade(&["--backend", "slow:12000"]);
    for id in 0..16 {
        guest.write(0, id * 4096, 0, 4096, id);
    }
    guest.kick(0);
    wait_until("requests are in flight", || disk.status()["total"]["in-flight"].as_u64() > Some(0));
    contains(&disk.refuses(&[]), &["in flight", "the storage hangs"]);
    // The ring is popped again.
    assert_eq!(guest.one_beside(0, |guest, id| guest.read(0, 1 << 20, 65536, 4096, id)), 0);
}

/// A driver that knows no flush relies on every acknowledgement, whatever the mode is called now.
#[test]
fn a_driver_that_cannot_flush_is_served_durably_after_a_change() {
    for (from, to) in [("writethrough", "writeback"), ("directsync", "none"), ("unsafe", "writeback")] {
        let disk = Disk::serve(&["--cache", from]);
        let mut guest = Driver::connect_soon(&disk.path("vhost"), 1, 64, 1 << 20, ALL & !F_FLUSH);
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 0, 0, 4096, id)), 0);
        disk.upgrade(&["--cache", to]);
        let status = disk.status();
        assert_eq!(status["write-acknowledged"], "when durable", "{from} to {to}");
        let syncs = |status: &Value| status["total"]["syncs"].as_u64().unwrap();
        for _ in 0..5 {
            assert_eq!(guest.one(0, |guest, id| guest.write(0, 4096, 0, 4096, id)), 0);
        }
        if to == "writeback" {
            assert!(syncs(&disk.status()) >= syncs(&status) + 5, "{from} to {to}");
        }
        // And one that can is believed to flush again.
        drop(guest);
        wait_until("the front-end is gone", || disk.status()["connected"] == false);
        let _guest = Driver::connect_soon(&disk.path("vhost"), 1, 64, 1 << 20, ALL);
        wait_until("the driver is there", || disk.status()["driver-ready"] == true);
        assert_ne!(disk.status()["write-acknowledged"], "when durable", "{to}");
    }
}

/// Told to end in the middle of a hand-over, the daemon does so in order: the guest is its own again first.
#[test]
fn a_daemon_told_to_end_in_a_hand_over_ends_in_order() {
    let mut disk = Disk::serve(&["--cache", "writeback"]);
    let mut guest = Driver::connect_soon(&disk.path("vhost"), 1, 64, 1 << 20, ALL);
    guest.fill(0, &[4; 4096]);
    assert_eq!(guest.one(0, |guest, id| guest.write(0, 0, 0, 4096, id)), 0);
    let mut new = begin(&disk);
    ready(&mut new);
    assert!(new.hear()["State"].is_object());
    kill_process(disk.pid(), Signal::TERM).unwrap();
    assert!(disk.child.wait().unwrap().success(), "{}", disk.log());
    contains(&disk.log(), &["the upgrade failed", "drained and synced"]);
    for name in ["vhost", "control", "pid"] {
        assert!(!disk.path(name).exists(), "{name} is left behind");
    }
    assert_eq!(disk.image()[..4096], [4; 4096]);
}

/// Without virtioblkctl, as a script or a unit does it; and to other sockets, while the old ones go.
#[test]
fn a_daemon_can_be_started_by_hand_and_on_other_sockets() {
    let disk = Disk::serve(&["--cache", "none"]);
    let load = Load::start(&disk.path("vhost"));
    load.wait_for(50);
    let mut child = Command::new(env!("CARGO_BIN_EXE_virtioblkd"))
        .current_dir(&disk.dir)
        .args(["--socket-path", "vhost2", "--control-path", "control", "--pid-file", "pid", "--blk-file", "disk.img"])
        .args(["--take-over", "control", "--cache", "directsync"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let said: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(said["took-over"]["from-pid"], json!(disk.child.id()));
    load.wait_for(50);
    assert_eq!(disk.pid(), Pid::from_child(&child));
    contains(&disk.ctl_ok(&["status"]), &["directsync", "took over from pid"]);
    wait_until("the old socket goes", || !disk.path("vhost").exists());
    assert!(disk.path("vhost2").exists());
    check(&disk, &load, "by hand");
    load.stop();
    // It is one of many options that cannot be given twice, nor in a file.
    let output = disk.ctl(&["upgrade", "--", "--take-over", "control"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    disk.ctl_ok(&["quit"]);
    assert!(child.wait().unwrap().success());
    assert!(!disk.path("vhost2").exists() && !disk.path("control").exists() && !disk.path("pid").exists());
}

/// `virtioblkctl attend` follows its disk from process to process, and is told of as missing in between.
#[test]
fn an_attendant_reconnects_after_an_upgrade() {
    let disk = Disk::serve(&["--cache", "none"]);
    let agent = Agent::start(Mood::Good, &[disk.path("control")]);
    let mut attend = Command::new(env!("CARGO_BIN_EXE_virtioblkctl"));
    attend.args(["attend", "--level", "filesystem", "--qga"]).arg(&agent.path).arg("--disk").arg(disk.path("control"));
    let log = File::create(disk.path("attend.log")).unwrap();
    let mut attendant = attend.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
    let attended = || disk.status()["attendant"].take();
    wait_until("it attends", || attended()["present"] == true);
    for _ in 0..3 {
        disk.upgrade(&[]);
        assert!(attended().is_object(), "the new one does not miss it");
        wait_until("it attends again", || attended()["present"] == true);
    }
    // It leaves in order: nobody misses it, in this process or the next.
    kill_process(Pid::from_child(&attendant), Signal::TERM).unwrap();
    let status = attendant.wait().unwrap();
    let said = fs::read_to_string(disk.path("attend.log")).unwrap();
    assert!(status.success(), "{said}");
    assert_eq!(said.matches("is back").count(), 3, "{said}");
    assert!(attended().is_null());
    disk.upgrade(&[]);
    assert!(attended().is_null());
    disk.end();
}
