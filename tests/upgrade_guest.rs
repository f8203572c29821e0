//! Upgrades in place under a real guest's verified load: it sees no error, and QEMU has nothing to reconnect to. Afterwards
//! all goes on as with the first daemon: QEMU stops and continues the guest, the operator holds the disk, a daemon that
//! is killed is followed by another one.

mod guest;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;

use guest::qemu::Vm;
use guest::server::program;
use guest::{Server, mortal, oracle, qemu, scratch, sparse_image, tell, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use virtioblkd::engine::cache::CacheMode;

const MIB: u64 = 1 << 20;
const JOB: &str = concat!(include_str!("guest/fio.sh"), include_str!("guest/until_told.sh"));

/// Ends whoever serves, however the test ends.
struct Serving(PathBuf);

impl Serving {
    fn pid(&self) -> Option<Pid> {
        Pid::from_raw(fs::read_to_string(&self.0).ok()?.trim().parse().ok()?)
    }

    fn kill(&self) {
        if let Some(pid) = self.pid() {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Both of fio's processes write on.
fn goes_on(server: &Server, what: &str) {
    let figures = || ["writes", "flushes"].map(|figure| server.total(figure));
    let before = figures();
    wait_until(what, || figures().iter().zip(before).all(|(now, before)| *now >= before + 5));
}

#[test]
fn a_real_guest_does_not_notice_twenty_upgrades() {
    let dir = scratch();
    let image = sparse_image(dir.path(), 16 * MIB);
    let serving = Serving(dir.path().join("pid"));
    let options = ["--num-queues", "2", "--pid-file", serving.0.to_str().expect("a path")];
    let server = Server::start(&image, CacheMode::None, &options);
    let mut vm = qemu::linux_full(2, JOB).vhost_user_disk(&server.socket(), ",num-queues=2").start();
    vm.until_asked("stop");
    let mut monitor = vm.qmp();
    let (mut pauses, mut dirty_before) = (Vec::new(), 0);
    for round in 0..20 {
        let mode = ["directsync", "writeback", "writethrough", "none", "unsafe"][round % 5];
        let figures = server.ctl_ok(&["upgrade", "--json", "--", "--cache", mode]);
        let figures: Value = serde_json::from_str(&figures).expect("figures");
        pauses.push(figures["pause-us"].as_u64().expect("a number") as f64 / 1000.0);
        goes_on(&server, "the guest writes on after an upgrade");
        if round % 5 == 1 {
            monitor.execute("stop", json!({}));
            // Nothing runs, and the state goes over all the same.
            server.ctl_ok(&["upgrade"]);
            monitor.execute("cont", json!({}));
            goes_on(&server, "the guest writes on after a stop");
            server.ctl_ok(&["quiesce", "--", "true"]);
        }
        if mode == "unsafe" {
            monitor.execute("stop", json!({}));
            dirty_before = dirty_before.max(oracle::dirty_pages(&image).unwrap_or(1));
            server.ctl_ok(&["upgrade", "--", "--cache", "directsync"]);
            assert_eq!(oracle::dirty_pages(&image).unwrap_or(0), 0, "what 'unsafe' left behind is not durable");
            monitor.execute("cont", json!({}));
            goes_on(&server, "the guest writes on after 'unsafe'");
        }
    }
    assert!(dirty_before > 0, "'unsafe' left nothing behind: this test would not notice");
    server.ctl_ok(&["upgrade", "--", "--cache", "none"]);
    assert_eq!(server.total("errors"), 0);
    let log = server.log();
    assert_eq!(log.matches("front-end connected").count(), 1, "QEMU came again:\n{log}");
    let mut next = kill_and_follow(&server, &serving, &image, &options);
    goes_on(&server, "the guest writes on after a kill");
    vm_ends(&mut vm, &image);
    vm.finish();
    server.ctl_ok(&["quit"]);
    assert!(next.wait().expect("our own child").success());
    pauses.sort_by(f64::total_cmp);
    let (median, longest) = (pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
    tell(&format!("20 upgrades in all modes, paused for {median:.1} ms in the median, {longest:.1} ms at most"));
}

/// A daemon that took over is killed: what it had taken is done again by the next.
fn kill_and_follow(server: &Server, serving: &Serving, image: &Path, options: &[&str]) -> Child {
    let pid = serving.pid().expect("it runs");
    serving.kill();
    // A dead process that nobody has waited for yet has no program any more.
    wait_until("it is dead", || fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero())).is_err());
    let mut command = mortal(program("virtioblkd"));
    command.arg("--socket-path").arg(server.socket()).arg("--control-path").arg(server.control());
    command.arg("--blk-file").arg(image).args(["--cache", "none"]).args(options);
    let next = command.spawn().expect("virtioblkd");
    wait_until("the next daemon is there", || server.ctl(&["status"]).status.success());
    next
}

fn vm_ends(vm: &mut Vm, image: &Path) {
    vm.go();
    let sum = vm.until_asked("compare");
    assert_eq!(sum.last(), Some(&format!("{}  -", oracle::digest(image))));
    vm.go();
}
