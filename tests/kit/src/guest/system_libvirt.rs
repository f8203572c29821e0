//! A libvirtd as root starts it, with hooks, on what looks like a machine of its own: namespaces of mounts and processes, and
//! private directories in the place of libvirt's and ours. Process 1 is a shell, or a real systemd. The machine's own libvirt
//! and systemd, if it has them, are not touched.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};

use rustix::process::geteuid;

use super::booted_systemd::BootedSystemd;
use super::{WAIT_TIMEOUT, output, tell, wait_until};
use crate::programs;

/// Each of our files and directories, and where a machine sees it.
pub(super) type Mounts = Vec<(String, &'static str)>;

/// What lies where on the machine that the daemon sees: a directory of ours for each of these.
const DIRECTORIES: [(&str, &str); 7] = [
    ("etc", "/etc/libvirt"),
    ("run", "/run/libvirt"),
    ("lib", "/var/lib/libvirt"),
    ("log", "/var/log/libvirt"),
    ("sockets", "/run/virtioblkd"),
    ("disks", "/run/virtioblkd-libvirt"),
    ("logs", "/var/log/virtioblkd"),
];

/// The user id of `virtioblkd` on this machine, whatever the real one has.
pub const DAEMON_USER: u32 = 64990;

/// Process 1 of the namespace: it starts and kills libvirtd as it is told on its standard input, and reaps what loses its
/// parent. At the end of its input it ends, and all others with it.
const INIT: &str = r#"
mount -t proc proc /proc
while read -r word; do
    case $word in
    start) "$1" -f /etc/libvirt/libvirtd.conf -p "$2/libvirtd.pid" >>"$2/libvirtd.log" 2>&1 & daemon=$! ;;
    kill) kill -9 "$daemon"; wait "$daemon" 2>/dev/null ;;
    esac
    echo done
done
"#;

/// A libvirtd of root's and the directories that it and our hook use. All its processes end when it is dropped.
pub struct SystemLibvirt {
    machine: Machine,
    daemon: &'static str,
    home: tempfile::TempDir,
}

/// What the daemon runs on.
enum Machine {
    /// Process 1 is [`INIT`].
    Unshared { init: Child, words: ChildStdin, replies: BufReader<std::process::ChildStdout> },
    /// Process 1 is systemd.
    Booted(BootedSystemd),
}

impl SystemLibvirt {
    /// With our hook installed. `number` tells the machines of one test apart. `None`, said aloud, where libvirt is not
    /// installed or we are not root.
    pub fn start(number: u8) -> Option<SystemLibvirt> {
        let (daemon, home, mounts) = prepare(number)?;
        let mut script: String = mounts
            .iter()
            .map(|(ours, theirs)| format!("[ -e {theirs} ] || mkdir -p {theirs}; mount --bind {ours} {theirs}\n"))
            .collect();
        // On a machine that systemd runs, the hook would ask it to start daemons, outside of this one.
        script += "[ ! -d /run/systemd ] || mount -t tmpfs none /run/systemd\n";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--uts", "--pid", "--fork", "--kill-child", "--propagation", "private", "bash", "-c"]);
        command.arg(format!("hostname machine{number}\n{script}{INIT}")).arg("init").arg(daemon).arg(home.path());
        let mut init = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("unshare runs");
        let words = init.stdin.take().expect("a pipe");
        let replies = BufReader::new(init.stdout.take().expect("a pipe"));
        let mut libvirt = SystemLibvirt { machine: Machine::Unshared { init, words, replies }, daemon, home };
        libvirt.start_daemon();
        Some(libvirt)
    }

    /// The same on a machine that systemd runs. `None`, said aloud, where none can be booted, too.
    pub fn start_on_systemd(number: u8) -> Option<SystemLibvirt> {
        SystemLibvirt::start_on_systemd_with(number, &[])
    }

