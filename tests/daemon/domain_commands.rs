//! Commands for all disks of a domain, and the twins of virsh's commands.

use std::fs;
use std::process::Stdio;

use kit::programs;

use crate::domain_scene::{Scene, UUID, until, words};

/// Attaches two disks, which may be copied into `copies`.
fn attach_two(scene: &Scene) {
    fs::create_dir(scene.path("copies")).expect("room");
    scene.give("copies");
    let directory = format!("copy_dir={}", scene.path("copies").display());
    for (target, name) in [("vda", "a.raw"), ("vdb", "b.raw")] {
        scene.succeeds(&["attach", "vm1", target, &scene.image(name), "cache=writeback", "queues=1", &directory]);
    }
}

#[test]
fn resize_and_copies_reach_all_disks_of_a_domain() {
    let Some(scene) = Scene::new() else { return };
    attach_two(&scene);
    for (name, size) in [("a.raw", 2 << 20), ("b.raw", 3 << 20)] {
        fs::File::options().write(true).open(scene.path(name)).and_then(|file| file.set_len(size)).expect("room");
    }
    let resized = scene.of_all(&["resize"]);
    let said = words(&resized);
    assert!(resized.status.success(), "{said}");
    assert!(said.contains("vm1:vda:\n") && said.contains("2.0 MiB") && said.contains("3.0 MiB"), "{said}");
    for arguments in [&["resize", "4M"][..], &["resize", "--force"]] {
        let refused = scene.of_all(arguments);
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        assert!(words(&refused).contains("give --control with one of vm1:vda, vm1:vdb"), "{refused:?}");
    }

    // Slow enough to be there.
    let to = format!("copy:{}/{{}}", scene.path("copies").display());
    let snapshot = ["snapshot", "--level", "crash", "--background", "--bandwidth", "1K", "--to", &to];
    let taken = scene.of_all(&snapshot);
    assert!(taken.status.success(), "{taken:?}");
    let states = || {
        let all: serde_json::Value =
            serde_json::from_slice(&scene.of_all(&["--json", "copies"]).stdout).expect("JSON of all disks");
        ["vm1:vda", "vm1:vdb"].map(|name| all[name][0]["state"].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(states(), ["running", "running"]);
    let name = "copy-1";
    let refused = scene.of_all(&["copies", "cancel", name]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(words(&refused).contains("as in vda=copy-1,vdb=copy-1"), "{refused:?}");
    let unknown = scene.of_all(&["copies", "limit", "copy-9", "1M"]);
    assert!(unknown.status.code() == Some(1) && words(&unknown).contains("no disk has a copy 'copy-9'"), "{unknown:?}");
    let wrong = scene.of_all(&["copies", "cancel", "vdx=copy-1"]);
    assert!(wrong.status.code() == Some(2) && words(&wrong).contains("no disk 'vdx'"), "{wrong:?}");
    let limited = scene.of_all(&["copies", "limit", "vda=copy-1,vdb=copy-1", "2K"]);
    assert!(limited.status.success(), "{limited:?}");
    let cancelled = scene.of_all(&["copies", "cancel", "vda=copy-1"]);
    assert!(cancelled.status.success(), "{cancelled:?}");
    until("one copy is cancelled", || states() == ["cancelled", "running"]);
    let both = scene.of_all(&["copies", "cancel", "vda=copy-1,vdb=copy-1"]);
    assert!(both.status.code() == Some(1) && words(&both).contains("vm1:vda: "), "{both:?}");
    until("the other copy is cancelled, too", || states() == ["cancelled", "cancelled"]);
}

#[test]
fn watch_shows_the_events_of_all_disks_of_a_domain() {
    let Some(scene) = Scene::new() else { return };
    attach_two(&scene);
    let file = scene.path("events");
    let out = fs::File::create(&file).expect("room");
    let mut watch = scene.command(&["--domain", "vm1", "--json", "watch"]);
    let mut watch = watch.stdout(out).stderr(Stdio::null()).spawn().expect("virtioblkctl");
    let events = || fs::read_to_string(&file).unwrap_or_default();
    let has = |disk: &str, name: &str| {
        let lines: Vec<serde_json::Value> =
            events().lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        lines.iter().any(|event| event["disk"] == format!("vm1:{disk}") && event["event"] == name)
    };
    until("both disks' events are shown", || {
        let resized = scene.of_all(&["quiesce", "--", "true"]);
        assert!(resized.status.success(), "{resized:?}");
        has("vda", "RESUMED") && has("vdb", "RESUMED")
    });
    // One disk's end does not end the others' events.
    scene.succeeds(&["detach", "vm1", "vda"]);
    until("the end is shown", || has("vda", "SHUTDOWN"));
    let lines = events().lines().count();
    let held = scene.of_all(&["quiesce", "--", "true"]);
    assert!(held.status.success(), "{held:?}");
    until("the other disk's events go on", || events().lines().count() >= lines + 2);
    assert!(watch.try_wait().expect("ours").is_none());
    watch.kill().and_then(|()| watch.wait()).expect("ours");

    // A reader that has ended ends it, whichever disk's event comes next.
    let mut readable = scene.command(&["--domain", "vm1", "watch"]);
    let mut readable = readable.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("virtioblkctl");
    drop(readable.stdout.take());
    until("it ends with its reader", || {
        let _ = scene.of_all(&["quiesce", "--", "true"]);
        readable.try_wait().expect("ours").is_some()
    });
}

#[test]
fn a_snapshot_asks_no_agent_of_another_host() {
    let Some(scene) = Scene::new() else { return };
    scene.succeeds(&["attach", "vm1", "vda", &scene.image("a.raw"), "queues=1"]);
    let disk = scene.path(&format!("run/virtioblkd/{UUID}-vda.ctl")).display().to_string();
    let snapshot =
        ["snapshot", "--disk", &disk, "--libvirt", "vm1", "--level", "filesystem", "--or-weaker", "--to", "exec:true"];
    let attend = ["attend", "--disk", &disk, "--libvirt", "vm1", "--level", "filesystem"];
    let run = |arguments: &[&str]| scene.command(arguments).output().expect("virtioblkctl");
    scene.touch("state/uri", "qemu+ssh://root@other/system\n");
    for arguments in [&snapshot[..], &attend] {
        let refused = run(arguments);
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        assert!(words(&refused).contains("is on another host"), "{refused:?}");
    }
    // A libvirt that says nothing is no other host's: the agent's absence is what counts.
    programs::make_script(&scene.path("bin/virsh"), "#!/bin/sh\nexit 1\n");
    let weaker = run(&snapshot);
    assert!(weaker.status.success() && words(&weaker).contains("WEAKER"), "{weaker:?}");
}

#[test]
fn commands_of_virsh_have_twins_with_its_output() {
    let Some(scene) = Scene::new() else { return };
    attach_two(&scene);
    let run = |arguments: &[&str]| scene.command(arguments).output().expect("virtioblkctl");
    let said = |arguments: &[&str]| {
        let output = run(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    };
    let none = "vda rd_req 0\nvda rd_bytes 0\nvda wr_req 0\nvda wr_bytes 0\nvda errs 0\nvda flush_operations 0\n";
    assert_eq!(said(&["domblkstat", "vm1", "vda"]), none);
    assert_eq!(said(&["domblkstat", "vm1"]), none.replace("vda", ""));
    assert!(
        said(&["domblkstat", "vm1", "vda", "--human"]).starts_with("Device: vda\n number of read operations:      0\n")
    );
    let image = scene.path("a.raw").display().to_string();
    // The image has been written once, with zeroes.
    let info = said(&["domblkinfo", "vm1", &image]);
    assert!(
        info.starts_with("Capacity:       1048576\nAllocation:     ") && info.ends_with("Physical:       1048576\n"),
        "{info}"
    );
    let all = said(&["domblkinfo", "vm1", "--all", "--human"]);
    let rows: Vec<Vec<&str>> = all.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["Target", "Capacity", "Allocation", "Physical"]);
    assert_eq!((rows[2][..3].join(" "), rows[3][0]), ("vda 1.000 MiB".into(), "vdb"));
    let json: serde_json::Value = serde_json::from_str(&said(&["--json", "domblkinfo", "vm1", "vdb"])).expect("JSON");
    assert_eq!(json["vdb"]["capacity"], 1 << 20);

    let limits = ["blkdeviotune", "vm1", "vda", "--total-iops-sec", "500", "--write-bytes-sec=10M", "--live"];
    assert_eq!(said(&limits), "");
    assert_eq!(scene.status("vda")["throttle"]["write-bytes-sec"], 10 << 20);
    assert!(said(&["blkdeviotune", "vm1", "vda"]).contains("\ntotal_iops_sec : 500\n"));
    let live = scene.metadata("live");
    assert!(live.contains("<total_iops_sec>500</total_iops_sec></iotune>"), "{live}");
    let later = run(&["blkdeviotune", "vm1", "vda", "--config"]);
    assert!(later.status.code() == Some(1) && words(&later).contains("does not describe the disk vda"), "{later:?}");
    let control = scene.path(&format!("run/virtioblkd/{UUID}-vda.ctl")).display().to_string();
    let throttled = run(&["--control", &control, "throttle", "size-iops-sec=4K"]);
    assert!(throttled.status.success() && words(&throttled).contains("--live --config"), "{throttled:?}");
    assert_eq!(said(&["blkdeviotune", "vm1", "vda", "--read-iops-sec", "7"]), "");
    let now: serde_json::Value = serde_json::from_str(&said(&["--json", "blkdeviotune", "vm1", "vda"])).expect("JSON");
    assert_eq!((now["total_iops_sec"].as_u64(), now["read_iops_sec"].as_u64()), (Some(0), Some(7)));
    let wrong = run(&["blkdeviotune", "vm1", "vda", "--total-iops-sec-max", "7"]);
    assert!(wrong.status.code() == Some(2) && words(&wrong).contains("needs total-iops-sec"), "{wrong:?}");

    // KiB, as virsh takes it.
    assert_eq!(said(&["blockresize", "vm1", "vda", "2048"]), "Block device 'vda' is resized\n");
    assert_eq!(
        (scene.status("vda")["size"].as_u64(), scene.status("vdb")["size"].as_u64()),
        (Some(2 << 20), Some(1 << 20))
    );
    fs::File::options().write(true).open(&image).and_then(|file| file.set_len(3 << 20)).expect("room");
    assert_eq!(said(&["blockresize", "vm1", &image, "--capacity"]), format!("Block device '{image}' is resized\n"));
    assert_eq!(scene.status("vda")["size"], 3 << 20);
    let smaller = run(&["blockresize", "vm1", "vda", "1M"]);
    assert_eq!(smaller.status.code(), Some(1), "{smaller:?}");
    let unknown = run(&["domblkinfo", "vm1", "sda"]);
    assert!(unknown.status.code() == Some(1) && words(&unknown).contains("for others use virsh"), "{unknown:?}");
    assert_eq!(run(&["domblkinfo", "vm1"]).status.code(), Some(2));
}

#[test]
fn limits_of_the_next_start_are_found_by_the_image_and_are_those_of_a_domain_that_is_off() {
    let Some(scene) = Scene::new() else { return };
    let ctl = |arguments: &[&str]| {
        let output = scene.command(&[&["blkdeviotune", "vm1"], arguments].concat()).output().expect("virtioblkctl");
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        words(&output)
    };
    scene.touch(
        "state/config.metadata",
        "<disks xmlns='urn:virtioblkd:libvirt:1'><disk target='vda' file='/images/a.raw'>\
         <iotune><read_iops_sec>9</read_iops_sec></iotune></disk></disks>",
    );
    assert!(ctl(&["/images/a.raw", "--config"]).contains("read_iops_sec  : 9\n"));
    ctl(&["/images/a.raw", "--config", "--write-iops-sec", "3"]);
    let defined = || fs::read_to_string(scene.path("state/defined")).expect("virsh define");
    assert!(defined().contains("<write_iops_sec>3</write_iops_sec>"), "{}", defined());
    scene.remove("state/defined");
    // A domain that runs: its daemon is asked, and it has none here.
    let live = scene.command(&["blkdeviotune", "vm1", "vda"]).output().expect("virtioblkctl");
    assert_eq!(live.status.code(), Some(1), "{live:?}");
    // As virsh: without --live and --config, one that is off has the limits of its next start.
    scene.touch("state/ended", "");
    scene.touch("state/live.metadata", "");
    assert!(ctl(&["vda"]).contains("read_iops_sec  : 9\n"));
    ctl(&["vda", "--write-iops-sec", "4"]);
    assert!(defined().contains("<write_iops_sec>4</write_iops_sec>"), "{}", defined());
}
