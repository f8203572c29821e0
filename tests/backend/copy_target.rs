//! Where a copy goes: which targets are refused, and that no file of another is replaced or removed.

use std::sync::Arc;

use kit::backend::{Driver, opened};
use virtioblkd::backend::file::FileOptions;
use virtioblkd::backend::mem::CompletionOrder;
use virtioblkd::backend::point_in_time::{CopyStep, PointInTime, Tuning};
use virtioblkd::backend::{IoBuf, Op};
use virtioblkd::disk::{Copies, CopyError, CopyOptions, Events};
use virtioblkd::engine::CacheMode;

use super::copy_world::*;

fn refused(result: Result<impl std::fmt::Debug, CopyError>, code: &str, words: &[&str]) {
    let error = result.expect_err("refused");
    assert_eq!(error.code, code, "{}", error.message);
    for word in words {
        assert!(error.message.contains(word), "'{word}' is not in: {}", error.message);
    }
}

#[test]
fn invalid_copy_targets_are_refused() {
    let (world, _) = World::mem(CompletionOrder::InOrder, Tuning::default());
    let dir = world.dir.path();
    std::fs::write(dir.join("there"), "precious").expect("a file");
    std::fs::write(dir.join("half.partial"), "left").expect("a file");
    std::os::unix::fs::symlink("/nowhere", dir.join("link")).expect("a link");
    let long = "x".repeat(250);
    for (target, words) in [
        ("there", &["there", "exists already", "another path"][..]),
        ("link", &["exists already"]),
        ("half", &["half.partial", "left by a daemon", "remove it"]),
        ("no/such", &["no such directory", "create it"]),
        ("there/file", &["not a directory"]),
        ("..", &["absolute path of a file"]),
        (&long, &["too long", "shorter"]),
        ("nul\0byte", &["a path cannot have"]),
    ] {
        let options = CopyOptions { target: dir.join(target), bandwidth: 0, digest: false };
        refused(world.disk.prepare(&options), "target", words);
    }
    let relative = CopyOptions { target: "copy.img".into(), bandwidth: 0, digest: false };
    refused(world.disk.prepare(&relative), "target", &["absolute"]);
    let mut left = world.files();
    left.sort();
    assert_eq!(left, ["half.partial", "link", "there"]);
    assert_eq!(std::fs::read(dir.join("there")).expect("the file"), b"precious");
}

/// The image may have the name that a copy has until it is complete. To remove it would cost the guest its disk.
#[test]
fn an_image_with_the_name_of_a_partial_file_is_not_removed() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("disk.img.partial"), vec![7; 1 << 20]).expect("an image");
    std::os::unix::fs::symlink(path("disk.img.partial"), path("linked.partial")).expect("a link");
    std::os::unix::fs::symlink(path("disk.img.partial"), path("image")).expect("a link");
    for image in ["disk.img.partial", "image"] {
        let file = opened(&FileOptions::new(path(image), CacheMode::Writeback.into()));
        let disk = PointInTime::new(Arc::new(file), Arc::new(Events::new().expect("events")));
        for target in ["disk.img", "linked"] {
            let options = CopyOptions { target: path(target), bandwidth: 0, digest: false };
            let why = disk.prepare(&options).expect_err("the image is there");
            assert!(why.message.contains("this disk's image") && why.message.contains("another target"), "{why:?}");
            assert!(!why.message.contains("remove"), "{why:?}");
        }
    }
    assert_eq!(std::fs::read(path("disk.img.partial")).expect("the image"), vec![7; 1 << 20]);
}

#[test]
fn a_file_put_in_the_partial_files_place_is_not_removed() {
    let (world, _) = World::mem(CompletionOrder::InOrder, Tuning::default());
    let copy = world.prepare(0);
    let partial = world.dir.path().join("copy.img.partial");
    std::fs::rename(&partial, world.dir.path().join("elsewhere")).expect("moved");
    std::fs::write(&partial, "another disk").expect("a file");
    world.disk.cancel(&copy).expect("cancelled");
    assert_eq!(world.wait_ended(&copy).state, "cancelled");
    assert_eq!(std::fs::read(&partial).expect("not ours to remove"), b"another disk");
}

/// Even if the caller forgets to hold the disk still, no instant is torn.
#[test]
fn a_start_with_a_write_in_flight_is_refused() {
    let (world, mem) = World::mem(CompletionOrder::OnRequest, Tuning::default());
    let mut guest = Driver::new(&*world.disk, 4);
    let copy = world.prepare(0);
    let read = guest.push(Op::Read { offset: 0, buf: IoBuf::owned(4096, 4096, 0) });
    let write = guest.push(Op::WriteZeroes { offset: 0, len: 4096, unmap: true });
    refused(world.disk.start(&copy), "busy", &["in flight", "quiesce it first"]);
    mem.release(2);
    guest.finish(write);
    guest.finish(read);
    let other = guest.push(Op::Read { offset: 0, buf: IoBuf::owned(4096, 4096, 0) });
    world.disk.start(&copy).expect("a read changes nothing");
    refused(world.disk.start(&copy), "busy", &["already been started"]);
    refused(world.disk.start("copy-7"), "no-such-copy", &["virtioblkctl copies"]);
    mem.release(1000);
    guest.finish(other);
    assert_eq!(world.wait_ended(&copy).state, "completed");
    refused(world.disk.cancel(&copy), "no-such-copy", &["already ended", "completed"]);
}

#[test]
fn a_file_that_appears_at_the_target_is_not_replaced() {
    let (world, _) = World::mem(CompletionOrder::InOrder, Tuning::default());
    let copy = world.prepare(0);
    std::fs::write(world.target(), "precious").expect("a file");
    world.disk.start(&copy).expect("started");
    let status = world.wait_ended(&copy);
    assert!(status.error.is_some_and(|why| why.contains("replaces nothing")));
    assert_eq!(world.files(), ["copy.img"]);
    assert_eq!(std::fs::read(world.target()).expect("the file"), b"precious");
}

/// The owner of the target's directory may put another file under the partial file's name at any time.
#[test]
fn a_file_put_in_the_partial_files_place_is_not_published() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let place = dir.path().to_path_buf();
    let hook = move |step| {
        if step == CopyStep::Publish {
            std::fs::rename(place.join("copy.img.partial"), place.join("elsewhere"))?;
            std::fs::write(place.join("copy.img.partial"), "forged")?;
        }
        Ok(())
    };
    let (world, mem) = World::mem(CompletionOrder::InOrder, Tuning { hook: Some(Arc::new(hook)), ..Tuning::default() });
    let world = World { dir, ..world };
    fill(&mem);
    let copy = started(&world, 0);
    assert_eq!(world.wait_ended(&copy).state, "completed");
    assert!(std::fs::read(world.target()).expect("the copy") == vec![1; 2 << 20]);
    assert_eq!(std::fs::read(world.dir.path().join("copy.img.partial")).expect("not ours to remove"), b"forged");
}
