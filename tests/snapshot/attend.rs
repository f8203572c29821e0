//! `virtioblkctl attend` as a process, between a guest's agent that does what the test tells it and quiesce sockets whose
//! images somebody else takes snapshots of. Whatever fails or dies at whatever step: every snapshot is answered, every
//! disk goes on, every guest is thawed, and no snapshot passes for more than it is.

use std::fs::File;
use std::process::Output;
use std::time::Duration;

use kit::control::{Served, Settle, figures};
use kit::snapshot::{Agent, Mood, ctl, err, hooks, wait_until};
use kit::unread::Unread;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use virtioblkd::backend::Notices;
use virtioblkd::engine::Errno;

use crate::attend_scene::{BUSY, Scene, attend, attended, start, wait};

#[test]
fn two_disks_are_frozen_once_before_either_is_held_and_thawed_after_both() {
    let mut scene = Scene::new(Mood::Good, &["--level", "filesystem"]);
    for round in 1..=3 {
        for answer in scene.ask_all() {
            assert_eq!(wait(&answer), Ok(()));
        }
        assert!(scene.agent.is_frozen());
        assert!(scene.disks.iter().all(|disk| disk.disk.closed().is_some()));
        assert_eq!(scene.freezes(), round, "once for both");
        // The first goes on: the guest stays frozen for the second.
        scene.disks[0].notices.unquiesce();
        scene.disks[0].disk.wait_closed(false);
        assert_eq!(scene.agent.asked("guest-fsfreeze-thaw"), round - 1);
        // And is asked for again: still frozen, so no second freeze, which would hang.
        assert_eq!(wait(&scene.disks[0].store_asks()), Ok(()));
        scene.disks[1].notices.unquiesce();
        scene.disks[1].disk.wait_closed(false);
        assert!(scene.agent.is_frozen());
        scene.disks[0].notices.unquiesce();
        let receipt = scene.receipt();
        assert_eq!((&receipt["level"], &receipt["filesystems-frozen"]), (&json!("filesystem"), &json!(2)));
        assert_eq!(receipt["warnings"], json!([]));
        assert!(receipt["frozen-us"].as_u64().unwrap() > 0);
    }
    assert!(!scene.agent.held_at_freeze() && !scene.agent.held_at_thaw());
    assert_eq!(scene.agent.journaled(), ["freeze", "thaw", "freeze", "thaw", "freeze", "thaw"]);
}

#[test]
fn a_freeze_that_waits_for_a_disk_that_an_operator_holds_fails_in_time() {
    let mut scene = Scene::new(Mood::Good, &["--level", "filesystem", "--freeze-timeout", "2s"]);
    let mut operator = scene.disks[1].client();
    let token = operator.quiesce(json!({}));
    assert_eq!(wait(&scene.disks[0].store_asks()), BUSY, "the order that deadlocks: held, then frozen");
    assert_eq!(scene.disks[0].disk.closings(), 0);
    wait_until("the guest waits for the held disk", || scene.agent.held_at_freeze());
    operator.ask("resume", json!({"token": token})).unwrap();
    // The freeze comes now, when nobody wants it any more.
    scene.agent.wait_thawed();
    assert_eq!(scene.receipt()["level"], "none");
    scene.is_over();
    // And the next one goes well.
    wait_until("it is frozen again", || {
        let answer = wait(&scene.disks[0].store_asks());
        scene.disks[0].notices.unquiesce();
        scene.disks[0].disk.wait_closed(false);
        answer == Ok(())
    });
    scene.is_over();
}

#[test]
fn a_freeze_that_the_guest_refuses_fails_or_weakens_the_snapshot() {
    for (mood, words) in [
        (Mood::Refuses, "hook script exited"),
        (Mood::Silent, "does not answer"),
        (Mood::MalformedInput, "not a reply"),
    ] {
        // Only silence lasts until the timeout.
        let timeout = if mood == Mood::Silent { "300ms" } else { "6s" };
        let mut scene = Scene::new(mood.clone(), &["--level", "filesystem", "--freeze-timeout", timeout]);
        let mut watcher = scene.disks[0].client();
        for answer in scene.ask_all() {
            assert_eq!(wait(&answer), BUSY, "{mood:?}");
        }
        let failed = watcher.event("PREPARE_FAILED");
        assert!(failed["message"].as_str().unwrap().contains(words), "{failed}");
        assert_eq!(watcher.event("QUIESCE_FAILED")["code"], "not-prepared");
        assert!(scene.disks.iter().all(|disk| disk.disk.closings() == 0));
        scene.agent.set(Mood::Good);
        assert_eq!(scene.receipt()["level"], "none");
        scene.is_over();
        drop(scene);
        let mut scene =
            Scene::new(mood.clone(), &["--level", "filesystem", "--freeze-timeout", timeout, "--or-weaker"]);
        let mut watcher = scene.disks[0].client();
        for answer in scene.ask_all() {
            assert_eq!(wait(&answer), Ok(()), "{mood:?}");
        }
        assert_eq!(watcher.event("PREPARED")["level"], "crash");
        scene.agent.set(Mood::Good);
        scene.is_over();
        let receipt = scene.receipt();
        assert_eq!((&receipt["level"], &receipt["requested-level"]), (&json!("crash"), &json!("filesystem")));
        assert!(receipt["warnings"][0].as_str().unwrap().contains(words), "{receipt}");
    }
}

