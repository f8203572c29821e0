//! `virtioblkctl domain attach`, `detach` and `apply` with real daemons and a virsh of our own, which keeps a domain in files:
//! commands that are interrupted, that run at the same time, and that reach a part of the disks. tests/guest has the real
//! libvirt.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::domain_scene::{Scene, ended, until};

#[test]
fn two_attaches_of_one_target_leave_the_first_ones_disk() {
    let Some(scene) = Scene::new() else { return };
    let (a, b) = (scene.image("a.raw"), scene.image("b.raw"));
    let first = scene.spawn_busy_attach(&["vm1", "vdc", &a, "serial=A", "queues=1"]);
    let second = scene.spawn(&["attach", "vm1", "vdc", &b, "serial=B"]);
    // Whatever the second one does, it does now.
    thread::sleep(Duration::from_millis(500));
    scene.remove("state/busy");
    let (first, second) = (ended(first), ended(second));
    assert!(first.0, "{first:?}");
    assert!(!second.0 && second.1.contains("has a disk vdc already"), "{second:?}");
    assert!(scene.metadata("live").contains("a.raw"));
    assert!(scene.status("vdc")["image"].to_string().contains("a.raw"));
    assert!(!scene.left().iter().any(|name| name.ends_with(".changes")), "{:?}", scene.left());

    scene.succeeds(&["detach", "vm1", "vdc"]);
    assert_eq!(scene.left(), Vec::<String>::new());
}

#[test]
fn a_killed_attach_is_finished_by_another_with_the_same_words_and_by_no_other() {
    let Some(scene) = Scene::new() else { return };
    let (a, b) = (scene.image("a.raw"), scene.image("b.raw"));
    let mut killed = scene.spawn_busy_attach(&["vm1", "vdc", &a, "queues=1", "--config"]);
    killed.kill().expect("ours");
    killed.wait().expect("ours");
    // The virsh that it started lives on.
    let other = scene.spawn(&["attach", "vm1", "vdc", &b]);
    thread::sleep(Duration::from_millis(500));
    scene.remove("state/busy");
    let other = ended(other);
    assert!(!other.0 && other.1.contains("has a disk vdc already"), "{other:?}");
    assert_eq!((scene.metadata("live"), scene.metadata("config")), (String::new(), String::new()));
    scene.succeeds(&["attach", "vm1", "vdc", &a, "queues=1", "--config"]);
    assert!(scene.metadata("live").contains("a.raw") && scene.metadata("config").contains("a.raw"));
    scene.fails(&["attach", "vm1", "vdc", &a, "queues=1", "--config"], &["has a disk vdc already"]);

    // As if attach and its virsh were killed before libvirt had attached the disk, or as if the guest released it late.
    scene.remove("state/live/vdc");
    scene.fails(&["attach", "vm1", "vdc", &b], &["runs already", "virtioblkctl domain detach vm1 vdc"]);
    assert!(scene.status("vdc")["image"].to_string().contains("a.raw"));
    scene.succeeds(&["detach", "vm1", "vdc", "--config"]);
    assert_eq!(scene.left(), Vec::<String>::new());
    assert!(!scene.metadata("live").contains("vdc") && !scene.metadata("config").contains("vdc"));
    assert!(!scene.path("state/config/vdc").exists());
    scene.fails(&["detach", "vm1", "vdc"], &["has no vhostuser disk vdc"]);
    // One that was killed before its last step, when the daemon had ended.
    scene.touch(
        "state/config.metadata",
        "<disks xmlns='urn:virtioblkd:libvirt:1'><disk target='vdc' file='/a'/></disks>",
    );
    scene.succeeds(&["detach", "vm1", "vdc", "--config"]);
    assert!(!scene.metadata("config").contains("vdc"));
}

