//! Domains of a real libvirt under load: disks that come and go while the guest writes another, and twenty domains with a QEMU
//! each that start at once. SKIPPED where libvirt is not installed or if we are not root; in `make check-libvirt` only.

use std::fs;
use std::thread;

use kit::guest::libvirt::DOMAIN;
use kit::guest::system_libvirt::{DAEMON_USER, SystemLibvirt};
use kit::guest::{oracle, wait_until};

use crate::libvirt_domain::{ctl_json, ctl_ok};
use crate::libvirt_hook::{MIB, UUID, domain, image, is_long_run, said, until_said};
use crate::libvirt_systemd::units;

/// Writes vda from two processes without a pause, a half each, until it is told to stop. Fills each vdb with other
/// bytes, says what they are, and reads them back.
const JOB: &str = r#"
agent
load() {
    n=0
    until [ -e /tmp/stop ]; do
        n=$((n + 1))
        dd if=/dev/urandom of=/tmp/block$1 bs=64k count=16 2>/dev/null
        dd if=/tmp/block$1 of=/dev/vda bs=64k seek=$(( ($1 * 8 + n % 8) * 16 )) $2 conv=notrunc 2>/dev/null || exit 1
        [ $((n % 4)) != 0 ] || sync
        echo "load $1 $n"
    done
}
load 0 oflag=direct & direct=$!
load 1 & cached=$!
(
    disk=0
    until [ -e /tmp/stop ]; do
        sleep 0.2
        [ -b /dev/vdb ] || continue
        disk=$((disk + 1))
        dd if=/dev/urandom of=/tmp/more bs=64k count=32 2>/dev/null
        dd if=/tmp/more of=/dev/vdb bs=64k conv=notrunc,fsync 2>/dev/null || { echo "@@exit: vdb fails"; exit 1; }
        echo 3 >/proc/sys/vm/drop_caches
        echo "vdb $disk $(sha256sum </tmp/more | cut -d' ' -f1) $(sha256sum </dev/vdb | cut -d' ' -f1)"
        while [ -b /dev/vdb ]; do sleep 0.1; done
    done
) &
wait $direct || echo "@@exit: load fails"
wait $cached || echo "@@exit: load fails"
sync
echo 3 >/proc/sys/vm/drop_caches
echo "sum $(sha256sum </dev/vda | cut -d' ' -f1)"
sleep 1000
"#;

/// How often each of the two writers has written.
fn written(libvirt: &SystemLibvirt) -> [usize; 2] {
    let said = said(libvirt);
    [0, 1].map(|writer| said.iter().filter(|line| line.starts_with(&format!("load {writer} "))).count())
}

#[test]
fn disks_come_and_go_while_the_guest_writes_another_and_no_byte_is_lost() {
    if !is_long_run() {
        return;
    }
    let Some(libvirt) = SystemLibvirt::start(60) else { return };
    let first = image(&libvirt, "first.img");
    let attributes = format!("file='{}' cache='writeback' queues='2'", first.display());
    libvirt.virsh_ok(&["define", &domain(&libvirt, JOB, &[("vda", &attributes)])]);
    libvirt.virsh_ok(&["start", DOMAIN]);
    until_said(&libvirt, "load 0 3");
    until_said(&libvirt, "load 1 3");
    let one_disk = libvirt.left();
    for (round, cache) in ["none", "writeback", "directsync", "writethrough"].iter().enumerate() {
        let more = libvirt.home().join(format!("more{round}.raw"));
        fs::write(&more, vec![0x55; 2 * MIB as usize]).expect("room");
        std::os::unix::fs::chown(&more, Some(DAEMON_USER), None).expect("we are root");
        let before = written(&libvirt);
        let file = format!("file={}", more.display());
        ctl_ok(&libvirt, &["domain", "attach", DOMAIN, "vdb", &file, &format!("cache={cache}")]);
        let start = format!("vdb {} ", round + 1);
        let mut sums: Vec<String> = Vec::new();
        wait_until("the guest has written and read its second disk", || {
            let line = said(&libvirt).into_iter().find(|line| line.starts_with(&start)).unwrap_or_default();
            sums = line.split(' ').skip(2).map(str::to_owned).collect();
            // The last line may not be whole.
            sums.len() == 2 && sums.iter().all(|sum| sum.len() == 64)
        });
        let [wrote, read] = &sums[..] else { unreachable!("two sums") };
        assert_eq!(wrote, read, "{cache}: the guest reads other bytes than it wrote");
        wait_until("the guest writes its first disk beside the second", || {
            written(&libvirt).iter().zip(before).all(|(now, before)| *now > before)
        });
        ctl_ok(&libvirt, &["domain", "detach", DOMAIN, "vdb"]);
        assert_eq!(oracle::digest(&more), *wrote, "{cache}: the image has other bytes than the guest wrote");
        assert_eq!(libvirt.left(), one_disk, "{cache}");
        let after = written(&libvirt);
        wait_until("the guest writes on", || written(&libvirt).iter().zip(after).all(|(now, after)| *now > after));
    }
    let stop = r#"{"execute":"guest-file-open","arguments":{"path":"/tmp/stop","mode":"w"}}"#;
    wait_until("the agent answers", || libvirt.virsh(&["qemu-agent-command", DOMAIN, stop]).status.success());
    let mut sum = String::new();
    wait_until("the writers have ended", || {
        let said = said(&libvirt);
        assert!(!said.iter().any(|line| line.starts_with("@@exit")), "{said:?}");
        sum = said.iter().find_map(|line| line.strip_prefix("sum ")).unwrap_or_default().to_owned();
        sum.len() == 64
    });
    assert_eq!(oracle::digest(&first), sum, "the image has other bytes than the guest wrote");
    libvirt.virsh_ok(&["destroy", DOMAIN]);
    assert_eq!(libvirt.left(), Vec::<String>::new());
}