    /// The same on a machine that has these directories of ours, too, at the same paths.
    pub fn start_on_systemd_with(number: u8, shared: &[&Path]) -> Option<SystemLibvirt> {
        let (daemon, home, mounts) = prepare(number)?;
        let systemd = BootedSystemd::boot(&format!("machine{number}"), home.path(), shared, &mounts)?;
        let mut libvirt = SystemLibvirt { machine: Machine::Booted(systemd), daemon, home };
        libvirt.start_daemon();
        Some(libvirt)
    }

    /// The same without our hook, without the users that [`prepare`] makes, and without a libvirtd that runs. Our programs are
    /// in /usr/local/bin.
    pub fn boot(number: u8) -> Option<SystemLibvirt> {
        let (daemon, home, mut mounts) = prepare(number)?;
        fs::remove_dir_all(home.path().join("etc/hooks")).expect("ours");
        mounts.retain(|(_, theirs)| !matches!(*theirs, "/etc/passwd" | "/etc/group"));
        let programs = home.path().join("bin");
        fs::create_dir(&programs).expect("room");
        for program in [programs::virtioblkd(), programs::virtioblkctl()] {
            symlink(&program, programs.join(program.file_name().expect("a program"))).expect("room");
        }
        mounts.push((programs.display().to_string(), "/usr/local/bin"));
        let systemd = BootedSystemd::boot(&format!("machine{number}"), home.path(), &[], &mounts)?;
        Some(SystemLibvirt { machine: Machine::Booted(systemd), daemon, home })
    }

    fn say(&mut self, word: &str) {
        match &mut self.machine {
            Machine::Unshared { words, replies, .. } => {
                writeln!(words, "{word}").expect("init listens");
                let mut reply = String::new();
                replies.read_line(&mut reply).expect("init replies");
                assert_eq!(reply, "done\n");
            }
            Machine::Booted(systemd) if word == "start" => systemd.start_libvirtd(self.daemon, self.home.path()),
            Machine::Booted(systemd) => systemd.kill_libvirtd(),
        }
    }

    /// Starts libvirtd, which is not running, and waits until it answers.
    pub fn start_daemon(&mut self) {
        self.say("start");
        wait_until("libvirtd answers", || self.virsh(&["version"]).status.success());
    }

    /// SIGKILL for libvirtd alone.
    pub fn kill_daemon(&mut self) {
        self.say("kill");
    }

    /// A program on this machine, as root.
    pub fn inside(&self, program: impl AsRef<OsStr>) -> Command {
        match &self.machine {
            Machine::Booted(systemd) => systemd.inside(program),
            Machine::Unshared { init, .. } => {
                let namespace = |kind: &str| format!("/proc/{}/ns/{kind}", init.id());
                let mut command = Command::new("nsenter");
                command.arg(format!("--mount={}", namespace("mnt")));
                command.arg(format!("--pid={}", namespace("pid_for_children"))).arg("--").arg(program);
                command
            }
        }
    }

    /// Where all its files are; QEMU, another user, may read them.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// Where a socket of this machine's /run/virtioblkd is on ours.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.home().join("sockets").join(name)
    }

    /// What a client calls this daemon.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.home().join("run/libvirt-sock").display())
    }

    /// virsh, for so long as a test is patient.
    pub fn virsh(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("timeout");
        command.args([&WAIT_TIMEOUT.as_secs().to_string(), "virsh", "-q", "-c", &self.uri()]).args(arguments);
        output(&mut command)
    }

    /// The same; panics if it fails. Returns what it printed.
    pub fn virsh_ok(&self, arguments: &[&str]) -> String {
        let output = self.virsh(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "virsh {arguments:?}: {}\n{stderr}", output.status);
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    }

    /// Writes a file for the daemon, its QEMU or virsh; returns its path.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.home().join(name);
        fs::write(&path, content).expect("room");
        path.to_str().expect("a plain path").to_owned()
    }

    /// The names of what the hook and its daemons have left in /run and keep there.
    pub fn left(&self) -> Vec<String> {
        let names = |directory: &str| {
            let entries = fs::read_dir(self.home().join(directory)).expect("ours");
            entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
        };
        let mut names = [names("sockets"), names("disks")].concat();
        names.sort();
        names
    }
}