#[test]
fn a_domain_that_ends_meanwhile_leaves_no_daemon() {
    let Some(scene) = Scene::new() else { return };
    let image = scene.image("a.raw");
    let attach = scene.spawn_busy_attach(&["vm1", "vdc", &image, "queues=1"]);
    scene.touch("state/ended", "");
    scene.remove("state/busy");
    let attach = ended(attach);
    assert!(!attach.0 && attach.1.contains("domain is not running"), "{attach:?}");
    assert_eq!(scene.left(), Vec::<String>::new());

    scene.remove("state/ended");
    scene.succeeds(&["attach", "vm1", "vdc", &image, "queues=1"]);
    scene.touch("state/stubborn", "");
    let began = Instant::now();
    let detach = scene.spawn(&["detach", "vm1", "vdc"]);
    until("virsh detaches", || scene.path("state/detaching").exists());
    thread::sleep(Duration::from_millis(700));
    assert!(scene.status("vdc")["daemon"].is_object(), "its daemon serves on while the guest has the disk");
    scene.touch("state/ended", "");
    let detach = ended(detach);
    assert!(detach.0 && began.elapsed() < Duration::from_secs(50), "{detach:?}");
    assert_eq!(scene.left(), Vec::<String>::new());
}

/// The configuration's metadata for vda and vdb.
fn configure(scene: &Scene, vda: &str, vdb: &str) {
    let path = |name: &str| scene.path(name).display().to_string();
    let disks = format!(
        "<disk target='vda' file='{}' {vda} queues='1'/><disk target='vdb' file='{}' {vdb} queues='1'/>",
        path("a.raw"),
        path("b.raw")
    );
    scene.touch("state/config.metadata", &format!("<disks xmlns='urn:virtioblkd:libvirt:1'>{disks}</disks>"));
}

#[test]
fn apply_changes_each_disk_by_itself_and_the_metadata_of_no_other() {
    let Some(scene) = Scene::new() else { return };
    let images = [("vda", "a.raw"), ("vdb", "b.raw"), ("vdc", "c.raw")];
    for (target, name) in images {
        scene.succeeds(&["attach", "vm1", target, &scene.image(name), "cache=writeback", "queues=1"]);
    }
    // vda changes, vdb cannot, vdc is of the running domain alone, and vdd does not run.
    configure(&scene, "cache='directsync'", "cache='directsync' readonly='yes'");
    let with_more = scene.metadata("config").replace("</disks>", "<disk target='vdd' file='/d'/></disks>");
    scene.touch("state/config.metadata", &with_more);
    let said = scene.fails(&["apply", "vm1"], &["vda: has its new options\n", "vdb: failed: ", "vdd: left as it is"]);
    assert!(said.contains("vdc: left as it is"), "{said}");
    assert_eq!(
        (&scene.status("vda")["cache-mode"], &scene.status("vdb")["cache-mode"]),
        (&"directsync".into(), &"writeback".into())
    );
    let live = scene.metadata("live");
    assert_eq!(live.matches("directsync").count(), 1, "of vda alone: {live}");
    assert!(live.contains("c.raw") && !live.contains("vdd") && !live.contains("readonly"), "{live}");

    // A refused upgrade leaves no trace: another apply finds nothing to do.
    configure(&scene, "cache='directsync'", "cache='writeback'");
    let said = scene.succeeds(&["apply", "vm1"]);
    assert!(said.starts_with("vda: unchanged\nvdb: unchanged\n"), "{said}");
}

#[test]
fn an_interrupted_apply_is_carried_out_by_the_next() {
    let Some(scene) = Scene::new() else { return };
    for (target, name) in [("vda", "a.raw"), ("vdb", "b.raw")] {
        scene.succeeds(&["attach", "vm1", target, &scene.image(name), "cache=writeback", "queues=1"]);
    }
    configure(&scene, "cache='directsync'", "cache='writeback'");
    // As a kill leaves it between the new configuration file and the upgrade.
    let (file, pid) = (scene.of_hook("vda.toml"), scene.status("vda")["daemon"]["pid"].clone());
    let old = fs::read_to_string(scene.path(&file)).expect("written by attach");
    scene.touch(&scene.of_hook("vda.applying"), &format!("{pid}\n{old}"));
    scene.touch(&file, &old.replace("writeback", "directsync"));
    let said = scene.succeeds(&["apply", "vm1"]);
    assert_eq!(said, "vda: has its new options\nvdb: unchanged\n");
    assert_eq!(scene.status("vda")["cache-mode"], "directsync");
    assert!(!scene.path(&scene.of_hook("vda.applying")).exists());

    // Interrupted after the upgrade: the file has the options of a daemon that has ended.
    scene.touch(&scene.of_hook("vda.applying"), &format!("{pid}\n{old}"));
    assert_eq!(scene.succeeds(&["apply", "vm1"]), "vda: unchanged\nvdb: unchanged\n");
    assert!(!scene.path(&scene.of_hook("vda.applying")).exists());
    // Interrupted, and then the change was taken back.
    let (now, new) =
        (scene.status("vda")["daemon"]["pid"].clone(), fs::read_to_string(scene.path(&file)).expect("ours"));
    scene.touch(&scene.of_hook("vda.applying"), &format!("{now}\n{new}"));
    scene.touch(&file, &old);
    assert_eq!(scene.succeeds(&["apply", "vm1"]), "vda: unchanged\nvdb: unchanged\n");
    assert_eq!(fs::read_to_string(scene.path(&file)).expect("ours"), new, "what the daemon was started with");
}

