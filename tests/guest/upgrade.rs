//! Upgrades in place under a real guest's verified load: it sees no error, and QEMU has nothing to reconnect to. Afterwards
//! all goes on as with the first daemon: QEMU stops and continues the guest, the operator holds the disk, a daemon that
//! is killed is followed by another one.

use std::path::Path;

use kit::guest::ledger::Ledger;
use kit::guest::qemu::Vm;
use kit::guest::{Qmp, Server, oracle, qemu, scratch, sparse_image, tell, wait_until};
use serde_json::json;
use virtioblkd::engine::cache::CacheMode;

const MIB: u64 = 1 << 20;
/// As tests/guest/life.rs has it.
const LIFE: &str = include_str!("life.sh");
const JOB: &str = concat!(include_str!("fio.sh"), include_str!("until_told.sh"));

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
    let options = ["--num-queues", "2"];
    let mut server = Server::start(&image, CacheMode::None, &options);
    let mut vm = qemu::linux_full(2, JOB).vhost_user_disk(&server.socket(), ",num-queues=2").start();
    vm.until_asked("stop");
    let mut monitor = vm.qmp();
    let (mut pauses, mut dirty_before) = (Vec::new(), 0);
    for round in 0..20 {
        let mode = ["directsync", "writeback", "writethrough", "none", "unsafe"][round % 5];
        pauses.push(server.upgrade(&["--cache", mode]));
        goes_on(&server, "the guest writes on after an upgrade");
        if round % 5 == 1 {
            monitor.execute("stop", json!({}));
            // Nothing runs, and the state goes over all the same.
            server.upgrade(&[]);
            monitor.execute("cont", json!({}));
            goes_on(&server, "the guest writes on after a stop");
            server.ctl_ok(&["quiesce", "--", "true"]);
        }
        if mode == "unsafe" {
            monitor.execute("stop", json!({}));
            dirty_before = dirty_before.max(oracle::dirty_pages(&image).unwrap_or(1));
            server.upgrade(&["--cache", "directsync"]);
            assert_eq!(oracle::dirty_pages(&image).unwrap_or(0), 0, "what 'unsafe' left behind is not durable");
            monitor.execute("cont", json!({}));
            goes_on(&server, "the guest writes on after 'unsafe'");
        }
    }
    assert!(dirty_before > 0, "'unsafe' left nothing behind: this test would not notice");
    server.upgrade(&["--cache", "none"]);
    assert_eq!(server.total("errors"), 0);
    let log = server.log();
    assert_eq!(log.matches("front-end connected").count(), 1, "QEMU came again:\n{log}");
    // A daemon that took over is killed: what it had taken is done again by the next.
    server = server.kill_and_start(&image, CacheMode::None, &options);
    goes_on(&server, "the guest writes on after a kill");
    vm_ends(&mut vm, &image);
    vm.finish();
    let (status, log) = server.terminate();
    assert!(status.success(), "{status}\n{log}");
    pauses.sort_by(f64::total_cmp);
    let (median, longest) = (pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
    tell(&format!("20 upgrades in all modes, paused for {median:.1} ms in the median, {longest:.1} ms at most"));
}

fn vm_ends(vm: &mut Vm, image: &Path) {
    vm.go();
    let sum = vm.until_asked("compare");
    assert_eq!(sum.last(), Some(&format!("{}  -", oracle::digest(image))));
    vm.go();
}

/// A guest's disk on a port that it can be unplugged from, with a ledger under way.
struct Life {
    server: Server,
    vm: Vm,
    monitor: Qmp,
    ledger: Ledger,
}

impl Life {
    fn new(image: &Path) -> Life {
        let server = Server::start(image, CacheMode::None, &["--num-queues", "2", "--backend", "slow:5"]);
        let mut vm = qemu::linux_shell(2, LIFE)
            .args(["-device", "pcie-root-port,id=plug,chassis=1", "-action", "reboot=reset"])
            .vhost_user_disk(&server.socket(), ",num-queues=2,bus=plug")
            .start_shell();
        let mut ledger = Ledger::new("a", "/dev/vda", 0);
        ledger.start(&mut vm);
        let monitor = vm.qmp();
        let mut life = Life { server, vm, monitor, ledger };
        life.keeps(3);
        life
    }

