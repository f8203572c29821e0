//! Clients that nobody here wrote: libnbd's tools and QEMU's.

use std::fs;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use virtioblkd::backend::point_in_time::Tuning;
use virtioblkd::disk::Copies;
use virtioblkd::engine::CacheMode;

use super::world::*;

/// Runs `read` while a guest overwrites the disk.
fn under_load<T>(world: &World, read: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let guest = scope.spawn(|| overwrite(&*world.disk, 99, &stop));
        let result = read();
        stop.store(true, Relaxed);
        guest.join().expect("the guest");
        result
    })
}

#[test]
fn tools_read_the_instant_while_the_guest_goes_on() {
    let (sparse, _dir) = World::file(CacheMode::Writeback);
    for world in [World::mem(4, Tuning::default()), World::mem(5, Tuning::default()), sparse] {
        let (name, held) = world.serve(LONG);
        let target = world.dir.path().join("copy");
        let (uri, to) = (world.uri(), target.display().to_string());
        let (plugin, pipe) = (format!("uri={uri}"), format!("nbdcopy \"$uri\" - > '{to}'"));
        under_load(&world, || {
            for (program, arguments) in [
                ("nbdcopy", vec!["--connections=1", &*uri, &*to]),
                ("nbdcopy", vec!["--connections=4", "--request-size=65536", &*uri, &*to]),
                ("nbdcopy", vec!["--synchronous", "--allocated", &*uri, &*to]),
                ("qemu-img", vec!["convert", "-f", "raw", "-O", "raw", &*uri, &*to]),
                // With nbdkit in front, and as a stream.
                ("nbdkit", vec!["-U", "-", "nbd", &*plugin, "--run", &*pipe]),
            ] {
                let _ = fs::remove_file(&target);
                let Some(output) = world.client(program, &arguments) else { continue };
                assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
                let seen = fs::read(&target).expect("the copy");
                same(&seen, &held, 0).unwrap_or_else(|why| panic!("{program} {arguments:?}: {why}"));
            }
            fs::write(&target, &held).expect("the instant");
            let compared = world.client("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &to]);
            assert!(compared.is_none_or(|output| output.status.success()));
        });
        world.disk.cancel(&name).expect("it runs");
    }
}

#[test]
fn nbdinfo_shows_the_export_and_its_holes() {
    let (world, _dir) = World::file(CacheMode::Writeback);
    let (name, held) = world.serve(LONG);
    let uri = world.uri();
    let Some(info) = world.client("nbdinfo", &["--json", &uri]) else { return };
    assert!(info.status.success(), "{info:?}");
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).expect("JSON");
    let export = &info["exports"][0];
    assert_eq!((&export["export-name"], &export["export-size"]), (&"vda".into(), &SIZE.into()), "{info}");
    assert_eq!((&export["is_read_only"], &export["can_multi_conn"]), (&true.into(), &true.into()), "{info}");
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]), "{info}");
    let map = under_load(&world, || world.client("nbdinfo", &["--map", "--json", &uri]).expect("installed"));
    assert!(map.status.success(), "{map:?}");
    let map: Vec<serde_json::Value> = serde_json::from_slice(&map.stdout).expect("JSON");
    let mut at = 0;
    let mut holes = 0;
    for extent in &map {
        let number = |name: &str| extent[name].as_u64().expect("a number");
        assert_eq!(number("offset"), at, "no gap: {map:?}");
        let len = number("length");
        if number("type") == 3 {
            holes += len;
            assert!(held[at as usize..(at + len) as usize].iter().all(|byte| *byte == 0), "{extent}");
        }
        at += len;
    }
    assert_eq!(at, SIZE);
    assert!(holes >= 2 << 20, "{map:?}");
    let listed = world.client("nbdinfo", &["--list", &format!("nbd+unix:///?socket={}", world.socket().display())]);
    let listed = listed.expect("installed");
    assert!(String::from_utf8_lossy(&listed.stdout).contains("vda"), "{listed:?}");
    world.disk.cancel(&name).expect("it runs");
}

/// Four connections, each of which may find another part saved.
#[test]
fn an_export_ends_when_its_clients_have_left() {
    let world = World::mem(6, Tuning::default());
    let (name, held) = world.serve(Duration::from_millis(1500));
    let target = world.dir.path().join("copy");
    let (uri, to) = (world.uri(), target.display().to_string());
    let Some(output) = world.client("nbdcopy", &[&uri, &to]) else { return };
    assert!(output.status.success(), "{output:?}");
    same(&fs::read(&target).expect("the copy"), &held, 0).unwrap();
    let status = world.wait_ended(&name);
    assert_eq!((status.state.as_str(), status.error), ("completed", None));
    assert!(status.export.expect("an export").read_bytes >= SIZE);
    let late = world.client("nbdcopy", &[&uri, "null:"]).expect("installed");
    assert!(!late.status.success(), "nobody listens any more");
}