#[test]
fn a_libvirt_of_another_host_or_user_is_refused() {
    let Some(scene) = Scene::new() else { return };
    let image = scene.image("a.raw");
    scene.touch("state/uri", "qemu+ssh://root@other/session\n");
    scene.fails(&["attach", "vm1", "vdc", &image], &["is on another host"]);
    scene.fails(&["status", "vm1"], &["is on another host"]);
    scene.touch("state/uri", "qemu:///system\n");
    for command in
        [&["attach", "vm1", "vdc", &image][..], &["apply", "vm1"], &["convert", "vm1", "vda"], &["check", "vm1"]]
    {
        scene.fails(command, &["is not this user's libvirt"]);
    }
    assert_eq!(scene.left(), Vec::<String>::new());
}

#[test]
fn words_that_are_no_attributes_are_named() {
    let Some(scene) = Scene::new() else { return };
    let image = scene.image("a.raw");
    let refused = |words: &[&str], said: &[&str]| {
        scene.fails(&[&["attach", "vm1", "vdc"], words].concat(), said);
    };
    refused(&[&image, "target=vdd"], &["target= is given twice"]);
    refused(&[&image, "file=/b"], &["file= is given twice"]);
    refused(&["fi le=/x"], &["'fi le' is no attribute's name"]);
    refused(&[&image, "rbd_option=rbd_cache"], &["give rbd_option=NAME=VALUE"]);
    refused(&[&image, "total_iops_sec=a"], &["total-iops-sec is a whole number"]);
    refused(&[&image, "cahce=none"], &["nearest known one is 'cache'"]);
    assert_eq!(scene.left(), Vec::<String>::new());
}

#[test]
fn a_disk_that_libvirt_may_attach_yet_keeps_its_daemon() {
    let Some(scene) = Scene::new() else { return };
    let image = scene.image("a.raw");
    let attach = scene.spawn_busy_attach(&["vm1", "vdc", &image, "queues=1"]);
    // libvirt carries out what a virsh that was killed had asked for.
    let virsh = fs::read_to_string(scene.path("state/virsh.pid")).expect("virsh says");
    assert!(Command::new("kill").args(["-9", virsh.trim()]).status().expect("kill runs").success());
    let (is_success, said) = ended(attach);
    assert!(!is_success && said.contains("is not known, so its daemon serves on"), "{said}");
    assert!(scene.status("vdc")["daemon"].is_object());
    scene.succeeds(&["detach", "vm1", "vdc"]);
    assert_eq!(scene.left(), Vec::<String>::new());
}

#[test]
fn an_attached_disk_may_be_copied_into_its_directories() {
    let Some(scene) = Scene::new() else { return };
    let image = scene.image("a.raw");
    let directories = ["one", "two words"].map(|name| {
        fs::create_dir(scene.path(name)).expect("room");
        scene.give(name);
        scene.path(name)
    });
    let [one, two] = directories.each_ref().map(|path| format!("copy_dir={}", path.display()));
    scene.succeeds(&["attach", "vm1", "vdc", &image, "queues=1", &one, &two]);
    assert_eq!(scene.metadata("live").matches("<copy_dir path=").count(), 2, "{}", scene.metadata("live"));
    for directory in directories {
        let to = format!("copy:{}/{{}}", directory.display());
        let copied = scene.of_all(&["snapshot", "--level", "crash", "--to", &to]);
        assert!(copied.status.success() && directory.join("a.raw").exists(), "{copied:?}");
    }
}