#[test]
fn a_guest_that_thaws_by_itself_is_reported() {
    let mut scene = Scene::new(Mood::ThawsEarly, &["--level", "filesystem"]);
    assert_eq!(wait(&scene.disks[0].store_asks()), Ok(()));
    // For the second disk it is looked at again.
    assert_eq!(wait(&scene.disks[1].store_asks()), BUSY);
    scene.is_over();
    let receipt = scene.receipt();
    assert_eq!(receipt["level"], "none", "{receipt}");
    let mut scene = Scene::new(Mood::ThawsEarly, &["--level", "filesystem"]);
    assert_eq!(wait(&scene.disks[0].store_asks()), Ok(()));
    scene.is_over();
    let receipt = scene.receipt();
    assert_eq!(receipt["level"], "crash", "{receipt}");
    assert!(receipt["warnings"][0].as_str().unwrap().contains("CRASH CONSISTENT"), "{receipt}");
}

#[test]
fn a_freeze_that_windows_gave_up_is_reported() {
    let windows = |holds: u64, admits| Mood::Windows { holds: Duration::from_millis(holds), admits };
    // Its status is "frozen" all the time; its thaw fails.
    let mut scene = Scene::new(windows(100, true), &["--level", "filesystem"]);
    assert_eq!(wait(&scene.disks[0].store_asks()), Ok(()));
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(wait(&scene.disks[1].store_asks()), Ok(()));
    scene.is_over();
    let receipt = scene.receipt();
    assert_eq!(receipt["level"], "crash", "{receipt}");
    let warning = receipt["warnings"][0].as_str().unwrap();
    assert!(warning.contains("CRASH CONSISTENT") && warning.contains("Windows (VSS)"), "{receipt}");
    // Beyond VSS's limit nothing that it says counts: no other disk's snapshot is begun.
    let mut scene = Scene::new(windows(60_000, false), &["--level", "filesystem"]);
    assert_eq!(wait(&scene.disks[0].store_asks()), Ok(()));
    std::thread::sleep(Duration::from_millis(10_200));
    assert_eq!(wait(&scene.disks[1].store_asks()), BUSY);
    scene.is_over();
    assert_eq!(scene.receipt()["level"], "none");
}

#[test]
fn an_attendant_killed_in_a_freeze_leaves_no_frozen_guest() {
    let mut scene = Scene::new(Mood::Late(Duration::from_secs(4)), &["--level", "filesystem"]);
    let answers = scene.ask_all();
    scene.agent.wait_for("guest-fsfreeze-freeze");
    scene.signal(Signal::KILL);
    for answer in &answers {
        assert_eq!(wait(answer), BUSY);
    }
    // The freeze comes after our death, and is found and undone.
    scene.agent.wait_thawed();
    assert_eq!(scene.agent.journaled().first().map(String::as_str), Some("freeze"));
    assert!(scene.disks.iter().all(|disk| disk.disk.closings() == 0));
    // Nobody takes a weaker snapshot for what was promised.
    assert_eq!(wait(&scene.disks[0].store_asks()), BUSY);
    assert_eq!(attended(&scene.disks[0])["present"], false);
    scene.agent.set(Mood::Good);
    scene.attend_again();
    assert_eq!(wait(&scene.disks[0].store_asks()), Ok(()));
    scene.is_over();
}

#[test]
fn an_attendant_killed_while_disks_are_held_leaves_no_frozen_guest() {
    let scene = Scene::new(Mood::Good, &["--level", "filesystem"]);
    for answer in scene.ask_all() {
        assert_eq!(wait(&answer), Ok(()));
    }
    scene.signal(Signal::KILL);
    // The thaw's writes wait until the disks go on; nothing of it is in the snapshot.
    wait_until("the guard thaws", || !scene.agent.is_frozen());
    assert!(scene.disks.iter().all(|disk| disk.disk.closed().is_some()));
    scene.is_over();
    assert_eq!(scene.agent.journaled(), ["freeze", "thaw"]);
}

