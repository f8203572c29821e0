//! QEMU: its command line by version, a running guest, and the talk with the job in it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::json;
use virtioblkd::engine::cache::CacheMode;

use super::initramfs::{append_program, initramfs};
use super::{Agent, Qmp, WAIT_TIMEOUT, accelerator, guest_files, mortal, root, run, wait_until};

/// How long a test waits for a line of a guest that says other lines meanwhile.
const MAX_WAIT: Duration = Duration::from_secs(600);

/// What the guest's kernel is told: quiet, and without the start-up work that is slow under TCG.
pub const KERNEL_OPTIONS: &str = "console=ttyS0 panic=-1 quiet mitigations=off no_timer_check tsc=reliable \
                              cryptomgr.notests random.trust_cpu=on job.tty=ttyS1";

/// A QEMU command line in the making.
pub struct Qemu {
    command: Command,
    dir: tempfile::TempDir,
    disks: usize,
}

impl Qemu {
    /// A q35 machine with shared memory (which vhost-user needs), a QMP socket and nothing else.
    pub fn new(accelerator: &str, mib: u32, cpus: u32) -> Qemu {
        Qemu::bare(accelerator, mib)
            // Where QEMU knows that there will never be a second CPU, TCG carries out locked instructions without the
            // lock. Linux has one for its full barrier; without it a guest misses an interrupt now and then, and its
            // disk stands still.
            .args(["-smp", &format!("{cpus},maxcpus={}", cpus.max(2))])
            .args(["-object", &format!("memory-backend-memfd,id=mem,size={mib}M,share=on")])
            .args(["-machine", "q35,memory-backend=mem"])
    }

    /// A machine with a QMP socket, whose memory and type are still to be given.
    pub fn bare(accelerator: &str, mib: u32) -> Qemu {
        let dir = tempfile::tempdir().expect("a directory for the guest");
        Qemu { command: mortal("qemu-system-x86_64"), dir, disks: 0 }
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
            .args(["-accel", accelerator, "-m", &format!("{mib}M")])
            .listen_for_qmp()
    }

    fn listen_for_qmp(self) -> Qemu {
        let socket = format!("unix:{},server=on,wait=off", self.dir.path().join("qmp").display());
        self.args(["-qmp", &socket])
    }

    /// More arguments, as they are.
    pub fn args<T: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = T>) -> Qemu {
        self.command.args(arguments);
        self
    }

    /// A disk that `virtioblkd` serves. `more` goes to the device, such as `,num-queues=4`.
    pub fn vhost_user_disk(mut self, socket: &Path, more: &str) -> Qemu {
        self.disks += 1;
        let id = format!("vu{}", self.disks);
        let reconnect = if version() >= (9, 2) { "reconnect-ms=200" } else { "reconnect=1" };
        let chardev = format!("socket,id={id},path={},{reconnect}", socket.display());
        let device = format!("vhost-user-blk-pci,id=disk{},chardev={id},bootindex={}{more}", self.disks, self.disks);
        self.args(["-chardev", &chardev, "-device", &device])
    }

    /// A disk that QEMU serves by itself in the same mode: what ours is compared with. Threads, so that strace sees
    /// what it does.
    pub fn own_disk(mut self, image: &Path, mode: CacheMode) -> Qemu {
        self.disks += 1;
        let id = format!("own{}", self.disks);
        let drive = format!("if=none,id={id},format=raw,aio=threads,cache={mode},file={}", image.display());
        self.args(["-drive", &drive, "-device", &format!("virtio-blk-pci,drive={id}")])
    }

    /// The channel of the guest's agent, a socket that [`Vm::agent`] talks to.
    pub fn agent_channel(self) -> Qemu {
        let chardev = format!("socket,id=qga,path={},server=on,wait=off", self.dir.path().join("qga").display());
        let port = "virtserialport,chardev=qga,name=org.qemu.guest_agent.0";
        self.args(["-chardev", &chardev, "-device", "virtio-serial-pci", "-device", port])
    }

    /// A kernel and an [`initramfs`] that runs `job`.
    pub fn linux(self, job: &str, image: &str) -> Qemu {
        self.boot(&initramfs(job, image))
    }

    /// The same, with programs of this machine and their libraries in the guest's `/bin`: (name, path).
    pub fn linux_with_programs(self, job: &str, image: &str, programs: &[(&str, PathBuf)]) -> Qemu {
        let mut initramfs = initramfs(job, image);
        for (name, program) in programs {
            append_program(&mut initramfs, name, program, self.dir.path());
        }
        self.boot(&initramfs)
    }

    /// A kernel and this initramfs.
    pub fn boot(self, initramfs: &[u8]) -> Qemu {
        let files = guest_files();
        let path = self.dir.path().join("initramfs");
        fs::write(&path, initramfs).expect("room for an initramfs");
        let console = format!("file:{}", self.dir.path().join("console").display());
        self.args(["-kernel".as_ref(), files.join("vmlinuz").as_os_str()])
            .args(["-initrd".as_ref(), path.as_os_str()])
            .args(["-append", KERNEL_OPTIONS, "-serial", &console, "-serial", "stdio"])
    }

    /// Runs it.
    pub fn start(self) -> Vm {
        Vm::start_in(self.command, self.dir)
    }

    /// Runs a guest of [`linux_with_agent`] and waits until it takes orders.
    pub fn start_shell(self) -> Vm {
        let mut vm = self.start();
        // What a terminal gets before somebody reads it is lost.
        vm.until_line("@@ready");
        vm
    }
}

