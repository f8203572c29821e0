//! The cloud-disk story with real guests: a program writes a file, the disk is snapshotted, another machine boots with
//! the snapshot. What is in the file? The same at each level, as a table. (`make demo-snapshot` shows it.)

mod guest;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use guest::qemu::Vm;
use guest::server::program;
use guest::{Server, output, qemu, run, scratch, sparse_image, tell, wait_until};
use serde_json::Value;
use virtioblkd::engine::cache::CacheMode;

const MIB: u64 = 1 << 20;

/// How each row writes: the file's name, what the reader is told, whether a power cut may lose it.
const ROWS: [(&str, &str, bool); 6] = [
    ("echo", "echo hello >file", true),
    ("vim", "as vim saves: new file, fsync, rename over the old", false),
    ("python", "Python: f.write(); f.close()", true),
    ("python-fsync", "Python: f.write(); f.flush(); os.fsync(f)", false),
    ("dd-fsync", "dd conv=fsync", false),
    ("database", "a database that still holds it in its own memory", true),
];

/// The guest's agent on its channel, and the hook that the application level runs: a stand-in for a database, which
/// writes out what it holds in memory when it is told that a freeze comes.
const AGENT: &str = r#"
mkdir -p /run /etc/qemu /var
ln -sfn /run /var/run
cat >/etc/qemu/fsfreeze-hook <<'HOOK'
#!/bin/sh
[ "$1" != freeze ] || [ ! -e /tmp/database.memory ] || cp /tmp/database.memory /mnt/database
HOOK
chmod +x /etc/qemu/fsfreeze-hook
agent() {
	until port=$(ls /sys/class/virtio-ports 2>/dev/null) && [ -n "$port" ]; do sleep 0.1; done
	qemu-ga -m virtio-serial -p "/dev/$port" -t /run "$@" >/tmp/agent.log 2>&1 &
}
"#;

/// VM A. Nothing is written back by itself within the test: ext4 commits and the kernel flushes every ten minutes.
const WRITER: &str = r#"
mkfs.ext4 -q /dev/vda && mount -t ext4 -o commit=600 /dev/vda /mnt || exit 1
echo 60000 >/proc/sys/vm/dirty_expire_centisecs
echo 60000 >/proc/sys/vm/dirty_writeback_centisecs
echo old >/mnt/vim
sync
echo hello >/mnt/dd-source; dd if=/mnt/dd-source of=/mnt/dd-fsync conv=fsync 2>/dev/null
dd if=/mnt/dd-source of=/mnt/.vim.new conv=fsync 2>/dev/null && mv /mnt/.vim.new /mnt/vim
/usr/bin/python3 -I -S -c '
import os
f = open("/mnt/python-fsync", "w"); f.write("hello\n"); f.flush(); os.fsync(f); f.close()
d = os.open("/mnt", os.O_RDONLY); os.fsync(d)
f = open("/mnt/python", "w"); f.write("hello\n"); f.close()
' || exit 1
echo hello >/mnt/echo
echo hello >/tmp/database.memory
"#;

/// VM B: what is there?
const READER: &str = r#"
mount -t ext4 -o ro,noload /dev/vda /mnt && umount /mnt
mount -t ext4 /dev/vda /mnt || exit 1
for f in echo vim python python-fsync dd-fsync database; do
	if [ ! -e /mnt/$f ]; then echo "@$f lost"
	elif [ ! -s /mnt/$f ]; then echo "@$f empty"
	else echo "@$f $(head -n 1 /mnt/$f)"; fi
done
umount /mnt
"#;

/// A writable guest whose agent listens on the returned socket.
fn guest_with_agent(server: &Server, job: &str) -> (Vm, PathBuf) {
    let socket = server.socket().with_file_name("agent");
    let chardev = format!("socket,id=qga,path={},server=on,wait=off", socket.display());
    let vm = qemu::linux_full(1, job)
        .vhost_user_disk(&server.socket(), "")
        .args(["-device", "virtio-serial-pci", "-chardev", &chardev])
        .args(["-device", "virtserialport,chardev=qga,name=org.qemu.guest_agent.0"])
        .start();
    (vm, socket)
}

fn snapshot(server: &Server, arguments: &[&str]) -> Output {
    let mut command = Command::new(program("virtioblkctl"));
    output(command.arg("snapshot").arg("--disk").arg(server.control()).arg("--json").args(arguments))
}