#[test]
fn an_attendant_told_to_end_finishes_its_snapshot() {
    let mut scene = Scene::new(Mood::Good, &["--level", "filesystem"]);
    let answers = scene.ask_all();
    assert!(answers.iter().all(|answer| wait(answer) == Ok(())));
    scene.signal(Signal::TERM);
    wait_until("it attends no more", || scene.disks.iter().all(|disk| attended(disk).is_null()));
    assert!(scene.agent.is_frozen() && scene.attendant.try_wait().unwrap().is_none(), "the snapshot is not over");
    scene.is_over();
    assert_eq!(scene.receipt()["level"], "filesystem");
    assert!(scene.attendant.wait().unwrap().success());
    assert!(!scene.agent.held_at_thaw());
    // As after a power cut again, for that is what was asked for.
    assert_eq!(wait(&scene.disks[0].store_asks()), Ok(()));
    assert_eq!(scene.freezes(), 1);
}

#[test]
fn an_attendant_told_to_end_in_a_freeze_gives_up() {
    let mut scene = Scene::new(Mood::Late(Duration::from_secs(4)), &["--level", "filesystem"]);
    let answers = scene.ask_all();
    scene.agent.wait_for("guest-fsfreeze-freeze");
    scene.signal(Signal::INT);
    for answer in &answers {
        assert_eq!(wait(answer), BUSY);
    }
    assert!(scene.attendant.wait().unwrap().success());
    scene.agent.wait_thawed();
    scene.is_over();
}

#[test]
fn a_daemon_that_is_gone_and_back_is_attended_again() {
    let mut scene = Scene::new(Mood::Good, &["--level", "filesystem"]);
    let answers = scene.ask_all();
    assert!(answers.iter().all(|answer| wait(answer) == Ok(())));
    // It ends in the middle: the other one's snapshot goes on.
    scene.disks[1].stop();
    assert!(scene.agent.is_frozen());
    scene.disks[0].notices.unquiesce();
    assert_eq!(scene.receipt()["level"], "filesystem");
    scene.disks[1].restart();
    wait_until("it is attended again", || attended(&scene.disks[1])["present"] == true);
    assert_eq!(wait(&scene.disks[1].store_asks()), Ok(()));
    assert_eq!(scene.freezes(), 2);
    scene.is_over();
    kit::log::wait_for(|| scene.log(), &["is back"]);
}

#[test]
fn a_daemon_that_must_be_attended_takes_no_weaker_snapshot_between_its_start_and_its_attendant() {
    let mut scene = Scene::new(Mood::Good, &["--level", "filesystem"]);
    for disk in &mut scene.disks {
        disk.stop();
        disk.must_be_attended();
        disk.restart();
    }
    // The first answer may come before `attend` has found it, or after.
    let is_prepared = |scene: &Scene, before: usize| scene.freezes() > before;
    for round in 0..10 {
        let before = scene.freezes();
        let answer = wait(&scene.disks[round % 2].store_asks());
        assert_eq!(answer, if is_prepared(&scene, before) { Ok(()) } else { BUSY });
        scene.is_over();
        scene.disks[0].stop();
        scene.disks[0].restart();
    }
    wait_until("both are attended", || scene.disks.iter().all(|disk| attended(disk)["present"] == true));
    assert!(scene.ask_all().iter().all(|answer| wait(answer) == Ok(())));
    scene.is_over();
    // Ended in order: nothing is weaker for that.
    scene.signal(Signal::TERM);
    assert!(scene.attendant.wait().unwrap().success());
    let mut watcher = scene.disks[0].client();
    assert_eq!(wait(&scene.disks[0].store_asks()), BUSY);
    let failed = watcher.event("PREPARE_FAILED");
    assert!(failed["message"].as_str().unwrap().contains("--rbd-quiesce attended"), "{failed}");
    let shown = ctl().arg("--control").arg(&scene.disks[0].path).arg("status").output().unwrap();
    assert!(String::from_utf8_lossy(&shown.stdout).contains("NONE"), "{shown:?}");
    assert!(scene.disks.iter().all(|disk| disk.disk.closed().is_none()));
}

#[test]
fn a_store_that_gives_up_thaws() {
    let mut scene = Scene::new(Mood::Good, &["--level", "filesystem"]);
    scene.disks[0].disk.set(Settle::ByHand);
    let answer = scene.disks[0].store_asks();
    let epoch = scene.disks[0].disk.wait_closed(true);
    assert!(scene.agent.is_frozen());
    scene.disks[0].notices.unquiesce();
    assert_eq!(wait(&answer), Err(Errno(libc::ECANCELED)));
    assert_eq!(scene.receipt()["level"], "filesystem");
    scene.disks[0].disk.settle(epoch, Ok(figures()));
    scene.is_over();
    assert!(!scene.agent.held_at_thaw());
}

