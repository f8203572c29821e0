//! What happens to a guest in its life, under load, and its disk does not mind: memory that is plugged in and out, resets,
//! kexec, a driver that goes and comes back, another number of queues, firmware before Linux and after it. The guest
//! sees no error, and what it was told is on the disk.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kit::guest;
use kit::guest::ledger::{self, Ledger};
use kit::guest::{Qmp, Server, Vm, initramfs, oracle, qemu, run, scratch, sparse_image, tell, wait_until};
use serde_json::json;
use virtioblkd::engine::cache::CacheMode;

const MIB: u64 = 1 << 20;
const FUNCTIONS: &str = include_str!("life.sh");

/// fio writes and verifies from two processes until told to stop.
const FIO: &str = concat!(
    include_str!("fio.sh"),
    r#"
verifying_fio 2
verify() {
	( while [ ! -e /tmp/stop ]; do
		fio --eta=never --output=/tmp/fio.out /tmp/fio.job || { cat /tmp/fio.out; echo "@@exit: fio"; exit 1; }
	done ) &
	kept=$!
}

# Bytes of hot-plugged memory that are in use: only that is in this zone, and processes take from it first.
movable_in_use() {
	awk '/zone/ { here = $4 == "Movable" } here && $1 == "pages" { free = $3 } here && $1 == "present" { present = $2 }
		END { print (present - free) * 4096 }' /proc/zoneinfo
}
"#
);

/// What the guest reads of the disk's first bytes is what the host has.
fn same_to_guest_and_host(vm: &mut Vm, device: &str, image: &Path, bytes: u64) {
    let sum = vm.sh(&format!("head -c {bytes} {device} | sha256sum"));
    let host =
        run(Command::new("sh").args(["-c", "head -c \"$1\" \"$2\" | sha256sum", "sh", &bytes.to_string()]).arg(image));
    assert_eq!(sum.last().map(String::as_str), Some(host.trim_end()), "the guest reads another {device}");
}

fn writes_on(server: &Server) {
    let before = server.total("writes");
    wait_until("the guest writes on", || server.total("writes") > before + 20);
}

#[test]
fn memory_is_plugged_in_and_out_under_load() {
    let dir = scratch();
    let image = sparse_image(dir.path(), 16 * MIB);
    let mut server = Server::start(&image, CacheMode::None, &LATE);
    let mut vm = qemu::linux_full_shell(2, &format!("{FUNCTIONS}{FIO}"))
        .vhost_user_disk(&server.socket(), ",num-queues=2")
        .args(["-m", "slots=4,maxmem=4G"])
        .start_shell();
    vm.sh("echo online_movable >/sys/devices/system/memory/auto_online_blocks");
    vm.sh("verify");
    let mut monitor = vm.qmp();
    let mut done_again = 0;
    for round in 0..3 {
        for dimm in ["a", "b"] {
            let backend = json!({"qom-type": "memory-backend-memfd", "id": format!("memory-{dimm}"), "size": 256 * MIB,
                "share": true});
            monitor.execute("object-add", backend);
            let dimm = json!({"driver": "pc-dimm", "id": dimm, "memdev": format!("memory-{dimm}")});
            monitor.execute("device_add", dimm);
        }
        wait_until("the guest's processes use the new memory", || {
            let in_use: u64 = vm.sh("movable_in_use").last().and_then(|text| text.parse().ok()).expect("a number");
            in_use > 8 * MIB
        });
        writes_on(&server);
        // The next server does again what was in flight, in memory that was not there when the first began.
        wait_until("requests are in flight", || server.total("in-flight") > 2);
        server = server.kill_and_start(&image, CacheMode::None, &LATE);
        writes_on(&server);
        done_again += usize::from(server.log().contains("are resubmitted"));
        for dimm in ["a", "b"] {
            unplug(&mut monitor, dimm);
            monitor.execute("object-del", json!({"id": format!("memory-{dimm}")}));
        }
        assert_eq!(vm.sh("movable_in_use"), ["0"], "round {round}");
        writes_on(&server);
    }
    vm.sh("close_ledgers && sync");
    same_to_guest_and_host(&mut vm, "/dev/vda", &image, 16 * MIB);
    assert_eq!(server.total("errors"), 0);
    assert!(done_again > 0, "nothing was in flight at any of three kills");
    tell("two DIMMs plugged in and out three times, the server killed in between, fio verified in their memory");
}

