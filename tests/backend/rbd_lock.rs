//! The lock of an RBD image (`--rbd-lock`) over the librbd of [`kit::rbd_stub`]: taken, lost, waited for, given back.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kit::backend::{Driver, WAIT_TIMEOUT, eventually};
use kit::rbd_stub::Stub;
use virtioblkd::backend::rbd::{RbdBackend, RbdLock};
use virtioblkd::backend::{Backend, Op};
use virtioblkd::engine::CacheMode;

use super::rbd_listener::*;

#[test]
fn a_lost_lock_and_its_return_are_reported() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let (_listener, said) = Listener::start(&disk);
    let mut driver = Driver::new(&disk, 4);
    stub.tell("owner 10.0.0.9:0/1");
    assert_eq!(driver.write(0, &[1; 512]), Err(EROFS));
    assert_eq!(driver.write(0, &[1; 512]), Err(EROFS));
    hears(&said, Said::StateChanged);
    assert_eq!(trouble(&disk).as_deref(), Some("lock-lost"));
    assert_eq!(driver.read(0, 512), Ok(vec![0; 512]));
    assert_eq!(trouble(&disk).as_deref(), Some("lock-lost"), "reads go on all the time");
    stub.tell("owner none");
    driver.write(0, &[1; 512]).unwrap();
    driver.run(Op::Sync).unwrap();
    hears(&said, Said::StateChanged);
    assert_eq!(trouble(&disk), None);
    hears_nothing_more(&said);
}

#[test]
fn the_lock_is_held_while_a_guest_uses_the_image() {
    let stub = Stub::new(CacheMode::Unsafe);
    let disk = stub.open();
    let lock = |disk: &RbdBackend| disk.info().image_status().rbd.unwrap().lock;
    assert_eq!((lock(&disk).as_str(), stub.count("locks")), ("released", 0));
    for turn in 1..4 {
        disk.claim().activate().unwrap();
        disk.claim().activate().unwrap();
        assert_eq!((lock(&disk).as_str(), stub.count("locks")), ("held", turn));
        assert_eq!(stub.count("invalidates"), turn, "somebody else may have written");
        Driver::new(&disk, 1).write(0, &[1; 512]).unwrap();
        disk.claim().deactivate();
        disk.claim().deactivate();
        assert_eq!((lock(&disk).as_str(), stub.count("unlocks")), ("released", turn));
        assert_eq!(stub.count("flushes"), turn, "what is cached goes first, in every mode");
    }
}

#[test]
fn the_lock_option_decides_whether_the_lock_is_taken() {
    for (lock, features, taken) in [
        (RbdLock::Auto, "61", true),
        (RbdLock::Exclusive, "61", true),
        (RbdLock::None, "61", false),
        (RbdLock::Auto, "1", false),
        (RbdLock::None, "1", false),
    ] {
        let mut stub = Stub::new(CacheMode::None);
        stub.set("stub_features", features).options.lock = lock;
        let disk = stub.open();
        disk.claim().activate().unwrap();
        assert_eq!(stub.count("locks"), i64::from(taken), "{lock:?} {features}");
        assert_eq!(stub.count("invalidates"), 1);
        assert_eq!(disk.info().image_status().rbd.unwrap().lock, if taken { "held" } else { "none" });
        disk.claim().deactivate();
        assert_eq!(stub.count("unlocks"), i64::from(taken));
    }
    let mut stub = Stub::new(CacheMode::None);
    stub.set("stub_features", "1").options.lock = RbdLock::Exclusive;
    let error = stub.try_open().err().expect("refused").to_string();
    assert!(error.contains("rbd feature enable"), "{error}");
    stub.options.read_only = true;
    stub.open().claim().activate().unwrap();
}

