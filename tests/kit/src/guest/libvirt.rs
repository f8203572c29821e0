//! A libvirtd of our own, in private directories, as an unprivileged user's session daemon (the machine's own libvirt,
//! if it has one, is not touched), and a Linux domain for it.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::geteuid;
use virtioblkd::engine::cache::CacheMode;

use super::{Server, WAIT_TIMEOUT, guest_files, initramfs, output, qemu, root, tell, wait_until};

/// "nobody": libvirt's privileged daemon wants the whole machine, its session daemon does not.
const NOBODY: u32 = 65534;
/// What every domain of these tests is called.
pub const DOMAIN: &str = "example";

/// A libvirtd and the directories that it believes to be a user's home. Killed when dropped.
pub struct Libvirt {
    daemon: Child,
    home: tempfile::TempDir,
}

impl Libvirt {
    /// `None`, said aloud, where libvirt is not installed.
    pub fn start() -> Option<Libvirt> {
        Libvirt::start_with("")
    }

    /// One that believes to be on a machine of its own, so that guests may migrate to it and from it. `number` tells
    /// these machines apart.
    pub fn start_as_host(number: u8) -> Option<Libvirt> {
        Libvirt::start_with(&format!("host_uuid = \"1d4cbb2e-64a3-4f6c-9e6b-0000000000{number:02x}\"\n"))
    }

