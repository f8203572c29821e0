//! Limits of the disk's rates over upgrades in place, and changed while a guest waits for them.

use kit::driver::load::Load;
use kit::upgrade::{Disk, contains, wait_until};
use serde_json::{Value, json};

fn limits(disk: &Disk) -> Value {
    disk.status()["throttle"].clone()
}

#[test]
fn limits_that_were_changed_are_kept_over_an_upgrade_unless_it_brings_others() {
    let disk = Disk::serve(&["--throttle", "total-iops-sec=2000"]);
    let load = Load::start(&disk.path("vhost"));
    load.wait_for(50);
    assert_eq!(limits(&disk), json!({"total-iops-sec": 2000}));
    assert!(disk.ctl_ok(&["throttle", "total-iops-sec=1000", "write-bytes-sec=100M"]).contains("write-bytes-sec"));
    let changed = json!({"total-iops-sec": 1000, "write-bytes-sec": 100 << 20});
    for _ in 0..2 {
        load.wait_for(50);
        disk.upgrade(&[]);
        assert_eq!(limits(&disk), changed);
    }
    disk.upgrade(&["--throttle", "read-iops-sec=3000"]);
    assert_eq!(limits(&disk), json!({"read-iops-sec": 3000}), "the operator wants these now");
    load.wait_for(50);
    load.stop();
    disk.end();
}

#[test]
fn limits_that_were_changed_are_written_into_the_configuration_file() {
    let dir = kit::programs::disk_dir();
    let (image, file) = (dir.path().join("disk.img"), dir.path().join("disk.toml"));
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let text = format!("# Mine.\nblk-file = \"{}\"\n", image.display());
    std::fs::write(&file, &text).unwrap();
    let disk = Disk::serve_in(dir, &["--config", file.to_str().unwrap()]);
    let said = disk.ctl(&["throttle", "total-iops-sec=700"]);
    contains(&String::from_utf8_lossy(&said.stderr), &["disk.toml keeps the limits"]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), format!("{text}\n[throttle]\ntotal-iops-sec = 700\n"));
    disk.upgrade(&[]);
    assert_eq!(limits(&disk), json!({"total-iops-sec": 700}));
    disk.ctl_ok(&["throttle", "none"]);
    assert_eq!((std::fs::read_to_string(&file).unwrap(), limits(&disk)), (text, Value::Null));
    disk.end();
}

#[test]
fn a_quiesce_and_an_upgrade_do_not_wait_for_a_limit() {
    let disk = Disk::serve(&["--throttle", "total-bytes-sec=1"]);
    let load = Load::start(&disk.path("vhost"));
    wait_until("the guest waits", || disk.status()["total"]["limited"] == true);
    let token = disk.ctl_ok(&["quiesce"]);
    disk.ctl_ok(&["resume", token.trim()]);
    disk.upgrade(&[]);
    // The new daemon begins with empty buckets, so one more request goes at once.
    wait_until("the guest waits again", || {
        let total = &disk.status()["total"];
        total["limited"] == true && total["in-flight"] == json!(0)
    });
    assert!(disk.ctl_ok(&["status"]).contains("total-bytes-sec=1"));
    disk.ctl_ok(&["throttle", "none"]);
    load.wait_for(100);
    load.stop();
    disk.end();
}
