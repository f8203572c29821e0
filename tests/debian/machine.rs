//! A machine that runs in a container, and a guest of it: a front-end in this process.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use kit::front_end::{ALL, FrontEnd};
use kit::guest::tell;
use kit::programs;

/// How long one step may take on a loaded machine.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(120);
/// VIRTIO_BLK_T_OUT, and VIRTIO_BLK_S_OK.
const OUT: u32 = 1;
const OK: u8 = 0;

/// One machine at a time: each installs and boots a whole system.
static ONE: Mutex<()> = Mutex::new(());

/// A running Debian. Dropping it ends it.
pub struct Machine {
    script: Child,
    leader: String,
    _one: MutexGuard<'static, ()>,
}

impl Machine {
    /// Boots Debian `suite`. With `prefix` our programs are installed there. `packages`: a directory that the machine sees as
    /// /packages. `None`: that is not possible here, which is said.
    pub fn boot(suite: &str, prefix: Option<&str>, packages: Option<&Path>) -> Option<Machine> {
        if !rustix::process::geteuid().is_root() {
            tell("SKIPPED: not root: no Debian machine can be booted");
            return None;
        }
        if Command::new("systemd-nspawn").arg("--version").output().is_err() {
            tell(
                "SKIPPED: systemd-nspawn is not installed (apt install systemd-container): no Debian machine can be booted",
            );
            return None;
        }
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut command = Command::new(programs::root().join("scripts/debian-machine"));
        command.arg(suite).args(prefix).stdin(Stdio::null()).stdout(Stdio::piped());
        command.env("VIRTIOBLKD_BIN_DIR", programs::virtioblkd().parent().expect("a directory"));
        command.env("CARGO_TARGET_DIR", programs::target_dir());
        command.envs(packages.map(|packages| ("VIRTIOBLKD_PACKAGES", packages)));
        let mut script = command.spawn().expect("the script starts");
        let mut line = String::new();
        BufReader::new(script.stdout.take().expect("piped")).read_line(&mut line).expect("text");
        let Some(leader) = line.trim().strip_prefix("leader ") else {
            let status = script.wait().expect("it ends");
            panic!("no machine was booted ({status}): the lines above say why");
        };
        let machine = Machine { leader: leader.to_owned(), script, _one: one };
        machine.wait_until("systemd has started", |machine| {
            let state = machine.run("systemctl is-system-running");
            ["running", "degraded"].contains(&String::from_utf8_lossy(&state.stdout).trim())
        });
        Some(machine)
    }

    /// Runs a shell command in the machine as root.
    pub fn run(&self, command: &str) -> Output {
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["--target", &self.leader, "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--"]);
        nsenter.args(["/usr/bin/env", "-i", "HOME=/root", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"]);
        nsenter.arg("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        nsenter.args(["sh", "-c", command]).stdin(Stdio::null()).output().expect("nsenter")
    }

    /// Runs a command that must succeed. Returns its output.
    pub fn ok(&self, command: &str) -> String {
        let output = self.run(command);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{command}: {}\n{text}{error}\n{}", output.status, self.journal());
        text
    }

    /// What systemd's journal has of our units.
    pub fn journal(&self) -> String {
        String::from_utf8_lossy(&self.run("journalctl --no-pager -o cat -u 'virtioblk*' | tail -n 60").stdout)
            .into_owned()
    }

    /// Waits until the condition holds.
    pub fn wait_until(&self, what: &str, condition: impl Fn(&Machine) -> bool) {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        while !condition(self) {
            assert!(Instant::now() < deadline, "not in time: {what}\n{}", self.journal());
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// A property of a unit.
    pub fn property(&self, unit: &str, name: &str) -> String {
        self.ok(&format!("systemctl show --value -p {name} {unit}")).trim().to_owned()
    }

    /// A path of the machine, as this process sees it.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.leader))
    }

    /// Makes an image, and the configuration file of the disk `name` with these further lines.
    pub fn describe_disk(&self, name: &str, more: &str) {
        self.ok(&format!(
            "mkdir -p /images && truncate -s 16M /images/{name}.raw && setfacl -m u:virtioblkd:rw /images/{name}.raw &&
             cat >/etc/virtioblkd/{name}.toml <<'END'\nsocket-path = \"/run/virtioblkd/{name}.sock\"\nsocket-group = \"kvm\"\n\
             blk-file = \"/images/{name}.raw\"\ncontrol-path = \"/run/virtioblkd/{name}.ctl\"\n{more}\nEND\n"
        ));
    }

    /// Connects a front-end to the disk `name`.
    pub fn guest(&self, name: &str) -> FrontEnd {
        FrontEnd::connect(&self.path(&format!("/run/virtioblkd/{name}.sock")), 1, 64, ALL)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The script removes the machine's files when it is ended.
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.script),
            rustix::process::Signal::TERM,
        );
        let _ = self.script.wait();
    }
}

/// Writes to the disk while `act` runs. Every write must succeed, and at least one must begin after `act` has ended. Returns
/// how many there were.
pub fn while_writing(guest: FrontEnd, act: impl FnOnce()) -> (FrontEnd, usize) {
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut guest = guest;
            let mut writes = 0;
            loop {
                let is_last = ended.load(Ordering::SeqCst);
                guest.add(0, OUT, (writes % 1000) * 8, &[writes as u8; 4096], 0);
                guest.kick(0);
                let (_, status) = guest.wait(0);
                assert_eq!(status, OK, "write {writes}");
                writes += 1;
                if is_last {
                    return (guest, writes as usize);
                }
            }
        });
        // The writer ends also if `act` fails.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        ended.store(true, Ordering::SeqCst);
        let written = writer.join().expect("every write succeeds");
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
        written
    })
}