    /// `configuration`: of the daemon, libvirtd.conf.
    fn start_with(configuration: &str) -> Option<Libvirt> {
        let daemon = ["/usr/sbin/libvirtd", "/usr/bin/libvirtd"].into_iter().find(|path| Path::new(path).exists());
        let found = daemon.filter(|_| Command::new("virsh").arg("--version").output().is_ok());
        let Some(daemon) = found else {
            tell("SKIPPED: libvirt is not installed: nothing was tried with it");
            return None;
        };
        // Short: sockets live in it.
        let home = tempfile::tempdir().expect("a home");
        let directory = home.path().join("libvirt");
        fs::create_dir(&directory).expect("room");
        fs::write(directory.join("libvirtd.conf"), configuration).expect("room");
        // No virtlogd.
        fs::write(directory.join("qemu.conf"), "stdio_handler = \"file\"\n").expect("room");
        if geteuid().is_root() {
            for path in [home.path(), &directory] {
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

    /// Where its user's files are; QEMU, which runs as that user, may read and write here.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// What another client calls this daemon.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///session?socket={}", self.home().join("libvirt/libvirt-sock").display())
    }

    pub fn virsh(&self, arguments: &[&str]) -> Output {
        output(self.command("virsh").arg("-q").args(arguments))
    }

    /// The same; panics if it fails. Returns what it printed.
    pub fn virsh_ok(&self, arguments: &[&str]) -> String {
        let output = self.virsh(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "virsh {arguments:?}: {}\n{stderr}", output.status);
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    }

    /// A program as the user whose daemon this is, for so long as a test is patient: what waits for a QEMU that cannot
    /// connect to its disk waits for ever.
    pub fn command(&self, program: &str) -> Command {
        let mut command = as_user(self.home(), "timeout");
        command.env("LIBVIRT_DEFAULT_URI", "qemu:///session").args([&WAIT_TIMEOUT.as_secs().to_string(), program]);
        command
    }

    /// Writes a file for the daemon, its QEMU or virsh; returns its path.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.home().join(name);
        fs::write(&path, content).expect("room");
        path.to_str().expect("a plain path").to_owned()
    }

    /// The description of a Linux domain that runs `job`, with this `<disk>`. What the job says goes into
    /// [`Libvirt::said`]; it may start the guest's agent (`agent`).
    pub fn linux(&self, job: &str, options: &str, disk: &str) -> String {
        linux_domain(self.home(), job, options, disk)
    }

    /// Asks the guest's agent, which may have yet to start.
    pub fn agent(&self, command: &str) -> String {
        let mut reply = None;
        wait_until("the agent answers", || {
            let output = self.virsh(&["qemu-agent-command", DOMAIN, command]);
            reply = output.status.success().then_some(output.stdout);
            reply.is_some()
        });
        String::from_utf8(reply.expect("answered")).expect("text")
    }

    /// All that the job of [`Libvirt::linux`] said so far, on this host and those that the guest moved to. It must not
    /// have ended badly.
    pub fn said(&self) -> Vec<String> {
        let text = fs::read(self.home().join("job")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines: Vec<String> = whole.lines().map(|line| line.trim_end_matches('\r').to_owned()).collect();
        let failed = lines.iter().find(|line| line.starts_with("@@exit") && *line != "@@exit 0");
        assert_eq!(failed, None, "the job said {lines:?}");
        lines
    }

    /// Waits until the job has said so many more lines that start so.
    pub fn until_said(&self, start: &str, more: usize) {
        let count = || self.said().iter().filter(|line| line.starts_with(start)).count();
        let before = count();
        wait_until(&format!("the guest says '{start}'"), || count() >= before + more);
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        // QEMU outlives libvirtd, so the domain goes first; there may be none.
        let _ = self.virsh(&["destroy", DOMAIN]);
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        if std::thread::panicking() {
            for log in ["libvirtd.log", ".cache/libvirt/qemu/log/example.log", "console", "job"] {
                let text = fs::read(self.home.path().join(log)).unwrap_or_default();
                eprintln!("--- {log}:\n{}", String::from_utf8_lossy(&text));
            }
        }
    }
}

/// The description of a Linux domain that runs `job` and has these devices, and its files in `home`. What the job says goes
/// into the file `job` there.
pub fn linux_domain(home: &Path, job: &str, options: &str, devices: &str) -> String {
    fs::copy(guest_files().join("vmlinuz"), home.join("vmlinuz")).expect("room");
    let initramfs = initramfs::initramfs(&format!("{AGENT}\n{job}"), "initramfs-agent.cpio");
    fs::write(home.join("initramfs"), initramfs).expect("room");
    LINUX
        .replace("@HOME@", home.to_str().expect("a plain path"))
        .replace("@OPTIONS@", &format!("{} {options}", qemu::KERNEL_OPTIONS))
        .replace("@DISK@", devices)
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

/// A file of those that we ship for libvirt.
pub fn shipped(name: &str) -> String {
    fs::read_to_string(root().join("qemu-configs/libvirt").join(name)).expect("shipped")
}

/// The shipped `<disk>` for another socket and name.
pub fn disk_xml(socket: &Path, target: &str) -> String {
    shipped("disk.xml")
        .replace("/run/virtioblkd/example.sock", socket.to_str().expect("a plain path"))
        .replace("dev='vda'", &format!("dev='{target}'"))
}

/// A server whose sockets the other user may open.
pub fn server_for_all(image: &Path, mode: CacheMode, more: &[&str]) -> Server {
    let modes = ["--socket-mode", "0666", "--control-mode", "0666"];
    let server = Server::start(image, mode, &[&modes, more].concat());
    let sockets: PathBuf = server.socket().parent().expect("a directory").to_owned();
    fs::set_permissions(&sockets, fs::Permissions::from_mode(0o755)).expect("ours");
    server
}

/// A Linux with the guest agent on libvirt's own channel, and a place to plug another disk in.
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
    <serial type='file'><source path='@HOME@/console' append='on'/><target port='0'/></serial>
    <serial type='file'><source path='@HOME@/job' append='on'/><target port='1'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
  </devices>
</domain>
"#;

/// `agent`: starts it as a service would.
const AGENT: &str = r#"
agent() {
    mkdir -p /run /var /etc/qemu
    ln -sfn /run /var/run
    until port=$(ls /sys/class/virtio-ports 2>/dev/null) && [ -n "$port" ]; do sleep 0.1; done
    qemu-ga -m virtio-serial -p "/dev/$port" -t /run &
}
"#;