/// A running guest, killed when dropped.
pub struct Vm {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    said: Vec<String>,
    dir: tempfile::TempDir,
}

impl Vm {
    /// Runs any command that becomes a QEMU, whose standard output is the job's line.
    pub fn start(command: Command) -> Vm {
        Vm::start_in(command, tempfile::tempdir().expect("a directory for the guest"))
    }

    fn start_in(mut command: Command, dir: tempfile::TempDir) -> Vm {
        let log = File::create(dir.path().join("qemu.log")).expect("a log");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().expect("qemu-system-x86_64 starts; 'make deps' installs it");
        let stdin = child.stdin.take().expect("piped");
        let (lines_to, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        std::thread::spawn(move || {
            // The end of the pipe, and a receiver that has gone, both mean that nobody is left to talk with.
            for line in stdout.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                if lines_to.send(line).is_err() {
                    return;
                }
            }
        });
        Vm { child, stdin, lines, said: Vec::new(), dir }
    }

    /// QEMU's monitor. One client at a time.
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.dir.path().join("qmp"))
    }

    /// The QEMU process (or the program that runs it).
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the job asks `word` (see `ask` in the guest's init). Returns what it printed since the last time.
    pub fn until_asked(&mut self, word: &str) -> Vec<String> {
        self.until(&format!("@@ask {word}"))
    }

    /// Lets the job go on after [`Vm::until_asked`].
    pub fn go(&mut self) {
        self.stdin.write_all(b"go\n").expect("QEMU reads its standard input");
    }

    /// Runs a line of shell in a guest of [`linux_with_agent`]; panics if it fails. Returns what it printed.
    pub fn sh(&mut self, line: &str) -> Vec<String> {
        let (status, said) = self.try_sh(line);
        assert_eq!(status, "0", "the guest's '{line}' failed and said {said:?}");
        said
    }

    /// The same; returns the exit status, too.
    pub fn try_sh(&mut self, line: &str) -> (String, Vec<String>) {
        assert!(!line.contains('\n') && line.len() < 4000, "one line, and no longer than a terminal takes: {line}");
        self.stdin.write_all(format!("{line}\n").as_bytes()).expect("QEMU reads its standard input");
        let mut said = self.until_line("@@status ");
        let last = said.pop().expect("until_line returns the line it found");
        (last.trim_start_matches("@@status ").to_owned(), said)
    }

    /// The socket of the guest's agent.
    pub fn agent_socket(&self) -> PathBuf {
        self.dir.path().join("qga")
    }

    /// The guest's agent. It has room for one client at a time: drop it before somebody else's turn.
    pub fn agent(&self) -> Agent {
        Agent::connect(&self.agent_socket())
    }

    /// Waits for the job's next line that starts with `start`; the lines before it, and it, are returned.
    pub fn until_line(&mut self, start: &str) -> Vec<String> {
        let (mut lines, end) = (Vec::new(), Instant::now() + MAX_WAIT);
        loop {
            let line = self.next_line(start);
            assert!(Instant::now() < end, "the guest said other things for {MAX_WAIT:?}, not '{start}'");
            let found = line.starts_with(start);
            assert!(found || !line.starts_with("@@exit"), "the job ended before '{start}': {:?}", self.said);
            lines.push(line);
            if found {
                return lines;
            }
        }
    }

    /// The job's next line that starts with `start`, if it was said by now; does not wait.
    pub fn said_so_far(&mut self, start: &str) -> Option<String> {
        while let Ok(line) = self.lines.try_recv() {
            self.said.push(line.clone());
            assert!(!line.starts_with("@@exit"), "the job ended before '{start}': {:?}", self.said);
            if line.starts_with(start) {
                return Some(line);
            }
        }
        None
    }

    /// Waits for the job to end well and for QEMU to be gone. Returns what the job printed since the last time.
    pub fn finish(mut self) -> Vec<String> {
        let lines = self.until("@@exit 0");
        let status = self.wait();
        assert!(status.success(), "QEMU: {status}");
        lines
    }

    /// Waits until QEMU is gone.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("QEMU ends", || {
            status = self.child.try_wait().expect("our own child");
            status.is_some()
        });
        status.expect("ended")
    }

    fn until(&mut self, wanted: &str) -> Vec<String> {
        let mut lines = self.until_line("@@");
        let last = lines.pop().expect("until_line returns the line it found");
        assert_eq!(last, wanted, "the job said before: {:?}", self.said);
        lines
    }

    fn next_line(&mut self, waiting_for: &str) -> String {
        let line = match self.lines.recv_timeout(WAIT_TIMEOUT) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                panic!("the guest said nothing for {WAIT_TIMEOUT:?}, not '{waiting_for}'")
            }
            Err(RecvTimeoutError::Disconnected) => panic!("QEMU ended before the guest said '{waiting_for}'"),
        };
        self.said.push(line.clone());
        line
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Both fail only if the process is gone and reaped, which is what we want.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            for name in ["qemu.log", "console"] {
                let text = fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
                eprintln!("--- {name}:\n{text}");
            }
            eprintln!("--- the job said:\n{}", self.said.join("\n"));
        }
    }
}

