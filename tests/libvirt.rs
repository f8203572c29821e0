//! The shipped domain on a real libvirt: defined, started, suspended while its disk is held, resumed, destroyed.
//!
//! A libvirtd of our own in private directories, as an unprivileged user's session daemon: the machine's own libvirt,
//! if it has one, is not touched. Said aloud and skipped where libvirt is not installed.

mod guest;

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use guest::qemu::{self, install_boot_sector};
use guest::server::program;
use guest::{Qmp, Server, guest_files, oracle, output, root, scratch, sparse_image, tell, wait_until};
use rustix::process::geteuid;
use serde_json::json;
use virtioblkd::engine::cache::CacheMode;

/// "nobody": libvirt's privileged daemon wants the whole machine, its session daemon does not.
const NOBODY: u32 = 65534;

/// A libvirtd and the directories that it believes to be a user's home. Killed when dropped.
struct Libvirt {
    daemon: Child,
    home: tempfile::TempDir,
}

impl Libvirt {
    /// `None` where libvirt is not installed.
    fn start() -> Option<Libvirt> {
        let daemon = ["/usr/sbin/libvirtd", "/usr/bin/libvirtd"].into_iter().find(|path| Path::new(path).exists());
        let found = daemon.filter(|_| Command::new("virsh").arg("--version").output().is_ok());
        let Some(daemon) = found else {
            tell("SKIPPED: libvirt is not installed: the shipped domain was not started");
            return None;
        };
        // Short: sockets live in it.
        let home = tempfile::tempdir().expect("a home");
        let configuration = home.path().join("libvirt");
        fs::create_dir(&configuration).expect("room");
        // No virtlogd.
        fs::write(configuration.join("qemu.conf"), "stdio_handler = \"file\"\n").expect("room");
        if geteuid().is_root() {
            for path in [home.path(), &configuration] {
                chown(path, Some(NOBODY), Some(NOBODY)).expect("root may");
            }
        }
        let log = File::create(home.path().join("libvirtd.log")).expect("room");
        let mut command = as_user(home.path(), daemon);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a handle")).stderr(log);
        let daemon = command.spawn().expect("libvirtd starts");
        let libvirt = Libvirt { daemon, home };
        wait_until("libvirtd answers", || libvirt.virsh(&["version"]).status.success());
        Some(libvirt)
    }

    fn virsh(&self, arguments: &[&str]) -> Output {
        // `virsh start` waits for ever if QEMU cannot connect to the disk.
        output(
            as_user(self.home.path(), "timeout").args(["180", "virsh", "-q", "-c", "qemu:///session"]).args(arguments),
        )
    }

    fn virsh_ok(&self, arguments: &[&str]) -> String {
        let output = self.virsh(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "virsh {arguments:?}: {}\n{stderr}", output.status);
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        // QEMU outlives libvirtd, so the domain goes first; there may be none.
        let _ = self.virsh(&["destroy", "example"]);
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        if std::thread::panicking() {
            for log in ["libvirtd.log", ".cache/libvirt/qemu/log/example.log"] {
                let text = fs::read_to_string(self.home.path().join(log)).unwrap_or_default();
                eprintln!("--- {log}:\n{text}");
            }
        }
    }
}