fn receipt(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{stderr}", output.status);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("no receipt: {error}\n{stderr}"))
}

/// What VM B finds, in the order of [`ROWS`].
fn boot_with(image: &Path) -> Vec<String> {
    let vm = qemu::linux(1, READER).own_disk(image, CacheMode::Writeback).start();
    let lines = vm.finish();
    ROWS.iter()
        .map(|(file, ..)| {
            let start = format!("@{file} ");
            let line = lines.iter().find_map(|line| line.strip_prefix(&start));
            line.unwrap_or_else(|| panic!("VM B says nothing of {file}: {lines:?}")).to_owned()
        })
        .collect()
}

/// The journal replays and then nothing is wrong.
fn check_filesystem(image: &Path) {
    let e2fsck = ["/usr/sbin/e2fsck", "/sbin/e2fsck"].into_iter().find(|path| Path::new(path).exists());
    let e2fsck = e2fsck.expect("e2fsck of e2fsprogs");
    let replayed = output(Command::new(e2fsck).arg("-p").arg(image));
    assert!(matches!(replayed.status.code(), Some(0 | 1)), "{}", String::from_utf8_lossy(&replayed.stdout));
    run(Command::new(e2fsck).arg("-fn").arg(image));
}

#[test]
fn the_cloud_disk_story() {
    let dir = scratch();
    let image = sparse_image(dir.path(), 64 * MIB);
    let server = Server::start(&image, CacheMode::None, &[]);
    // The agent runs its hooks at every freeze if it has them: it gets them only for the application level.
    let job = format!(
        "{AGENT}{WRITER}agent\nask snapshots\nkill $!; wait $!\nagent -F/etc/qemu/fsfreeze-hook\nask hooked\n\
         echo more >/mnt/more; sync\n"
    );
    let (mut vm, agent) = guest_with_agent(&server, &job);
    vm.until_asked("snapshots");
    let agent = agent.to_str().expect("a plain path");

    let mut columns = Vec::new();
    let levels: [(&str, &[&str]); 3] =
        [("crash", &[]), ("filesystem", &["--qga", agent]), ("application", &["--qga", agent])];
    for (level, more) in levels {
        let target = dir.path().join(format!("{level}.img"));
        let way = format!("copy:{}", target.display());
        let mut arguments = vec!["--level", level, "--to", &way];
        arguments.extend(more);
        if level == "application" {
            vm.go();
            vm.until_asked("hooked");
            let hooks = dir.path().join("hooks");
            write_hooks(&hooks);
            arguments.extend(["--hooks", hooks.to_str().expect("a plain path")]);
            let receipt = receipt(&snapshot(&server, &arguments));
            assert_eq!(receipt["level"], "application", "{receipt}");
        } else {
            let receipt = receipt(&snapshot(&server, &arguments));
            assert_eq!(receipt["level"], level, "{receipt}");
            assert_eq!(receipt["filesystems-frozen"].as_u64().unwrap_or(0) > 0, level != "crash", "{receipt}");
        }
        columns.push((level, target));
    }
    // Thawed, and goes on.
    vm.go();
    vm.finish();
    assert!(server.terminate().0.success());

    let found: Vec<(&str, Vec<String>)> = columns
        .iter()
        .map(|(level, target)| {
            let found = boot_with(target);
            check_filesystem(target);
            (*level, found)
        })
        .collect();
    tell(&table(&found));
    for (row, (file, _, losable)) in ROWS.iter().enumerate() {
        let at = |column: usize| found[column].1[row].as_str();
        if *losable {
            assert_ne!(at(0), "hello", "crash: {file} was nowhere but in the guest's memory: the test proves nothing");
        } else {
            assert_eq!(at(0), "hello", "crash: {file} was fsynced");
        }
        assert_eq!(at(2), "hello", "application: {file}");
        let told = if *file == "database" { "lost" } else { "hello" };
        assert_eq!(at(1), told, "filesystem: {file}");
    }
}

/// Host hooks that say that they were called. (The database's own hook is in the guest.)
fn write_hooks(dir: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir(dir).expect("a directory for hooks");
    for name in ["freeze", "thaw"] {
        let path = dir.join(name);
        std::fs::write(&path, "#!/bin/sh\nexit 0\n").expect("a hook");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("an executable hook");
    }
}