/// Asks the guest to give a DIMM back, again and again: it refuses while the memory is in use.
fn unplug(monitor: &mut Qmp, dimm: &str) {
    wait_until("the guest gives a DIMM back", || {
        if monitor.try_execute("device_del", json!({"id": dimm})).is_err() {
            // The last request is not settled yet, or it is gone.
            std::thread::sleep(Duration::from_millis(50));
        }
        let there = monitor.execute("query-memory-devices", json!({}));
        there.as_array().expect("a list").iter().all(|device| device["data"]["id"] != dimm)
    });
}

/// A guest with a ledger on a disk whose writes come late, so that many are in flight at any moment.
struct Life {
    server: Option<Server>,
    vm: Vm,
    monitor: Qmp,
    image: PathBuf,
    ledgers: [Ledger; 2],
    _dir: tempfile::TempDir,
}

const LATE: [&str; 4] = ["--backend", "slow:40", "--num-queues", "2"];

impl Life {
    fn new() -> Life {
        Life::of(qemu::linux_shell(2, FUNCTIONS), |_| ())
    }

    /// The life of this guest; `prepare` fills the image behind the ledgers.
    fn of(guest: qemu::Qemu, prepare: impl FnOnce(&Path)) -> Life {
        let dir = scratch();
        let image = sparse_image(dir.path(), 64 * MIB);
        prepare(&image);
        let server = Server::start(&image, CacheMode::None, &LATE);
        let vm =
            guest.vhost_user_disk(&server.socket(), ",num-queues=2").args(["-action", "reboot=reset"]).start_shell();
        let monitor = vm.qmp();
        let ledgers = [("a", 0), ("b", ledger::SIZE)].map(|(name, at)| Ledger::new(name, "/dev/vda", at));
        Life { server: Some(server), vm, monitor, image, ledgers, _dir: dir }
    }

    fn server(&self) -> &Server {
        self.server.as_ref().expect("there is one")
    }

    fn load(&mut self) {
        self.vm.sh("read_all /dev/vda");
        for ledger in &mut self.ledgers {
            ledger.start(&mut self.vm);
        }
        self.go_on(3);
        wait_until("writes are in flight", || self.server().total("in-flight") > 2);
    }

    fn go_on(&mut self, rounds: u32) {
        for at in 0..2 {
            for _ in 0..rounds {
                let lines = self.vm.until_line(&format!("@kept {} ", ["a", "b"][at]));
                self.ledgers.iter_mut().for_each(|ledger| ledger.hear(&lines));
            }
        }
    }

    fn reset(monitor: &mut Qmp) {
        monitor.events.clear();
        monitor.execute("system_reset", json!({}));
        monitor.event("RESET");
    }

    fn kill(&mut self, meanwhile: impl FnOnce(&mut Qmp)) {
        let server = self.server.take().expect("there is one");
        let monitor = &mut self.monitor;
        self.server = Some(server.kill_and_start_after(&self.image, CacheMode::None, &LATE, || meanwhile(monitor)));
    }

    /// The guest is up again: all that it ever kept is there, and it reads it.
    fn check(&mut self) {
        let lines = self.vm.until_line("@@ready");
        for ledger in &mut self.ledgers {
            ledger.hear(&lines);
            assert!(ledger.check(&self.image) > 0);
        }
        same_to_guest_and_host(&mut self.vm, "/dev/vda", &self.image, 2 * ledger::SIZE);
        assert_eq!(self.server().total("errors"), 0);
        let log = self.server().log();
        assert!(!log.contains("are resubmitted"), "what an earlier guest had asked for was done to this one:\n{log}");
    }
}

