//! Proxmox VE's hookscript. `StandIn` stands in for qemu-server: it calls the hookscript as `vm_start_nolock` and
//! `vm_stop_cleanup` of PVE::QemuServer do through `PVE::GuestHelpers::exec_hookscript`, and starts a real QEMU with the VM's
//! `args`. Nothing of Proxmox VE runs here.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};

use kit::documents::blocks;
use kit::programs;
use kit::snapshot::tell;

use crate::domain_scene::{Scene, until, words};

/// qemu-server, with one VM of a node.
struct StandIn<'a> {
    scene: &'a Scene,
    id: &'static str,
}

impl StandIn<'_> {
    fn new<'a>(scene: &'a Scene, id: &'static str) -> StandIn<'a> {
        for directory in ["disks", "machines"] {
            fs::create_dir_all(scene.path(directory)).expect("room");
            scene.give(directory);
        }
        let vm = StandIn { scene, id };
        vm.configure("memory: 64\nname: web\n");
        vm
    }

    fn path(&self, directory: &str, extension: &str) -> String {
        format!("{directory}/{}.{extension}", self.id)
    }

    fn configure(&self, text: &str) {
        self.scene.touch(&self.path("machines", "conf"), text);
    }

    fn describe(&self, disks: &str) {
        let text = format!("<?xml version='1.0'?>\n<disks xmlns='urn:virtioblkd:libvirt:1'>{disks}</disks>\n");
        self.scene.touch(&self.path("disks", "xml"), &text);
    }

    /// virtioblkctl with the directories of this node.
    fn command(&self, subcommand: &str, more: &[&str]) -> Command {
        let mut command = self.scene.command(&[subcommand, self.id]);
        command
            .args(more)
            .arg("--disks")
            .arg(self.scene.path("disks"))
            .arg("--machines")
            .arg(self.scene.path("machines"));
        command
    }

    /// `run_command([$hookscript, $vmid, $phase])`.
    fn hookscript(&self, phase: &str, migrated_from: Option<&str>) -> Output {
        let mut command = self.command("proxmox-hook", &[phase]);
        command.envs(migrated_from.map(|node| ("PVE_MIGRATED_FROM", node)));
        command.output().expect("virtioblkctl")
    }

    /// `vm_start_nolock` up to QEMU: what it dies of.
    fn pre_start(&self) -> Result<(), String> {
        let output = self.hookscript("pre-start", None);
        if output.status.success() { Ok(()) } else { Err(words(&output)) }
    }

    /// QEMU as `config_to_command` starts it, as far as the VM's memory and `args` go. `None`: QEMU is not installed.
    fn qemu(&self) -> Option<Child> {
        let text = fs::read_to_string(self.scene.path(&self.path("machines", "conf"))).expect("ours");
        let args = text.lines().find_map(|line| line.strip_prefix("args: ")).expect("args");
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-display", "none", "-m", "64", "-machine", "type=q35", "-S"]);
        command.args(args.split_whitespace()).stdin(Stdio::null());
        if rustix::process::geteuid().is_root() {
            command.uid(self.scene.user()).gid(self.scene.user());
        }
        match command.spawn() {
            Ok(child) => Some(child),
            Err(error) => {
                tell(&format!("SKIPPED: no QEMU ({error}): a VM's args were not tried with it"));
                None
            }
        }
    }

    fn status(&self, target: &str) -> serde_json::Value {
        let name = format!("{}:{target}", self.id);
        let output = self.scene.command(&["--json", "--control", &name, "status"]).output().expect("virtioblkctl");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }
}

