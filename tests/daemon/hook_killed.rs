//! libvirt's hook, killed at each of its steps: whatever it was about to do, the next call finds its files and its daemons.
//! A step is a change of its files. tests/guest kills the hook of a real libvirt, and the units of a real systemd.

use std::io::Write;
use std::process::{Child, Output, Stdio};

use kit::hook::FileEvents;

use crate::domain_scene::{Scene, words};

const UUID: &str = "6fd1f7a2-4c0b-4e0f-8a65-1a3c0d2e9b11";

fn spawn(scene: &Scene, operation: [&str; 2]) -> Child {
    let image = scene.path("a.raw").display().to_string();
    let socket = scene.path("run/virtioblkd/vm1-vda.sock").display().to_string();
    let xml = format!(
        "<domain type='kvm'><name>vm1</name><uuid>{UUID}</uuid>
         <metadata><disks xmlns='urn:virtioblkd:libvirt:1'><disk target='vda' file='{image}' queues='1'/></disks></metadata>
         <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
         <devices><disk type='vhostuser'><source type='unix' path='{socket}'/><target dev='vda'/></disk></devices></domain>"
    );
    let mut command = scene.command(&["libvirt-hook", "vm1", operation[0], operation[1], "-"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("virtioblkctl");
    let mut input = child.stdin.take().expect("a pipe");
    // A hook that has failed reads nothing.
    let _ = input.write_all(xml.as_bytes());
    child
}

fn succeeds(scene: &Scene, operation: [&str; 2], case: &str) {
    let output: Output = spawn(scene, operation).wait_with_output().expect("ours");
    assert!(output.status.success(), "{operation:?}: {case}: {}", words(&output));
}

/// Kills the hook after so many steps. Returns whether it had so many.
fn kill_at(scene: &Scene, operation: [&str; 2], step: usize) -> bool {
    let directories = ["run/virtioblkd", "run/virtioblkd-libvirt"].map(|name| scene.path(name));
    let mut events = FileEvents::of(&directories);
    let mut hook = spawn(scene, operation);
    loop {
        if events.count() >= step {
            let was_running = hook.try_wait().expect("ours").is_none();
            hook.kill().and_then(|()| hook.wait()).expect("ours");
            return was_running;
        }
        if hook.try_wait().expect("ours").is_some() {
            return false;
        }
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
}

#[test]
fn a_hook_that_is_killed_at_any_step_leaves_nothing_behind_the_next_one() {
    let Some(scene) = Scene::new() else { return };
    scene.image("a.raw");
    let (start, end) = (["prepare", "begin"], ["release", "end"]);
    // Makes the directories.
    succeeds(&scene, start, "the first");
    succeeds(&scene, end, "the first");
    for killed in [start, end] {
        let mut steps = 0;
        loop {
            let case = format!("{killed:?} was killed after {steps} steps");
            if killed == end {
                succeeds(&scene, start, &case);
            }
            let was_killed = kill_at(&scene, killed, steps);
            if steps % 2 == 1 {
                succeeds(&scene, start, &case);
            }
            succeeds(&scene, end, &case);
            assert_eq!(scene.left(), Vec::<String>::new(), "{case}");
            if !was_killed {
                break;
            }
            steps += 1;
        }
        assert!(steps > 4, "{killed:?} had {steps} steps only");
    }
}