#[test]
fn a_guest_that_is_reset_finds_what_it_kept() {
    let mut life = Life::new();
    for _ in 0..3 {
        life.load();
        Life::reset(&mut life.monitor);
        life.check();
    }
    // What an operator holds back is the guest's still, and goes with it.
    life.load();
    let mut control = Qmp::connect(&life.server().control());
    let held = control.execute("quiesce", json!({"timeout-ms": 60_000, "lease-ms": 170_000}));
    wait_until("a write is held", || life.server().status()["total"]["held"] == true);
    let digest = oracle::digest(&life.image);
    Life::reset(&mut life.monitor);
    life.check();
    control.execute("resume", json!({"token": held["token"]}));
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(oracle::digest(&life.image), digest, "the new guest wrote nothing, and the old one is gone");
    // Its server dies with requests in flight, and the guest is reset before there is another one.
    for _ in 0..2 {
        life.load();
        life.kill(Life::reset);
        life.check();
    }
    // The server dies in the middle of the reset.
    if guest::qemu_can_lose_its_reconnection() {
        tell("SKIPPED: this QEMU connects no more if it loses a daemon while the driver starts");
    } else {
        life.load();
        life.monitor.execute("system_reset", json!({}));
        life.kill(|_| ());
        life.check();
    }
    // Without a reset the same requests are resubmitted: so they were there.
    life.load();
    life.kill(|_| ());
    life.go_on(3);
    // Where nothing was in flight when the server died, this is never logged.
    life.server().wait_for_log(&["are resubmitted"]);
    life.vm.sh("touch /tmp/stop-reading; close_ledgers");
    tell(
        "seven resets under load, one of a held disk, three with a dead server: what was flushed was there, nothing was done again",
    );
}

/// A guest whose firmware asks what to boot, each time.
struct Menu {
    vm: Vm,
    monitor: Qmp,
    /// What the firmware says, since the first boot.
    said: PathBuf,
    boots: usize,
}

impl Menu {
    /// Waits for the firmware to ask (by then it has the disk), lets `meanwhile` look, then chooses.
    fn boot(&mut self, choice: &str, meanwhile: impl FnOnce()) {
        self.boots += 1;
        self.wait_for("Press ESC for boot menu.");
        meanwhile();
        self.press("esc");
        self.wait_for("Select boot device:");
        self.press(choice);
    }

    fn wait_for(&self, words: &str) {
        wait_until(words, || {
            let said = std::fs::read(&self.said).unwrap_or_default();
            String::from_utf8_lossy(&said).matches(words).count() == self.boots
        });
    }

    fn press(&mut self, key: &str) {
        self.monitor.execute("send-key", json!({"keys": [{"type": "qcode", "data": key}]}));
    }
}

/// When a write is acknowledged now, and on how many rings.
fn service(server: &Server) -> (String, usize) {
    let status = server.status();
    let rings = status["rings"].as_array().expect("a list").len();
    (status["write-acknowledged"].as_str().expect("words").to_owned(), rings)
}