/// The image is claimed while another client has the lock, which leaves soon. On a loaded machine it may leave only after
/// the second for which the claim waits; then that is tried again.
fn takes_the_lock_of_an_owner_that_leaves(stub: &Stub, disk: &RbdBackend, owner: &str) {
    eventually("a claim that waits for the owner's end", || {
        stub.tell(&format!("owner {owner}"));
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(300));
                stub.tell("owner none");
            });
            disk.claim().activate().is_ok()
        })
    });
}

#[test]
fn a_lock_that_another_has_is_waited_for_and_not_for_ever() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    takes_the_lock_of_an_owner_that_leaves(&stub, &disk, "10.0.0.9:0/1");
    assert_eq!(stub.count("locks"), 1);
    disk.claim().deactivate();

    stub.tell("owner 10.0.0.9:0/1");
    // On a loaded machine the attempt may not have ended when the claim stops waiting for it.
    eventually("an error that names the owner and the fix", || {
        let error = disk.claim().activate().unwrap_err().to_string();
        assert!(error.contains("10.0.0.9:0/1"), "{error}");
        error.contains("rbd lock")
    });
    assert_eq!(disk.info().image_status().rbd.unwrap().lock, "released");
    stub.tell("owner none");
    disk.claim().activate().unwrap();
}

#[test]
fn a_claim_that_waits_for_a_dead_owner_does_not_block_its_caller() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    stub.tell("lock-hangs");
    for _ in 0..2 {
        let error = disk.claim().activate().unwrap_err().to_string();
        assert!(error.contains("waiting"), "{error}");
        assert_eq!(disk.info().image_status().rbd.unwrap().lock, "waiting");
    }
    stub.tell("lock-goes");
    eventually("the lock", || disk.claim().activate().is_ok());
    assert_eq!((stub.count("locks"), stub.count("invalidates")), (1, 1));
    disk.claim().deactivate();
    assert_eq!(stub.count("unlocks"), 1);

    // A guest that leaves meanwhile: what nobody came for goes back, and can be had again.
    stub.tell("lock-hangs");
    disk.claim().activate().unwrap_err();
    stub.tell("lock-goes");
    eventually("the lock is given back", || stub.count("unlocks") == 2);
    disk.claim().activate().unwrap();
    assert_eq!(stub.count("locks"), 3);
    disk.claim().deactivate();
    assert_eq!(stub.count("unlocks"), 3);
}

#[test]
fn a_failed_flush_keeps_the_lock() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    disk.claim().activate().unwrap();
    Driver::new(&disk, 1).write(0, &[1; 512]).unwrap();
    stub.tell("fail flush 5 1");
    disk.claim().deactivate();
    assert_eq!(stub.count("unlocks"), 0, "another would read what is stale");
    disk.claim().activate().unwrap();
    disk.claim().deactivate();
    assert_eq!(stub.count("unlocks"), 1);
}

/// A program that another test starts has, until its exec, a copy of every descriptor, and with it of the state file's lock.
fn opened_again(stub: &Stub) -> RbdBackend {
    let mut disk = None;
    eventually("the state file is free", || match stub.try_open() {
        Ok(opened) => disk.insert(opened).info().image_status().rbd.is_some(),
        Err(error) if error.to_string().contains("another virtioblkd") => false,
        Err(error) => panic!("{error}"),
    });
    disk.unwrap()
}