/// The shell functions of a guest that does what [`Vm::sh`] tells it; the last part of its job.
pub const SHELL: &str = include_str!("../../guest/shell.sh");

/// What became of a guest that is only a boot sector (`bootsector.S`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All sectors written, read back and equal.
    Good,
    /// INT 13h refused a write.
    WriteFailed,
    /// INT 13h refused a read.
    ReadFailed,
    /// A sector came back different.
    Differs,
}

/// Writes the boot sector into the first sector of `image`.
pub fn install_boot_sector(image: &Path) {
    use std::os::unix::fs::FileExt;
    static SECTOR: OnceLock<Vec<u8>> = OnceLock::new();
    let sector = SECTOR.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory for the assembler");
        let (object, sector) = (dir.path().join("o"), dir.path().join("sector"));
        run(Command::new("as").args(["--32", "-o"]).arg(&object).arg(root().join("tests/kit/guest/bootsector.S")));
        let link = ["-m", "elf_i386", "-Ttext", "0x7c00", "-e", "start", "--oformat", "binary", "-o"];
        run(Command::new("ld").args(link).arg(&sector).arg(&object));
        fs::read(&sector).expect("what ld wrote")
    });
    assert_eq!(sector.len(), 512);
    let image = File::options().write(true).open(image).expect("the image can be written");
    image.write_all_at(sector, 0).expect("the image can be written");
}

/// Where the boot sector says its verdict.
pub const BOOT_SECTOR_DEVICES: [&str; 4] =
    ["-chardev", "stdio,id=out", "-device", "isa-debugcon,iobase=0xe9,chardev=out"];

/// Boots the boot sector on the disk behind `socket` and waits for its verdict. The guest stays, connected and idle,
/// until the [`Vm`] is dropped. Always TCG: SeaBIOS needs no faster one.
pub fn boot_sector(socket: &Path) -> (Verdict, Vm) {
    boot_sector_in(Qemu::new("tcg", 32, 1).vhost_user_disk(socket, ",num-queues=1").args(BOOT_SECTOR_DEVICES).start())
}