/// SeaBIOS knows one queue and no FLUSH, Linux knows both: each is served as it can be, whoever was there before.
#[test]
fn firmware_and_linux_take_turns() {
    let dir = scratch();
    let image = sparse_image(dir.path(), 4 * MIB);
    qemu::install_boot_sector(&image);
    let server = Server::start(&image, CacheMode::Writeback, &["--num-queues", "4"]);
    let said = dir.path().join("firmware");
    let debug = format!("file,id=firmware,path={}", said.display());
    let vm = qemu::linux_shell(2, FUNCTIONS)
        .vhost_user_disk(&server.socket(), ",num-queues=4")
        .args(["-action", "reboot=reset", "-boot", "menu=on,splash-time=60000"])
        .args(["-chardev", &debug, "-device", "isa-debugcon,iobase=0x402,chardev=firmware"])
        .start();
    let monitor = vm.qmp();
    let mut menu = Menu { vm, monitor, said, boots: 0 };
    let firmware = || {
        assert_eq!(service(&server), ("when durable".to_owned(), 1));
    };
    let mut durable = 0;
    for turn in 0..2 {
        // The disk's boot sector writes eight sectors, which nobody flushes.
        let writes = server.total("writes");
        menu.boot("2", firmware);
        wait_until("the boot sector has written", || server.total("writes") == writes + 8);
        firmware();
        assert_eq!(oracle::dirty_pages(&image).unwrap_or(0), 0, "turn {turn}");
        assert!(server.total("syncs") >= durable + 8);
        Life::reset(&mut menu.monitor);
        menu.boot("1", firmware);
        menu.vm.until_line("@@ready");
        assert_eq!(service(&server), ("when the host's cache has it".to_owned(), 2));
        let syncs = server.total("syncs");
        menu.vm.sh("dd if=/dev/urandom of=/dev/vda bs=64k seek=1 count=32 oflag=direct 2>/dev/null");
        assert_eq!(server.total("syncs"), syncs, "turn {turn}: Linux is served as the firmware was");
        menu.vm.sh("dd if=/dev/zero of=/dev/vda bs=64k seek=1 count=1 conv=notrunc,fsync 2>/dev/null");
        assert_eq!(oracle::dirty_pages(&image).unwrap_or(0), 0, "turn {turn}");
        assert!(server.total("syncs") > syncs);
        durable = server.total("syncs");
        same_to_guest_and_host(&mut menu.vm, "/dev/vda", &image, 4 * MIB);
        // And back, while Linux writes.
        menu.vm
            .sh("(while :; do dd if=/dev/urandom of=/dev/vda bs=64k seek=1 count=16 oflag=direct; done) 2>/dev/null &");
        writes_on(&server);
        Life::reset(&mut menu.monitor);
    }
    menu.boot("1", firmware);
    menu.vm.until_line("@@ready");
    assert_eq!(server.total("errors"), 0);
}

const MAX_QUEUES: usize = 4;

fn queues(most: &str) -> [&str; 4] {
    ["--backend", "slow:5", "--num-queues", most]
}

#[test]
fn a_driver_goes_and_comes_back_with_other_queues() {
    let dir = scratch();
    let disk = |name: &str| {
        std::fs::create_dir(dir.path().join(name)).expect("a directory");
        sparse_image(&dir.path().join(name), 8 * MIB)
    };
    let (image, image_of_neighbour) = (disk("a"), disk("b"));
    let mut server = Server::start(&image, CacheMode::None, &queues("4"));
    let neighbour = Server::start(&image_of_neighbour, CacheMode::None, &queues("4"));
    let mut vm = qemu::linux_shell(MAX_QUEUES as u32, FUNCTIONS)
        .vhost_user_disk(&server.socket(), ",num-queues=4")
        .vhost_user_disk(&neighbour.socket(), ",num-queues=4")
        .start_shell();
    let virtio = vm.sh("virtio_device vda").pop().expect("a name");
    let mut ledger = Ledger::new("b", "/dev/vdb", 0);
    ledger.start(&mut vm);
    vm.sh("read_all /dev/vda");
    for round in 0..20 {
        ledger.hear(&vm.sh(&format!("put /dev/vda {round}")));
        // The device has four.
        let wanted = [1, 4, 2, 3, 9][round % 5];
        let mut rebind = |vm: &mut Vm| {
            let command =
                format!("(rebind /dev/vda {virtio} {wanted} >/tmp/queues; echo \"@bound $? $(cat /tmp/queues)\") &");
            ledger.hear(&vm.sh(&command));
        };
        if round % 5 == 4 {
            // The server is gone while the driver goes and the next one comes.
            server = server.kill_and_start_after(&image, CacheMode::None, &queues("4"), || {
                rebind(&mut vm);
                std::thread::sleep(Duration::from_millis(500));
            });
        } else {
            rebind(&mut vm);
        }
        let said = vm.until_line("@bound ");
        ledger.hear(&said);
        assert_eq!(said.last(), Some(&format!("@bound 0 {}", wanted.min(MAX_QUEUES))), "round {round}");
        assert_eq!(service(&server).1, wanted.min(MAX_QUEUES));
        ledger.hear(&vm.sh(&format!("got /dev/vda {round}")));
    }
    // The server comes back with more queues, with fewer than the guest has, and with enough.
    server = server.restart(&image, CacheMode::None, &queues("8"));
    ledger.hear(&vm.sh("put /dev/vda 20"));
    server = server.restart(&image, CacheMode::None, &queues("2"));
    ledger.hear(&vm.sh("(put /dev/vda 21 && echo @put) &"));
    wait_until("QEMU tries a server with too few queues", || server.log().contains("front-end disconnected"));
    assert_eq!(server.total("writes"), 0);
    server = server.restart(&image, CacheMode::None, &queues("4"));
    if guest::qemu_can_lose_its_reconnection() {
        server.wait_for_log(&["has sent no message", "power the guest off"]);
        return tell("this QEMU lost its reconnection to a server with enough queues: the log says what to do");
    }
    ledger.hear(&vm.until_line("@put"));

    ledger.hear(&vm.sh("got_all /dev/vda 21"));
    vm.sh("touch /tmp/stop-reading");
    ledger.hear(&vm.sh("close_ledgers"));
    assert!(ledger.check(&image_of_neighbour) > 100, "the neighbour had no load");
    same_to_guest_and_host(&mut vm, "/dev/vda", &image, 8 * MIB);
    same_to_guest_and_host(&mut vm, "/dev/vdb", &image_of_neighbour, 8 * MIB);
    assert_eq!(server.total("errors") + neighbour.total("errors"), 0);
    tell("twenty rebinds with 1 to 4 queues under a neighbour's load, four without a server; servers with 8, 2 and 4");
}