#[test]
fn the_lock_of_a_killed_daemon_is_broken_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let mut stub = Stub::new(CacheMode::None);
    stub.options.state_file = Some(state.clone());
    let name = stub.options.name.to_string();
    let disk = stub.open();
    disk.claim().activate().unwrap();
    let signed = std::fs::read_to_string(&state).unwrap();
    assert_eq!(signed, format!("{name}\n127.0.0.1:0/4711\n"));
    let mut other = Stub::new(CacheMode::None);
    other.options.state_file = Some(state.clone());
    let Err(error) = other.try_open() else { panic!("a second one with the same state file") };
    assert!(error.to_string().contains("another virtioblkd"), "{error}");
    disk.claim().deactivate();
    assert_eq!(std::fs::read_to_string(&state).unwrap(), "", "it died no more");
    drop(disk);

    // As a daemon that was killed leaves it.
    std::fs::write(&state, &signed).unwrap();
    let disk = opened_again(&stub);
    stub.tell("owner 127.0.0.1:0/4711");
    disk.claim().activate().unwrap();
    assert_eq!((stub.count("breaks"), stub.count("locks")), (1, 1));
    disk.claim().deactivate();
    drop(disk);

    // Another client has it now: it is alive, for all that we know.
    std::fs::write(&state, &signed).unwrap();
    let disk = opened_again(&stub);
    takes_the_lock_of_an_owner_that_leaves(&stub, &disk, "127.0.0.1:0/4712");
    assert_eq!((stub.count("breaks"), stub.count("locks")), (0, 1));
}

/// The features that `stub_features` has by default, without and with exclusive-lock and what needs it.
const WITHOUT_LOCK: &str = "features 1";
const WITH_LOCK: &str = "features 61";

fn lock_of(disk: &RbdBackend) -> String {
    disk.info().image_status().rbd.expect("an RBD image").lock
}

#[test]
fn exclusive_stops_writes_when_the_feature_is_disabled_and_takes_the_lock_again() {
    let mut stub = Stub::new(CacheMode::None);
    stub.options.lock = RbdLock::Exclusive;
    let disk = stub.open();
    let (_listener, said) = Listener::start(&disk);
    let mut driver = Driver::new(&disk, 4);
    disk.claim().activate().unwrap();
    driver.write(0, &[1; 512]).unwrap();
    stub.tell(WITHOUT_LOCK);
    hears(&said, Said::StateChanged);
    eventually("trouble", || trouble(&disk).as_deref() == Some("lock-lost"));
    assert_eq!(lock_of(&disk), "none");
    let before = stub.count("writes");
    for op in [write_op(0), Op::Discard { offset: 0, len: 65536 }, Op::WriteZeroes { offset: 0, len: 512, unmap: true }]
    {
        assert_eq!(driver.run(op), Err(EROFS));
    }
    assert_eq!(stub.count("writes"), before, "a write reached an image that any host may write");
    // What was written before can be read, and made durable; that does not end the trouble.
    assert_eq!(driver.read(0, 512), Ok(vec![1; 512]));
    assert_eq!(driver.run(Op::Sync), Ok(()));
    assert_eq!(trouble(&disk).as_deref(), Some("lock-lost"));
    stub.tell(WITH_LOCK);
    eventually("the lock", || lock_of(&disk) == "held" && trouble(&disk).is_none());
    assert_eq!(stub.count("locks"), 2);
    driver.write(0, &[2; 512]).unwrap();
    // A change of the header that is about something else.
    stub.tell(WITH_LOCK);
    assert_eq!((lock_of(&disk).as_str(), stub.count("locks")), ("held", 2));

    // A guest that starts meanwhile waits.
    disk.claim().deactivate();
    stub.tell(WITHOUT_LOCK);
    let error = disk.claim().activate().unwrap_err().to_string();
    assert!(error.contains("exclusive-lock") && error.contains("rbd feature enable"), "{error}");
    stub.tell(WITH_LOCK);
    disk.claim().activate().unwrap();
    driver.write(0, &[3; 512]).unwrap();
    assert_eq!((lock_of(&disk).as_str(), trouble(&disk)), ("held", None));
}

#[test]
fn auto_goes_on_without_the_feature_and_takes_the_lock_again() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let (_listener, said) = Listener::start(&disk);
    let mut driver = Driver::new(&disk, 4);
    disk.claim().activate().unwrap();
    stub.tell(WITHOUT_LOCK);
    hears(&said, Said::StateChanged);
    assert_eq!((lock_of(&disk).as_str(), trouble(&disk)), ("none", None));
    driver.write(0, &[1; 512]).unwrap();
    // A guest that starts anew does so without the lock.
    disk.claim().deactivate();
    disk.claim().activate().unwrap();
    driver.write(0, &[1; 512]).unwrap();
    stub.tell(WITH_LOCK);
    eventually("the lock", || lock_of(&disk) == "held");
    driver.write(0, &[2; 512]).unwrap();
    assert_eq!(trouble(&disk), None);
}