impl Drop for SystemLibvirt {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = fs::read_dir(self.home().join("logs")).into_iter().flatten().flatten().map(|entry| entry.path());
            for log in logs.chain([self.home().join("libvirtd.log"), self.home().join("log/qemu/example.log")]) {
                let text = fs::read(&log).unwrap_or_default();
                eprintln!("--- {}:\n{}", log.display(), String::from_utf8_lossy(&text));
            }
        }
        if let Machine::Unshared { init, .. } = &mut self.machine {
            let _ = init.kill();
            let _ = init.wait();
        }
    }
}

/// Makes the files of a machine. Returns libvirtd, the directory of all files, and what lies where: our file or directory,
/// and the place where the machine sees it.
fn prepare(number: u8) -> Option<(&'static str, tempfile::TempDir, Mounts)> {
    let daemon = ["/usr/sbin/libvirtd", "/usr/bin/libvirtd"].into_iter().find(|path| Path::new(path).exists());
    let Some(daemon) = daemon.filter(|_| geteuid().is_root()) else {
        tell("SKIPPED: no libvirtd, or not root: libvirt's hook was not tried");
        return None;
    };
    let home = tempfile::tempdir().expect("a home");
    let path = home.path();
    // libvirt's QEMU is another user, whose files and sockets lie in here.
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("ours");
    let own = |name: &str| path.join(name).display().to_string();
    let mut mounts = Mounts::new();
    for (ours, theirs) in DIRECTORIES {
        fs::create_dir(path.join(ours)).expect("room");
        mounts.push((own(ours), theirs));
    }
    // What libvirt asks each QEMU once, which takes seconds, is asked once for all tests.
    let cache = programs::target_dir().join("libvirt-cache");
    fs::create_dir_all(&cache).expect("room");
    mounts.push((cache.display().to_string(), "/var/cache/libvirt"));
    // libvirt resolves its host's name, which must not wait for the network.
    fs::write(path.join("hosts"), format!("127.0.0.1 localhost machine{number}\n")).expect("room");
    mounts.push((own("hosts"), "/etc/hosts"));
    // The users that packages make: that of the hook's daemons, and libvirt's of QEMU, without which libvirtd does not
    // start; Debian 12's libvirt-daemon leaves it to another package.
    for (name, theirs, ours, qemu) in [
        (
            "passwd",
            "/etc/passwd",
            format!("virtioblkd:x:{DAEMON_USER}:{DAEMON_USER}::/:/usr/sbin/nologin"),
            "libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin",
        ),
        ("group", "/etc/group", format!("virtioblkd:x:{DAEMON_USER}:"), "libvirt-qemu:x:64055:"),
    ] {
        let all = fs::read_to_string(theirs).expect("every machine has users");
        let mut lines: Vec<&str> = all.lines().filter(|line| !line.starts_with("virtioblkd:")).collect();
        lines.push(&ours);
        if !lines.iter().any(|line| line.starts_with("libvirt-qemu:")) {
            lines.push(qemu);
        }
        fs::write(path.join(name), lines.join("\n") + "\n").expect("room");
        mounts.push((own(name), theirs));
    }
    let hooks = path.join("etc/hooks/qemu.d");
    fs::create_dir_all(&hooks).expect("room");
    symlink(programs::virtioblkctl(), hooks.join("50-virtioblkd")).expect("room");
    let uuid = format!("host_uuid = \"1d4cbb2e-64a3-4f6c-9e6b-0000000001{number:02x}\"\nauth_unix_rw = \"none\"\n");
    fs::write(path.join("etc/libvirtd.conf"), uuid).expect("room");
    let qemu = "stdio_handler = \"file\"\nsecurity_driver = \"none\"\nnamespaces = []\ncgroup_controllers = []\n";
    fs::write(path.join("etc/qemu.conf"), qemu).expect("room");
    Some((daemon, home, mounts))
}