/// A guest with `kexec`, and a kernel and an initramfs on its disk; their bytes, as `kernel_from` takes them.
fn life_with_another_kernel(options: &str) -> (Life, String) {
    let kernel = std::fs::read(guest::guest_files().join("vmlinuz")).expect("the guest's kernel");
    let initrd = initramfs::initramfs_with_kexec(FUNCTIONS);
    let options = format!("{} {options}", qemu::KERNEL_OPTIONS);
    let guest = qemu::Qemu::new(guest::accelerator(), 768, 2).boot(&initrd).args(["-append", &options]);
    let life = Life::of(guest, |image| {
        let file = std::fs::File::options().write(true).open(image).expect("ours");
        file.write_all_at(&kernel, 8 * MIB).and_then(|()| file.write_all_at(&initrd, 32 * MIB)).expect("room");
    });
    let (kernel, initrd) = (kernel.len(), initrd.len());
    assert!(kernel as u64 <= 24 * MIB && initrd as u64 <= 32 * MIB, "a larger image is needed");
    (life, format!("{kernel} {initrd}"))
}

impl Life {
    /// `line` has another kernel take over, without a reset.
    fn taken_over(&mut self, line: &str) {
        self.load();
        self.monitor.events.clear();
        let lines = self.vm.sh(line);
        for ledger in &mut self.ledgers {
            ledger.hear(&lines);
        }
        self.check();
        // Neither a reset that happened because it failed.
        self.monitor.execute("query-status", json!({}));
        assert_eq!(self.monitor.events.iter().find(|event| event["event"] == "RESET"), None);
    }
}

#[test]
fn another_kernel_takes_over_by_kexec() {
    let (mut life, sizes) = life_with_another_kernel("");
    for _ in 0..2 {
        life.taken_over(&format!("kexec_from /dev/vda {sizes} '{}'", qemu::KERNEL_OPTIONS));
    }
    tell("two kernels after one another by kexec, in the middle of writes");
}

/// Nobody told the device: its requests go on, in the memory of the kernel that crashed, until the next one resets it.
#[test]
fn a_kernel_that_crashed_is_followed_by_its_crash_kernel() {
    let (mut life, sizes) = life_with_another_kernel("crashkernel=256M");
    life.taken_over(&format!("crash_into /dev/vda {sizes} '{} nr_cpus=1'", qemu::KERNEL_OPTIONS));
    // Only a crash kernel has what the other one left.
    life.vm.sh("test -e /proc/vmcore");
    tell("a kernel crashed in the middle of writes, and its crash kernel went on with the disk");
}