#[test]
fn a_lock_that_another_client_took_meanwhile_is_left_to_it() {
    for another_leaves in [true, false] {
        let stub = Stub::new(CacheMode::None);
        let disk = stub.open();
        let (_listener, _said) = Listener::start(&disk);
        let mut driver = Driver::new(&disk, 4);
        disk.claim().activate().unwrap();
        stub.tell("owner 10.0.0.9:0/1");
        stub.tell(WITH_LOCK);
        eventually("trouble", || trouble(&disk).as_deref() == Some("lock-lost"));
        assert_eq!(lock_of(&disk), "waiting");
        assert_eq!(driver.write(0, &[1; 512]), Err(EROFS));
        if another_leaves {
            // A command of `rbd` takes the lock for a moment.
            stub.tell("owner none");
            eventually("the lock", || lock_of(&disk) == "held" && trouble(&disk).is_none());
            driver.write(0, &[1; 512]).unwrap();
            continue;
        }
        // One that keeps it may have written.
        thread::sleep(Duration::from_secs(8));
        stub.tell("owner none");
        stub.tell(WITH_LOCK);
        thread::sleep(Duration::from_secs(2));
        assert_eq!(trouble(&disk).as_deref(), Some("lock-lost"));
        assert_eq!(stub.count("locks"), 1, "the guest does not know what the other wrote");
        disk.claim().deactivate();
        disk.claim().activate().unwrap();
        driver.write(0, &[1; 512]).unwrap();
        assert_eq!(trouble(&disk), None);
    }
}

#[test]
fn a_guest_stops_while_a_check_of_the_lock_waits_for_the_network() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let (_listener, _said) = Listener::start(&disk);
    disk.claim().activate().unwrap();
    stub.tell("questions-hang");
    // A change of the header, which has the lock checked.
    stub.tell(WITH_LOCK);
    eventually("a question", || stub.count("questions") > 0);
    assert_eq!(lock_of(&disk), "held");
    let (stopped, is_stopped) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            disk.claim().deactivate();
            stopped.send(()).unwrap();
        });
        let in_time = is_stopped.recv_timeout(WAIT_TIMEOUT);
        stub.tell("questions-go");
        in_time.expect("it waits for the check");
    });
    // What the check learns comes too late: no guest needs the lock.
    eventually("an answer", || stub.count("questions") == 0);
    thread::sleep(Duration::from_millis(200));
    assert_eq!((lock_of(&disk).as_str(), stub.count("locks"), stub.count("unlocks")), ("released", 1, 1));
    disk.claim().activate().unwrap();
    assert_eq!(lock_of(&disk), "held");
}

#[test]
fn librbds_cache_is_emptied_when_the_lock_is_taken_again() {
    let stub = Stub::new(CacheMode::Writeback);
    let disk = stub.open();
    let (_listener, _said) = Listener::start(&disk);
    disk.claim().activate().unwrap();
    let before = stub.count("invalidates");
    // What is under way keeps librbd from emptying all of it, once.
    stub.tell(&format!("fail invalidate {} 1", libc::EBUSY));
    stub.tell("owner 10.0.0.9:0/1");
    stub.tell(WITH_LOCK);
    eventually("trouble", || trouble(&disk).as_deref() == Some("lock-lost"));
    stub.tell("owner none");
    eventually("the lock", || lock_of(&disk) == "held" && trouble(&disk).is_none());
    eventually("an empty cache", || stub.count("invalidates") == before + 1);
    // And then no more.
    thread::sleep(Duration::from_secs(2));
    stub.tell(WITH_LOCK);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(stub.count("invalidates"), before + 1);
}