#[test]
fn the_hookscript_starts_a_machines_disks_and_ends_them() {
    let Some(scene) = Scene::new() else { return };
    let (vm, other) = (StandIn::new(&scene, "100"), StandIn::new(&scene, "101"));
    let fails = |words: &[&str]| {
        let error = vm.pre_start().expect_err("it cannot start");
        assert!(error.contains("VM 100") && words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
        assert_eq!(scene.left(), Vec::<String>::new());
        error
    };
    fails(&["100.xml", "describe the VM's disks there"]);
    vm.describe("");
    fails(&["describes no disk"]);
    let (a, b) = (scene.image("a.raw").replace("file=", ""), scene.image("b.raw").replace("file=", ""));
    vm.describe(&format!("<disk target='vda' file='{a}' cahce='none'/>"));
    fails(&["disk vda", "nearest known one is 'cache'"]);
    vm.describe(&format!(
        "<disk target='vda' file='{a}' cache='writeback' queues='1'/><disk target='vdb' file='{b}' queues='1'/>"
    ));
    let error = fails(&["args do not connect QEMU to the disk vda", "qm set 100 --args '"]);
    let wanted = error.split('\'').nth(1).expect("quoted");
    assert_eq!(words(&vm.command("proxmox-args", &[]).output().expect("virtioblkctl")), format!("{wanted}\n"));
    vm.configure(&format!("args: {}\nmemory: 64\n", wanted.replace("share=on", "share=off")));
    fails(&["memory is not shared"]);
    vm.configure(&format!("args: {wanted}\nmemory: 64\n[old]\nargs: none\n"));

    assert_eq!(vm.pre_start(), Ok(()));
    assert_eq!(
        (&vm.status("vda")["cache-mode"], &vm.status("vdb")["cache-mode"]),
        (&"writeback".into(), &"none".into())
    );
    let list = scene.command(&["list"]).output().expect("virtioblkctl");
    assert!(words(&list).contains("100:vda") && words(&list).contains("100:vdb"), "{list:?}");
    if let Some(mut qemu) = vm.qemu() {
        until("QEMU has both disks", || {
            assert!(qemu.try_wait().expect("ours").is_none(), "QEMU does not take the args");
            ["vda", "vdb"].iter().all(|target| vm.status(target)["connected"] == true)
        });
        qemu.kill().and_then(|()| qemu.wait()).expect("ours");
    }
    // The phases that do nothing, and another VM's end.
    for (phase, is_known) in [("post-start", true), ("pre-stop", true), ("new-phase", false)] {
        let output = vm.hookscript(phase, None);
        assert!(output.status.success(), "{phase}: {output:?}");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(text.contains("nothing at the phase 'new-phase'"), !is_known, "{phase}: {text}");
    }
    assert!(other.hookscript("post-stop", None).status.success());
    until("the daemon sees QEMU's end and serves on", || vm.status("vda")["connected"] == false);
    let ended = vm.hookscript("post-stop", None);
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(scene.left(), Vec::<String>::new());
    assert!(vm.hookscript("post-stop", None).status.success(), "what has ended may end again");
}

#[test]
fn an_image_that_another_process_uses_is_for_a_migration_only() {
    let Some(scene) = Scene::new() else { return };
    let vm = StandIn::new(&scene, "100");
    let image = scene.image("a.raw").replace("file=", "");
    vm.describe(&format!("<disk target='vda' file='{image}' queues='1'/>"));
    let args = words(&vm.command("proxmox-args", &[]).output().expect("virtioblkctl"));
    vm.configure(&format!("args: {args}memory: 64\n"));
    let socket = scene.path("run/owner.sock");
    let mut owner = Command::new(programs::virtioblkd());
    owner.arg("--socket-path").arg(&socket).args(["--blk-file", &image]).stderr(Stdio::null());
    let mut owner = owner.spawn().expect("virtioblkd");
    until("the other daemon has the image", || socket.exists());
    let error = vm.pre_start().expect_err("the image is used");
    assert!(error.contains("another process uses the image"), "{error}");
    let arrived = vm.hookscript("pre-start", Some("node2"));
    assert!(arrived.status.success(), "{arrived:?}");
    // A start that failed and is tried again, as after a crash of the node's QEMU: no daemon is left in the way.
    owner.kill().and_then(|()| owner.wait()).expect("ours");
    assert_eq!(vm.pre_start(), Ok(()));
    assert!(vm.hookscript("post-stop", None).status.success());
    assert_eq!(scene.left(), Vec::<String>::new());
}

#[test]
fn the_documented_commands_configure_a_machine() {
    let Some(scene) = Scene::new() else { return };
    let vm = StandIn::new(&scene, "100");
    let page = "docs/proxmox.md".to_owned();
    let (disks, machines) = (scene.path("disks"), scene.path("machines"));
    let (disks, machines) = (disks.display(), machines.display());
    fs::create_dir(scene.path("snippets")).expect("room");
    // A stand-in for qm, which appends settings to the VM's configuration.
    let qm = format!("#!/bin/sh\n[ \"$1\" = set ] || exit 1\necho \"${{3#--}}: $4\" >> {machines}/$2.conf\n");
    fs::write(scene.path("bin/qm"), qm).expect("room");
    fs::set_permissions(scene.path("bin/qm"), fs::Permissions::from_mode(0o755)).expect("ours");
    symlink(programs::virtioblkctl(), scene.path("bin/virtioblkctl")).expect("room");
    scene.give("snippets");
    for block in blocks(&page) {
        if block.language == "xml" {
            let text = block.text.replace("/srv/images", &scene.path("").display().to_string());
            let text: String = text.lines().filter(|line| !line.contains("rbd=")).collect();
            scene.touch("disks/100.xml", &text);
        }
        if block.language != "sh" {
            continue;
        }
        let script = block
            .text
            .replace("/usr/local/bin", &scene.path("bin").display().to_string())
            .replace("/var/lib/vz/snippets", &scene.path("snippets").display().to_string())
            .replace("proxmox-args 100", &format!("proxmox-args 100 --disks {disks} --machines {machines}"));
        let ran = scene.shell(&script).output().expect("a shell");
        assert!(ran.status.success(), "{script}: {ran:?}");
    }
    let configuration = fs::read_to_string(scene.path("machines/100.conf")).expect("ours");
    assert!(configuration.contains("hookscript: local:snippets/virtioblkd-proxmox\n"), "{configuration}");
    assert!(configuration.contains("size=64M,share=on") && configuration.contains("100-vda.sock"), "{configuration}");
    // The image of the page.
    scene.image("100-a.raw");
    assert_eq!(vm.pre_start(), Ok(()));
    assert!(vm.hookscript("post-stop", None).status.success());

    // qemu-server passes no subcommand: the link's name is enough.
    let link = scene.path("snippets/virtioblkd-proxmox");
    let called = Command::new(&link).args(["100", "post-start"]).output().expect("a link to virtioblkctl");
    assert!(called.status.success(), "{called:?}");
    let wrong = Command::new(&link).args(["not-an-id", "post-start"]).output().expect("a link to virtioblkctl");
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");
}

#[test]
fn a_test_that_fails_leaves_no_daemon_of_a_machine() {
    let Some(scene) = Scene::new() else { return };
    let vm = StandIn::new(&scene, "100");
    let image = scene.image("a.raw").replace("file=", "");
    vm.describe(&format!("<disk target='vda' file='{image}' queues='1'/>"));
    let args = words(&vm.command("proxmox-args", &[]).output().expect("virtioblkctl"));
    vm.configure(&format!("args: {args}memory: 64\n"));
    assert_eq!(vm.pre_start(), Ok(()));
    let pid = vm.status("vda")["daemon"]["pid"].to_string();
    let serves = || {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&words).contains("virtioblkd")
    };
    assert!(serves());
    // As the end of a test that panics does.
    drop(scene);
    until("the daemon has ended", || !serves());
}
