//! libvirt's hook killed at each of its steps, on a machine with systemd and on one without, and libvirtd killed under a
//! guest whose daemons are units. Real libvirt, real systemd, real QEMU. SKIPPED where these are not installed or if we are
//! not root; in `make check-libvirt` only.

use std::fs;
use std::process::Child;
use std::time::{Duration, Instant};

use kit::guest::libvirt::DOMAIN;
use kit::guest::system_libvirt::SystemLibvirt;
use kit::guest::{output, wait_until};
use kit::hook::FileEvents;
use rustix::process::{Pid, Signal, kill_process};

use crate::libvirt_hook::{domain, hook, image, is_long_run, status, succeeds, until_said};
use crate::libvirt_systemd::{describe, goes_on, property, units};

/// The hook itself, a child of the program that enters the machine.
fn process_of(hook: &Child) -> Option<Pid> {
    let id = hook.id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
    Pid::from_raw(children.split_whitespace().next()?.parse().ok()?)
}

/// Kills the hook after so many changes of its files. Returns whether it had so many.
fn kill_at(libvirt: &SystemLibvirt, operation: [&str; 2], xml: &str, step: usize) -> bool {
    let directories = ["sockets", "disks"].map(|name| libvirt.home().join(name));
    let mut events = FileEvents::of(&directories);
    let mut hook = hook(libvirt, operation, xml);
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        assert!(Instant::now() < deadline, "the hook does not end");
        let process = process_of(&hook);
        if let (Some(process), true) = (process, events.count() >= step) {
            // It may have ended.
            let _ = kill_process(process, Signal::KILL);
            return !hook.wait().expect("our own child").success();
        }
        if hook.try_wait().expect("our own child").is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Kills hooks at each step of a start and of an end. The next end leaves nothing, with another start before it or without.
fn kill_at_each_step(libvirt: &SystemLibvirt) {
    let images = ["a.img", "b.img"].map(|name| format!("file='{}'", image(libvirt, name).display()));
    let disks = [("vda", images[0].as_str()), ("vdb", images[1].as_str())];
    let xml = fs::read_to_string(domain(libvirt, "exit", &disks)).expect("ours");
    let (start, end) = (["prepare", "begin"], ["release", "end"]);
    for killed in [start, end] {
        let mut step = 0;
        loop {
            if killed == end {
                succeeds(hook(libvirt, start, &xml));
            }
            let was_killed = kill_at(libvirt, killed, &xml, step);
            if step % 2 == 1 {
                succeeds(hook(libvirt, start, &xml));
                assert_eq!(status(libvirt, "vda")["connected"], false);
            }
            succeeds(hook(libvirt, end, &xml));
            assert_eq!(libvirt.left(), Vec::<String>::new(), "{killed:?} was killed after {step} steps");
            if !was_killed {
                break;
            }
            step += 1;
        }
        assert!(step > 4, "{killed:?} had {step} steps only");
    }
}

#[test]
fn a_hook_that_is_killed_at_any_step_leaves_nothing_behind_the_domains_end() {
    if !is_long_run() {
        return;
    }
    let Some(libvirt) = SystemLibvirt::start(40) else { return };
    kill_at_each_step(&libvirt);
}

#[test]
fn a_hook_that_is_killed_at_any_step_leaves_no_unit_behind_the_domains_end() {
    if !is_long_run() {
        return;
    }
    let Some(libvirt) = SystemLibvirt::start_on_systemd(41) else { return };
    kill_at_each_step(&libvirt);
    assert_eq!(units(&libvirt), Vec::<String>::new());
}

#[test]
fn units_and_guest_outlive_a_libvirtd_that_is_killed_and_started_again() {
    if !is_long_run() {
        return;
    }
    let Some(mut libvirt) = SystemLibvirt::start_on_systemd(42) else { return };
    let images = [image(&libvirt, "one.img"), image(&libvirt, "other.img")];
    let xml = describe(&libvirt, &images, "writeback");
    libvirt.virsh_ok(&["define", &xml]);
    libvirt.virsh_ok(&["start", DOMAIN]);
    until_said(&libvirt, "count 1");
    let (before, both) = (libvirt.left(), units(&libvirt));
    assert_eq!(both.len(), 2);
    let untouched = property(&libvirt, "vdb", "MainPID");
    for round in 0..2 {
        libvirt.kill_daemon();
        goes_on(&libvirt);
        // A daemon dies without libvirtd: systemd starts it again.
        let died = property(&libvirt, "vda", "MainPID");
        let killed = output(libvirt.inside("kill").args(["-9", &died]));
        assert!(killed.status.success(), "{killed:?}");
        if round == 0 {
            // In the second round, libvirtd and its hook come while the daemon is away.
            goes_on(&libvirt);
        }
        libvirt.start_daemon();
        assert_eq!(libvirt.virsh_ok(&["domstate", DOMAIN]), "running");
        goes_on(&libvirt);
        wait_until("systemd knows the new process", || {
            let pid = property(&libvirt, "vda", "MainPID");
            pid != "0" && pid != died
        });
        assert_eq!((libvirt.left(), units(&libvirt)), (before.clone(), both.clone()));
        assert_eq!(property(&libvirt, "vdb", "MainPID"), untouched, "the other daemon serves on");
    }
    libvirt.virsh_ok(&["destroy", DOMAIN]);
    assert_eq!((libvirt.left(), units(&libvirt)), (Vec::new(), Vec::new()));
}