/// The verdict of a boot sector that was started by hand.
pub fn boot_sector_in(mut vm: Vm) -> (Verdict, Vm) {
    let verdict = match vm.next_line("a verdict").as_str() {
        "G" => Verdict::Good,
        "W" => Verdict::WriteFailed,
        "R" => Verdict::ReadFailed,
        "D" => Verdict::Differs,
        other => panic!("the boot sector said '{other}'"),
    };
    (verdict, vm)
}

/// How often the guest of [`fsync_job`] writes and fsyncs.
pub const FSYNCS: u64 = 16;

/// A job that shows the disk's cache and size, and what the commands `show` print of it in its sysfs directory. Then it
/// writes one block, `block N` over and over, and fsyncs it, [`FSYNCS`] times. It asks `before` and `after` that.
pub fn fsync_job(show: &str) -> String {
    format!(
        r#"
cd /sys/block/vda
echo "cache: $(cat queue/write_cache)"
echo "bytes: $(($(cat size) * 512))"
{show}
ask before
for block in $(seq 1 {FSYNCS}); do
    yes "block $block" | head -c 4096 >/tmp/block
    dd if=/tmp/block of=/dev/vda bs=4k seek=$block count=1 conv=notrunc,fsync 2>/tmp/error || {{ cat /tmp/error; exit 1; }}
done
ask after
"#
    )
}

/// A guest for Linux jobs, with the accelerator that works here.
pub fn linux(cpus: u32, job: &str) -> Qemu {
    Qemu::new(accelerator(), 256, cpus).linux(job, "initramfs.cpio")
}

/// The same with fio and the guest agent.
pub fn linux_full(cpus: u32, job: &str) -> Qemu {
    Qemu::new(accelerator(), 768, cpus).linux(job, "initramfs-full.cpio")
}

/// The same, and it does what [`Vm::sh`] tells it: what shell.sh defines, and `functions`. Start it with
/// [`Qemu::start_shell`].
pub fn linux_full_shell(cpus: u32, functions: &str) -> Qemu {
    linux_full(cpus, &format!("{functions}\n{}", SHELL))
}

/// A guest with its agent (not started) and Python, which does what [`Vm::sh`] tells it: what shell.sh defines, and
/// `functions`. Start it with [`Qemu::start_shell`].
pub fn linux_with_agent(functions: &str) -> Qemu {
    linux_shell(1, functions).agent_channel()
}

/// The same on so many CPUs and without the agent's channel.
pub fn linux_shell(cpus: u32, functions: &str) -> Qemu {
    let job = format!("{functions}\n{}", SHELL);
    Qemu::new(accelerator(), 384, cpus).linux(&job, "initramfs-agent.cpio")
}

/// Sends the guest of this monitor to `uri`, at so many bytes a second, and waits until it has left.
pub fn migrate(monitor: &mut Qmp, bandwidth: u64, uri: &str) {
    limit_migration(monitor, bandwidth, 2000);
    monitor.execute("migrate", json!({"uri": uri}));
    wait_until("the guest has left", || has_left(monitor));
}

/// Bytes a second, and the milliseconds that the guest may stand still for the last of them.
pub fn limit_migration(monitor: &mut Qmp, bandwidth: u64, downtime: u64) {
    monitor.execute("migrate-set-parameters", json!({"max-bandwidth": bandwidth, "downtime-limit": downtime}));
}

/// Whether the guest of this monitor has moved.
pub fn has_left(monitor: &mut Qmp) -> bool {
    let status = monitor.execute("query-migrate", json!({}));
    assert_ne!(status["status"], "failed", "{status}");
    status["status"] == "completed"
}

/// QEMU's version, major and minor. Its options differ: `reconnect-ms` is from 9.2 on.
pub fn version() -> (u32, u32) {
    static VERSION: OnceLock<(u32, u32)> = OnceLock::new();
    *VERSION.get_or_init(|| {
        let text = run(Command::new("qemu-system-x86_64").arg("--version"));
        let mut numbers = text.split_whitespace().nth(3).expect("QEMU emulator version X").split('.');
        let mut number = || numbers.next().and_then(|text| text.parse().ok()).expect("a version number");
        (number(), number())
    })
}