    fn keeps(&mut self, rounds: u32) {
        for _ in 0..rounds {
            self.ledger.hear(&self.vm.until_line("@kept a "));
        }
    }

    fn sh(&mut self, line: &str) {
        self.ledger.hear(&self.vm.sh(line));
    }

    /// Upgrades while the guest does `meanwhile`, and waits for its word.
    fn upgrade_during(&mut self, meanwhile: impl FnOnce(&mut Life), word: &str) {
        meanwhile(self);
        self.server.upgrade(&[]);
        let said = self.vm.until_line(word);
        self.ledger.hear(&said);
    }
}

#[test]
fn stops_holds_and_kills_work_after_upgrades() {
    let dir = scratch();
    let image = sparse_image(dir.path(), 16 * MIB);
    let mut life = Life::new(&image);

    // A reset, of a guest whose daemon took over, and in the middle of an upgrade.
    for meanwhile in [false, true] {
        life.server.upgrade(&[]);
        life.keeps(3);
        let reset = |life: &mut Life| {
            life.monitor.execute("system_reset", json!({}));
        };
        if meanwhile {
            life.upgrade_during(reset, "@@ready");
        } else {
            reset(&mut life);
            let said = life.vm.until_line("@@ready");
            life.ledger.hear(&said);
        }
        assert!(life.ledger.check(&image) > 0);
        life.ledger.start(&mut life.vm);
        life.keeps(3);
    }
    life.sh("close_ledgers");
    assert!(life.ledger.check(&image) > 0);

    // A driver that goes and comes back with another number of queues, around upgrades.
    let virtio = life.vm.sh("virtio_device vda").pop().expect("a name");
    for (round, queues) in [1, 2].into_iter().enumerate() {
        let text = 4 + 2 * round;
        life.sh(&format!("put /dev/vda {text}"));
        life.sh(&format!("echo {virtio} >/sys/bus/virtio/drivers/virtio_blk/unbind"));
        life.server.upgrade(&[]);
        life.sh(&format!(
            "echo {virtio} >/sys/bus/virtio/drivers/virtio_blk/bind; until [ -b /dev/vda ]; do sleep 0.05; done"
        ));
        life.sh(&format!("got /dev/vda {text}"));
        let rebind =
            format!("(rebind /dev/vda {virtio} {queues} >/tmp/queues; echo \"@bound $? $(cat /tmp/queues)\") &");
        life.upgrade_during(|life| life.sh(&rebind), "@bound 0");
        let rings = life.server.status()["rings"].as_array().expect("a list").len();
        assert_eq!(rings, queues, "rings that run");
        life.sh(&format!("put /dev/vda {} && got /dev/vda {text}", text + 1));
    }

    // The disk is unplugged while it is read, and plugged in again.
    life.sh("read_all /dev/vda");
    life.monitor.execute("device_del", json!({"id": "disk1"}));
    life.monitor.event("DEVICE_DELETED");
    life.sh("[ ! -e /dev/vda ]");
    life.server.upgrade(&[]);
    life.monitor.execute("chardev-remove", json!({"id": "vu1"}));
    wait_until("the front-end is gone", || life.server.status()["connected"] == false);
    life.server.upgrade(&[]);
    let socket = json!({"type": "unix", "data": {"path": life.server.socket()}});
    let chardev = json!({"type": "socket", "data": {"addr": socket, "server": false}});
    life.monitor.execute("chardev-add", json!({"id": "vu1", "backend": chardev}));
    let disk = json!({"driver": "vhost-user-blk-pci", "id": "disk1", "chardev": "vu1", "bus": "plug", "num-queues": 2});
    life.monitor.execute("device_add", disk);
    life.sh("until [ -b /dev/vda ]; do sleep 0.05; done");
    life.server.upgrade(&[]);
    life.sh("touch /tmp/stop-reading; for n in 4 5 6 7; do got /dev/vda $n || exit 1; done; put /dev/vda 8 && got /dev/vda 8");
    assert_eq!(life.server.total("errors"), 0);
    let log = life.server.log();
    assert_eq!(log.matches("front-end connected").count(), 2, "QEMU came again:\n{log}");
    life.server.quit();
    tell("two resets, four rebinds, an unplug and a plug around ten upgrades");
}