/// A domain of firmware alone, with one disk.
fn small_domain(libvirt: &SystemLibvirt, number: usize) -> String {
    let (name, image) = (format!("small{number}"), image(libvirt, &format!("{number}.img")));
    let xml = format!(
        "<domain type='qemu'><name>{name}</name><uuid>{}{number:02}</uuid><memory unit='MiB'>32</memory>
         <metadata><disks xmlns='urn:virtioblkd:libvirt:1'><disk target='vda' file='{}' serial='s{number}'/></disks></metadata>
         <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
         <os><type arch='x86_64' machine='q35'>hvm</type></os>
         <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
         <disk type='vhostuser' device='disk'><driver name='qemu' type='raw'/>
         <source type='unix' path='/run/virtioblkd/{name}.sock'><reconnect enabled='yes' timeout='1'/></source>
         <target dev='vda' bus='virtio'/></disk>
         <controller type='usb' model='none'/><memballoon model='none'/></devices></domain>",
        &UUID[..34],
        image.display()
    );
    libvirt.virsh_ok(&["define", &libvirt.file(&format!("{name}.xml"), xml)]);
    name
}

/// All at once, each by a virsh of its own.
fn at_once(libvirt: &SystemLibvirt, command: &[&str], names: &[String]) {
    thread::scope(|scope| {
        let all: Vec<_> = names
            .iter()
            .map(|name| scope.spawn(move || libvirt.virsh_ok(&[command, &[name.as_str()]].concat())))
            .collect();
        all.into_iter().for_each(|one| drop(one.join().expect("no panic")));
    });
}

fn in_use(libvirt: &SystemLibvirt) -> Vec<String> {
    let list = ctl_json(libvirt, &["list"]);
    let used = list.as_array().expect("disks").iter().filter(|disk| disk["state"] == "in-use");
    let mut names: Vec<String> = used.map(|disk| disk["domain"].as_str().expect("a name").to_owned()).collect();
    names.sort();
    names
}

fn twenty_start_and_end(libvirt: &SystemLibvirt) {
    let mut names: Vec<String> = (0..20).map(|number| small_domain(libvirt, number)).collect();
    names.sort();
    at_once(libvirt, &["start", "--paused"], &names);
    assert_eq!(in_use(libvirt), names, "each QEMU has its disk");
    at_once(libvirt, &["resume"], &names);
    // Half of them end at once; the others keep their disks.
    at_once(libvirt, &["destroy"], &names[..10]);
    assert_eq!(in_use(libvirt), names[10..]);
    at_once(libvirt, &["destroy"], &names[10..]);
    assert_eq!(libvirt.left(), Vec::<String>::new());
}

#[test]
fn twenty_domains_with_a_qemu_each_start_at_once() {
    if !is_long_run() {
        return;
    }
    let Some(libvirt) = SystemLibvirt::start(61) else { return };
    twenty_start_and_end(&libvirt);
}

#[test]
fn twenty_domains_with_units_start_at_once() {
    if !is_long_run() {
        return;
    }
    let Some(libvirt) = SystemLibvirt::start_on_systemd(62) else { return };
    twenty_start_and_end(&libvirt);
    assert_eq!(units(&libvirt), Vec::<String>::new());
}