fn table(found: &[(&str, Vec<String>)]) -> String {
    let mut text = format!("\nWhat VM B finds in the snapshot:\n\n{:<54}", "VM A wrote the file this way");
    for (level, _) in found {
        text += &format!("{level:<14}");
    }
    for (row, (_, how, _)) in ROWS.iter().enumerate() {
        text += &format!("\n{how:<54}");
        for (_, words) in found {
            let word = if words[row] == "hello" { "there" } else { &words[row] };
            text += &format!("{word:<14}");
        }
    }
    text + "\n\ne2fsck: clean in all of them, after the journal was replayed\n"
}

#[test]
fn an_agent_that_dies_during_the_freeze_leaves_a_running_guest_and_no_snapshot() {
    let dir = scratch();
    let image = sparse_image(dir.path(), 64 * MIB);
    let server = Server::start(&image, CacheMode::None, &[]);
    // The hook kills the agent that called it.
    let job = format!(
        "{AGENT}mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt || exit 1\n\
         printf '#!/bin/sh\\nkill -9 $PPID; sleep 1\\n' >/etc/qemu/fsfreeze-hook\n\
         agent -F/etc/qemu/fsfreeze-hook\nask now\necho x >/mnt/x; sync; echo @synced\n"
    );
    let (mut vm, agent) = guest_with_agent(&server, &job);
    vm.until_asked("now");
    let target = dir.path().join("snapshot.img");
    let way = format!("copy:{}", target.display());
    let agent = agent.to_str().expect("a plain path");
    let output = snapshot(&server, &["--level", "filesystem", "--qga", agent, "--freeze-timeout", "3s", "--to", &way]);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!target.exists());
    wait_until("the disk is resumed", || server.status()["quiesce"]["state"] == "open");
    vm.go();
    vm.until_line("@synced");
    vm.finish();
}

#[test]
fn a_guest_that_somebody_else_froze_is_left_alone() {
    let dir = scratch();
    let image = sparse_image(dir.path(), 64 * MIB);
    let server = Server::start(&image, CacheMode::None, &[]);
    let job = format!(
        "{AGENT}mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt || exit 1\n\
         rm /etc/qemu/fsfreeze-hook\nagent\nask now\n\
         (echo x >/mnt/x; sync; echo @synced) &\nask thawed\nwait $!\n"
    );
    let (mut vm, agent) = guest_with_agent(&server, &job);
    vm.until_asked("now");
    // Frozen by a client of the test's own, which then hangs up, as a backup tool that died would.
    let answer = ask_agent(&agent, r#"{"execute":"guest-fsfreeze-freeze"}"#);
    assert_eq!(answer["return"], 1, "{answer}");
    let target = dir.path().join("snapshot.img");
    let way = format!("copy:{}", target.display());
    let path = agent.to_str().expect("a plain path");
    let output = snapshot(&server, &["--level", "filesystem", "--qga", path, "--to", &way]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("frozen"), "{said}");
    assert!(!target.exists());
    let status = ask_agent(&agent, r#"{"execute":"guest-fsfreeze-status"}"#);
    assert_eq!(status["return"], "frozen", "not ours to thaw");
    ask_agent(&agent, r#"{"execute":"guest-fsfreeze-thaw"}"#);
    vm.go();
    vm.until_line("@synced");
    vm.go();
    vm.finish();
}

/// One command to the agent, after a delimited sync.
fn ask_agent(socket: &Path, command: &str) -> Value {
    use std::io::{BufRead, BufReader, Write};
    let stream = std::os::unix::net::UnixStream::connect(socket).expect("the agent's socket");
    stream.set_read_timeout(Some(std::time::Duration::from_secs(5))).expect("a timeout");
    let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
    let mut writer = stream;
    writer.write_all(b"\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":4711}}\n").expect("sent");
    let mut skipped = Vec::new();
    reader.read_until(0xff, &mut skipped).expect("a sync");
    let mut line = String::new();
    reader.read_line(&mut line).expect("a sync");
    assert!(line.contains("4711"), "{line}");
    writeln!(writer, "{command}").expect("sent");
    line.clear();
    reader.read_line(&mut line).expect("an answer");
    serde_json::from_str(&line).expect("JSON")
}
