//! The shipped domain on a real libvirt: defined, started, suspended while its disk is held, resumed, destroyed.
//!
//! A libvirtd of our own in private directories, as an unprivileged user's session daemon: the machine's own libvirt,
//! if it has one, is not touched. Said aloud and skipped where libvirt is not installed.

mod guest;

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use guest::qemu::install_boot_sector;
use guest::{Qmp, Server, oracle, output, root, scratch, sparse_image, tell, wait_until};
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
