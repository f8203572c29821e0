//! A machine whose process 1 is a real systemd: systemd-nspawn boots this machine's own programs (`/usr`) on an otherwise empty
//! root in memory.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{output, tell};
use crate::programs;

/// How long a machine may take to boot before the test is skipped: where none can be booted, systemd-nspawn may say so, or
/// nothing.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);

/// systemd and all that it starts. It ends when dropped.
pub struct BootedSystemd {
    nspawn: Child,
    /// Process 1, as this machine sees it.
    leader: u32,
    /// Control groups of its own: two systemds in one would end each other's units.
    groups: Vec<PathBuf>,
}

/// Where this machine's hierarchies of control groups may be that systemd uses.
const HIERARCHIES: [&str; 3] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"];

/// Makes a control group in each hierarchy.
fn make_groups(name: &str) -> Vec<PathBuf> {
    let hierarchies = HIERARCHIES.iter().map(Path::new).filter(|path| path.join("cgroup.procs").exists());
    let groups = hierarchies.map(|path| path.join(name));
    groups.filter(|group| fs::create_dir(group).is_ok()).collect()
}

/// Removes a control group and those in it.
fn remove_group(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_group(&entry.path());
        }
    }
    // One that has processes stays.
    let _ = fs::remove_dir(group);
}

/// Enters the groups of `$GROUPS_OF_MACHINE` and becomes the machine. If this process is killed, SIGTERM has systemd-nspawn
/// shut the machine down.
const ENTER: &str = "for group in $GROUPS_OF_MACHINE; do echo $$ > $group/cgroup.procs; done; \
     exec setpriv --pdeathsig TERM systemd-nspawn \"$@\"";

impl BootedSystemd {
    /// `home` and `shared`: directories that both machines have. `mounts`: our file or directory, and where the machine sees
    /// it. `None`, said aloud, where no systemd can be booted.
    pub fn boot(name: &str, home: &Path, shared: &[&Path], mounts: &[(String, &'static str)]) -> Option<BootedSystemd> {
        let log = fs::File::create(home.join("nspawn.log")).expect("room");
        let name = format!("{name}-{}", std::process::id());
        let groups = make_groups(&format!("virtioblkd-{name}"));
        let listed: Vec<String> = groups.iter().map(|group| group.display().to_string()).collect();
        let mut command = Command::new("sh");
        command.env("GROUPS_OF_MACHINE", listed.join(" ")).args(["-c", ENTER, "sh"]);
        // The daemon has filters of its own, which are tried here, too.
        command.env("SYSTEMD_SECCOMP", "0").args(["--quiet", "--directory=/", "--volatile=yes", "--register=no"]);
        command.args(["--keep-unit", "--console=pipe", "--private-network", "--capability=all", "--link-journal=no"]);
        command.args(["--resolv-conf=off", "--timezone=off", &format!("--machine={name}")]);
        for shared in [home, programs::target_dir(), programs::root()].iter().chain(shared) {
            command.arg(format!("--bind={}", shared.display()));
        }
        for (ours, theirs) in mounts {
            command.arg(format!("--bind={ours}:{theirs}"));
        }
        // At its first boot, systemd would enable all services that the machine has, such as libvirt's sockets.
        let id = home.join("machine-id");
        fs::write(&id, "6fd1f7a24c0b4e0f8a651a3c0d2e9b11\n").expect("room");
        command.arg(format!("--bind={}:/etc/machine-id", id.display()));
        command.args(["--", "/usr/lib/systemd/systemd", "--unit=basic.target"]);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("ours")).stderr(log);
        let mut machine = BootedSystemd { nspawn: command.spawn().expect("a shell"), leader: 0, groups };
        let deadline = Instant::now() + BOOT_TIMEOUT;
        while !machine.is_booted() {
            let has_ended = machine.nspawn.try_wait().expect("ours").is_some();
            if has_ended || Instant::now() >= deadline {
                let said = fs::read_to_string(home.join("nspawn.log")).unwrap_or_default();
                tell(&format!(
                    "SKIPPED: no systemd can be booted here (Debian: systemd-container), so daemons were not tried as its units: {said}"
                ));
                return None;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Some(machine)
    }

    fn is_booted(&mut self) -> bool {
        let own = self.nspawn.id();
        let children = fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default();
        let is_systemd =
            |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "systemd\n");
        let leader = children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(is_systemd);
        self.leader = leader.unwrap_or(0);
        self.leader != 0 && output(self.inside("systemctl").args(["is-active", "basic.target"])).status.success()
    }

    /// A program on this machine, as root.
    pub fn inside(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.leader.to_string(), "--mount", "--pid", "--uts", "--ipc", "--net", "--"]);
        command.arg(program);
        command
    }

    /// Starts libvirtd as its own unit does.
    pub fn start_libvirtd(&self, daemon: &str, home: &Path) {
        let mut command = self.inside("systemd-run");
        command.args(["--quiet", "--unit=tested-libvirtd", "--service-type=exec", "--property=KillMode=process"]);
        command.arg(format!("--property=StandardError=append:{}/libvirtd.log", home.display()));
        command.args([daemon, "-f", "/etc/libvirt/libvirtd.conf", "-p"]).arg(home.join("libvirtd.pid"));
        let started = output(&mut command);
        assert!(started.status.success(), "{started:?}");
    }

    /// SIGKILL for libvirtd alone.
    pub fn kill_libvirtd(&self) {
        let killed =
            output(self.inside("systemctl").args(["kill", "--kill-who=main", "--signal=KILL", "tested-libvirtd"]));
        assert!(killed.status.success(), "{killed:?}");
        super::wait_until("libvirtd has ended", || {
            !output(self.inside("systemctl").args(["is-active", "tested-libvirtd"])).status.success()
        });
        // So that it can be started again.
        output(self.inside("systemctl").args(["reset-failed", "tested-libvirtd"]));
    }
}

impl Drop for BootedSystemd {
    fn drop(&mut self) {
        // All processes of a namespace end with its first.
        if let Some(leader) = rustix::process::Pid::from_raw(self.leader as i32) {
            let _ = rustix::process::kill_process(leader, rustix::process::Signal::KILL);
        }
        let _ = self.nspawn.kill();
        let _ = self.nspawn.wait();
        // The last processes of a machine end a moment after its first.
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.groups.iter().any(|group| group.exists()) && Instant::now() < deadline {
            self.groups.iter().for_each(|group| remove_group(group));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