/// `program` as a plain user whose home is `home`.
fn as_user(home: &Path, program: &str) -> Command {
    let mut command = Command::new(program);
    if geteuid().is_root() {
        command = Command::new("setpriv");
        command.args([&format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}"), "--clear-groups"]);
        command.args(["--pdeathsig", "KILL", program]);
    }
    command.env_clear().env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin").env("HOME", home);
    command.env("XDG_RUNTIME_DIR", home).env("XDG_CONFIG_HOME", home).env("XDG_CACHE_HOME", home.join(".cache"));
    command.current_dir(home);
    command
}

fn shipped(name: &str) -> String {
    fs::read_to_string(root().join("qemu-configs/libvirt").join(name)).expect("shipped")
}

/// The lines of the `<disk>`, without what is around it.
fn disk_lines(xml: &str) -> Vec<&str> {
    let lines = xml.lines().map(str::trim).skip_while(|line| !line.starts_with("<disk"));
    lines.take_while(|line| *line != "</disk>").collect()
}

#[test]
fn the_two_shipped_disks_are_one() {
    let (domain, disk) = (shipped("domain-minimal.xml"), shipped("disk.xml"));
    assert!(disk_lines(&disk).len() > 3);
    assert_eq!(disk_lines(&domain), disk_lines(&disk));
}

#[test]
fn the_shipped_domain_runs_and_is_suspended_while_its_disk_is_held() {
    let Some(libvirt) = Libvirt::start() else { return };
    let dir = scratch();
    let image = sparse_image(dir.path(), 1 << 20);
    install_boot_sector(&image);
    let server = Server::start(&image, CacheMode::None, &["--socket-mode", "0666"]);
    // The other user's QEMU must reach the socket.
    let sockets = server.socket().parent().expect("a directory").to_owned();
    fs::set_permissions(&sockets, fs::Permissions::from_mode(0o755)).expect("ours");

    let xml = shipped("domain-minimal.xml")
        .replace("/run/virtioblkd/example.sock", server.socket().to_str().expect("a plain path"))
        .replace("<domain type='kvm'>", "<domain type='qemu'>");
    let path: PathBuf = libvirt.home.path().join("example.xml");
    fs::write(&path, xml).expect("room");
    libvirt.virsh_ok(&["define", "--validate", path.to_str().expect("a plain path")]);
    libvirt.virsh_ok(&["start", "example"]);
    wait_until("the guest has written", || server.total("writes") >= 8);
    for sector in 1..=8u8 {
        let found = oracle::read_at(&image, u64::from(sector) * 512, 512);
        assert_eq!(found, [0xa0 + sector; 512], "sector {sector}");
    }

    // Suspended, reset (which runs the boot sector again) and resumed while the disk is held; then the disk goes on.
    let mut control = Qmp::connect(&server.control());
    let held = control.execute("quiesce", json!({"timeout-ms": 60_000, "lease-ms": 600_000}));
    let digest = oracle::digest(&image);
    libvirt.virsh_ok(&["suspend", "example"]);
    assert_eq!(libvirt.virsh_ok(&["domstate", "example"]), "paused");
    libvirt.virsh_ok(&["resume", "example"]);
    libvirt.virsh_ok(&["reset", "example"]);
    assert_eq!(libvirt.virsh_ok(&["domstate", "example"]), "running");
    assert_eq!(oracle::digest(&image), digest);
    assert_eq!(server.total("writes"), 8, "a write passed a held disk");
    control.execute("resume", json!({ "token": held["token"] }));
    wait_until("the guest has written again", || server.total("writes") >= 16);

    libvirt.virsh_ok(&["destroy", "example"]);
    libvirt.virsh_ok(&["undefine", "example"]);
    let (status, log) = server.terminate();
    assert!(status.success(), "{status}\n{log}");
}

/// A Linux with the guest agent on libvirt's own channel, a writer on the disk, and a place to plug another one in.
const LINUX: &str = r#"
<domain type='qemu'>
  <name>example</name>
  <memory unit='MiB'>384</memory>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>@HOME@/vmlinuz</kernel>
    <initrd>@HOME@/initramfs</initrd>
    <cmdline>@OPTIONS@</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    @DISK@
    <controller type='pci' model='pcie-root'/>
    <controller type='pci' model='pcie-root-port'/>
    <controller type='pci' model='pcie-root-port'/>
    <controller type='pci' model='pcie-root-port'/>
    <controller type='pci' model='pcie-root-port'/>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path='@HOME@/console'/><target port='0'/></serial>
    <serial type='file'><source path='@HOME@/job'/><target port='1'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  </devices>
</domain>
"#;

const WRITER: &str = r#"
mkdir -p /run /var /etc/qemu
ln -sfn /run /var/run
mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt || exit 1
until port=$(ls /sys/class/virtio-ports 2>/dev/null) && [ -n "$port" ]; do sleep 0.1; done
qemu-ga -m virtio-serial -p "/dev/$port" -t /run &
n=0
while sleep 0.05; do n=$((n + 1)); echo $n >/mnt/counter; done
"#;

fn disk_xml(socket: &Path, target: &str) -> String {
    shipped("disk.xml")
        .replace("/run/virtioblkd/example.sock", socket.to_str().expect("a plain path"))
        .replace("dev='vda'", &format!("dev='{target}'"))
}

/// A server whose sockets the other user may open.
fn server_for_all(image: &Path) -> Server {
    let server = Server::start(image, CacheMode::None, &["--socket-mode", "0666", "--control-mode", "0666"]);
    let sockets = server.socket().parent().expect("a directory").to_owned();
    fs::set_permissions(&sockets, fs::Permissions::from_mode(0o755)).expect("ours");
    server
}

#[test]
fn a_guest_of_libvirts_is_frozen_snapshotted_and_gets_another_disk() {
    let Some(libvirt) = Libvirt::start() else { return };
    let (dir, other_dir) = (scratch(), scratch());
    let (image, other) = (sparse_image(dir.path(), 64 << 20), sparse_image(other_dir.path(), 8 << 20));
    let (server, second) = (server_for_all(&image), server_for_all(&other));

    let home = libvirt.home.path();
    fs::copy(guest_files().join("vmlinuz"), home.join("vmlinuz")).expect("room");
    fs::write(home.join("initramfs"), qemu::initramfs(WRITER, "initramfs-agent.cpio")).expect("room");
    let xml = LINUX
        .replace("@HOME@", home.to_str().expect("a plain path"))
        .replace("@OPTIONS@", qemu::KERNEL_OPTIONS)
        .replace("@DISK@", &disk_xml(&server.socket(), "vda"));
    fs::write(home.join("linux.xml"), xml).expect("room");
    fs::write(home.join("second.xml"), disk_xml(&second.socket(), "vdb")).expect("room");
    let path = |name: &str| home.join(name).to_str().expect("a plain path").to_owned();
    libvirt.virsh_ok(&["create", &path("linux.xml")]);
    let ping = r#"{"execute":"guest-ping"}"#;
    wait_until("the agent answers", || libvirt.virsh(&["qemu-agent-command", "example", ping]).status.success());

    // By hand: a frozen guest writes nothing, a thawed one goes on.
    libvirt.virsh_ok(&["domfsfreeze", "example"]);
    let frozen = oracle::digest(&image);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(oracle::digest(&image), frozen, "a frozen guest's disk changed");
    libvirt.virsh_ok(&["domfsthaw", "example"]);

    // By our command, through libvirt, which owns the agent's channel.
    let target = dir.path().join("snapshot.img");
    // A copy: the other user may not see into the build's directory.
    fs::copy(program("virtioblkctl"), home.join("virtioblkctl")).expect("room");
    let mut command = as_user(home, &path("virtioblkctl"));
    command.env("LIBVIRT_DEFAULT_URI", "qemu:///session");
    command.args(["snapshot", "--json", "--level", "filesystem", "--libvirt", "example", "--disk"]);
    command.arg(server.control()).arg("--to").arg(format!("copy:{}", target.display()));
    let taken = output(&mut command);
    let said = String::from_utf8_lossy(&taken.stderr).into_owned();
    assert!(taken.status.success(), "{}\n{said}", taken.status);
    let receipt: serde_json::Value = serde_json::from_slice(&taken.stdout).expect("a receipt");
    assert_eq!(receipt["level"], "filesystem", "{receipt}");
    assert_eq!(receipt["filesystems-frozen"], 1, "{receipt}");
    assert!(target.exists());
    let thawed = libvirt.virsh_ok(&["qemu-agent-command", "example", r#"{"execute":"guest-fsfreeze-status"}"#]);
    assert!(thawed.contains("thawed"), "{thawed}");

    // Suspended and resumed under load, and another disk comes and goes.
    for _ in 0..3 {
        libvirt.virsh_ok(&["suspend", "example"]);
        let paused = oracle::digest(&image);
        assert_eq!(oracle::dirty_pages(&image).unwrap_or(0), 0, "a suspended guest's disk is durable");
        assert_eq!(oracle::digest(&image), paused, "a suspended guest's disk changed");
        libvirt.virsh_ok(&["resume", "example"]);
    }
    libvirt.virsh_ok(&["attach-device", "example", &path("second.xml")]);
    wait_until("the second disk's driver is ready", || second.status()["driver-ready"] == true);
    assert!(libvirt.virsh_ok(&["domblklist", "example"]).contains("vdb"));
    libvirt.virsh_ok(&["detach-device", "example", &path("second.xml")]);
    wait_until("the second disk is gone", || second.status()["connected"] == false);

    libvirt.virsh_ok(&["destroy", "example"]);
    assert!(server.terminate().0.success());
    assert!(second.terminate().0.success());
}