#[test]
fn a_hook_that_refuses_fails_the_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let freeze =
        r#"echo "hook $VIRTIOBLK_LEVEL $(echo $VIRTIOBLK_CONTROLS | wc -w)" >> "$JOURNAL"; [ ! -e "$JOURNAL.no" ]"#;
    let directory = hooks(dir.path(), freeze, r#"echo "hook thaw" >> "$JOURNAL""#);
    let mut scene = Scene::new(Mood::Good, &["--level", "application", "--hooks", directory.to_str().unwrap()]);
    assert!(scene.ask_all().iter().all(|answer| wait(answer) == Ok(())));
    scene.is_over();
    assert_eq!(scene.receipt()["level"], "application");
    assert_eq!(scene.agent.journaled(), ["hook application 2", "freeze", "thaw", "hook thaw"]);
    let no = format!("{}.no", scene.agent.journal().display());
    File::create(no).unwrap();
    assert!(scene.ask_all().iter().all(|answer| wait(answer) == BUSY));
    scene.is_over();
    assert_eq!(scene.receipt()["level"], "none");
    // Once for both, or, where the second asked when the first was over, for each. Its refusal may come before its thaw.
    wait_until("each hook that was called to freeze thaws", || scene.agent.journaled().len().is_multiple_of(2));
    let journaled = scene.agent.journaled().split_off(4);
    let untouched = journaled.chunks(2).all(|pair| pair == ["hook application 2", "hook thaw"]);
    assert!(untouched && !journaled.is_empty(), "{journaled:?}");
}

#[test]
fn a_disk_that_cannot_be_attended_fails_the_start() {
    let scene = Scene::new(Mood::Good, &["--level", "filesystem"]);
    let fails = |output: Output, status: i32, words: &[&str]| {
        assert_eq!(output.status.code(), Some(status), "{output:?}");
        for word in words {
            assert!(err(&output).contains(word), "{word}: {output:?}");
        }
    };
    let second = attend(&scene.disks, &scene.agent, &["--level", "filesystem"]).output().unwrap();
    fails(second, 1, &["attends already", "virtioblkctl attend"]);
    let gone = ctl().args(["attend", "--level", "filesystem", "--qga", "/q", "--disk", "/nowhere"]).output().unwrap();
    fails(gone, 1, &["/nowhere", "--control-path"]);
    fails(ctl().args(["attend", "--level", "filesystem", "--disk", "/d"]).output().unwrap(), 2, &["--qga"]);
    fails(ctl().args(["attend", "--level", "crash", "--disk", "/d"]).output().unwrap(), 2, &["--hooks"]);
    fails(ctl().args(["attend", "--level", "filesystem", "--qga", "/q"]).output().unwrap(), 2, &["--disk"]);
    assert_eq!(wait(&scene.disks[0].store_asks()), Ok(()), "the first one is not disturbed");
    assert!(!scene.log().contains("Until that works"), "its agent answers: {}", scene.log());
    scene.is_over();
}

#[test]
fn an_attendant_works_while_its_output_is_not_read() {
    for unread in Unread::all() {
        let disks = [Served::new()];
        let agent = Agent::start(Mood::Good, &[disks[0].path.clone()]);
        let mut command = attend(&disks, &agent, &["--level", "filesystem"]);
        let mut attendant = command.stdout(unread.output()).stderr(unread.output()).spawn().unwrap();
        wait_until("it attends", || attended(&disks[0])["present"] == true);
        for round in 1..=3 {
            assert_eq!(wait(&disks[0].store_asks()), Ok(()), "{}, snapshot {round}", unread.name);
            disks[0].notices.unquiesce();
            agent.wait_thawed();
        }
        kill_process(Pid::from_child(&attendant), Signal::TERM).unwrap();
        assert_eq!(attendant.wait().unwrap().code(), Some(0), "{}", unread.name);
    }
}

/// The agent may come later, so it is no error.
#[test]
fn an_agent_that_cannot_be_reached_is_reported_at_the_start() {
    let disks = [Served::new()];
    let agent = Agent::start(Mood::Good, &[]);
    std::fs::remove_file(&agent.path).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut attendant, _) = start(&disks, &agent, dir.path(), &["--level", "filesystem"]);
    let log = || std::fs::read_to_string(dir.path().join("log")).unwrap();
    kit::log::wait_for(log, &["start the guest", "snapshots are refused"]);
    attendant.kill().unwrap();
    attendant.wait().unwrap();
}
