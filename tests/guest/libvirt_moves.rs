//! Guests that libvirt saves, restores and moves to another host, under load: its own commands on the disk that we ship
//! for it. The disk is durable when the guest is away, the image's locks go along, and what a read stored in the guest's
//! memory arrives, to the byte (without the kernel's `init_on_alloc`, see `migration.rs`).
//! Said aloud and skipped where libvirt is not installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kit::guest;
use kit::guest::ledger::{self, Ledger};
use kit::guest::libvirt::{DOMAIN, Libvirt, disk_xml, server_for_all};
use kit::guest::{Qmp, Server, oracle, output, run, scratch, wait_until};
use serde_json::json;
use virtioblkd::engine::cache::CacheMode;

const MIB: u64 = 1 << 20;
const IMAGE: u64 = 16 * MIB;

/// Two ledgers; the upper half of the disk is read into the page cache, looked at more than once, dropped and read
/// again: some of it is read before the guest goes away and looked at when it is back.
const JOB: &str = r#"
agent
# Else the last reader's close would drop the page cache.
exec 3</dev/vda
wanted=$(dd if=/dev/vda bs=1M skip=8 iflag=direct 2>/dev/null | md5sum)
( first=8
  while [ ! -e /tmp/stop ]; do
    echo 1 >/proc/sys/vm/drop_caches
    # Now the one half first and now the other, so that a page seldom gets what it had: one that is not sent is seen.
    dd if=/dev/vda bs=1M skip=$first count=4 of=/dev/null 2>/dev/null
    first=$((20 - first))
    for n in 1 2 3; do
        found=$(dd if=/dev/vda bs=1M skip=8 2>/dev/null | md5sum)
        [ "$found" = "$wanted" ] || { echo "@@exit: what is cached differs"; exit 1; }
        sleep 0.2
    done
    echo "@looked"
  done ) &
looks=$!
until [ -e /tmp/stop ]; do sleep 0.1; done
wait $looks || exit 1
for pid in $kept; do wait "$pid" || exit 1; done
echo "@sum $(sha256sum </dev/vda)"
"#;

/// The domain, wherever it is, and what is known of its disk.
struct Guest {
    image: PathBuf,
    ledgers: [Ledger; 2],
    /// The host on which it begins and ends; its job's words are there wherever it runs.
    home: Libvirt,
    _dir: tempfile::TempDir,
}

impl Guest {
    /// An image whose upper half has no page like another, and a job's worth of load on it.
    fn new(home: Libvirt) -> Guest {
        let dir = scratch();
        let image = dir.path().join("disk.img");
        let words = (0..IMAGE / 8).map(|n| if n < IMAGE / 16 { 0 } else { n.wrapping_mul(0x9e37_79b9_7f4a_7c15) });
        fs::write(&image, words.flat_map(u64::to_le_bytes).collect::<Vec<u8>>()).expect("room");
        let ledgers = [("a", 0), ("b", ledger::SIZE)].map(|(name, at)| Ledger::new(name, "/dev/vda", at));
        Guest { image, ledgers, home, _dir: dir }
    }

    fn domain(&mut self, server: &Server) -> String {
        let load: Vec<String> = self.ledgers.iter_mut().map(Ledger::line).collect();
        let job = format!("{}\n{}\n{JOB}", include_str!("life.sh"), load.join("\n"));
        self.home.linux(&job, "init_on_alloc=0", &disk_xml(&server.socket(), "vda"))
    }

    /// Defines and starts it at home, on a server of its own, and waits until it is at work.
    fn starts(&mut self, mode: CacheMode) -> Server {
        let server = server_for_all(&self.image, mode, &IN_USE);
        let xml = self.domain(&server);
        self.home.virsh_ok(&["define", &self.home.file("linux.xml", &xml)]);
        self.home.virsh_ok(&["start", DOMAIN]);
        self.goes_on();
        server
    }

    /// It writes, and looks at what it read before.
    fn goes_on(&self) {
        self.home.until_said("@kept a", 3);
        self.home.until_said("@kept b", 3);
        self.home.until_said("@looked", 1);
    }

    /// All that it said to have kept is in the image.
    fn kept(&mut self) {
        let said = self.home.said();
        for ledger in &mut self.ledgers {
            ledger.hear(&said);
            assert!(ledger.check(&self.image) > 0);
        }
    }

    /// Nothing of it is only in the host's memory, and nobody uses it.
    fn is_away(&mut self, server: &Server) {
        assert_eq!(server.status()["connected"], false);
        assert_eq!(oracle::dirty_pages(&self.image).unwrap_or(0), 0, "the disk of a guest that is away is durable");
        self.kept();
    }

    /// Its job ends well, and the guest has the host's bytes.
    fn ends(mut self, server: Server) -> Libvirt {
        self.home.agent(r#"{"execute":"guest-file-open","arguments":{"path":"/tmp/stop","mode":"w"}}"#);
        wait_until("the job has ended", || self.home.said().last().is_some_and(|line| line == "@@exit 0"));
        self.kept();
        let sum = format!("@sum {}  -", oracle::digest(&self.image));
        assert!(self.home.said().contains(&sum), "the guest reads another disk than {sum}");
        assert_eq!(server.total("errors"), 0);
        let (status, log) = server.terminate();
        assert!(status.success(), "{status}\n{log}");
        self.home
    }
}

/// A daemon that could take the image away from its guest is refused.
fn is_locked(image: &Path) {
    let dir = tempfile::tempdir().expect("a directory");
    let mut third = Command::new(guest::server::program("virtioblkd"));
    third.args(["--socket-path".as_ref(), dir.path().join("third").as_os_str(), "--blk-file".as_ref()]).arg(image);
    let third = output(&mut third);
    assert_eq!(third.status.code(), Some(1), "{third:?}");
    assert!(String::from_utf8_lossy(&third.stderr).contains("another process uses the image"), "{third:?}");
}

const IN_USE: [&str; 2] = ["--locking", "in-use"];

/// The domain as it is, for another server of its disk.
fn elsewhere(libvirt: &Libvirt, from: &Server, to: &Server) -> String {
    let xml = libvirt.virsh_ok(&["dumpxml", "--migratable", DOMAIN]);
    let path = |server: &Server| server.socket().to_str().expect("a plain path").to_owned();
    assert!(xml.contains(&path(from)), "{xml}");
    libvirt.file("elsewhere.xml", xml.replace(&path(from), &path(to)))
}

#[test]
fn a_domain_is_saved_and_restored_with_its_server_and_with_another() {
    let Some(libvirt) = Libvirt::start() else { return };
    let mut guest = Guest::new(libvirt);
    let server = guest.starts(CacheMode::Writeback);

    guest.home.virsh_ok(&["managedsave", DOMAIN]);
    guest.is_away(&server);
    guest.home.virsh_ok(&["start", DOMAIN]);
    guest.goes_on();

    // The next server is there before the first has gone, as after a save for another host.
    let next = server_for_all(&guest.image, CacheMode::Writeback, &IN_USE);
    is_locked(&guest.image);
    let elsewhere = elsewhere(&guest.home, &server, &next);
    let saved = guest.home.home().join("saved");
    let saved = saved.to_str().expect("a plain path");
    guest.home.virsh_ok(&["save", DOMAIN, saved]);
    guest.is_away(&server);
    guest.home.virsh_ok(&["restore", saved, "--xml", &elsewhere]);
    guest.goes_on();
    is_locked(&guest.image);
    assert_eq!(server.status()["connected"], false);
    assert!(server.terminate().0.success());
    let libvirt = guest.ends(next);
    libvirt.virsh_ok(&["undefine", DOMAIN]);
}

/// MiB/s: most of what the guest reads meanwhile it reads after the page was sent once. On a machine too busy for that
/// the guest is stopped in the end.
const SLOWLY: [&str; 5] = ["--bandwidth", "40", "--timeout", "60", "--timeout-suspend"];

/// What an operator types, but for the host's name.
fn migration(from: &Libvirt, to: &Libvirt, server: &Server, next: &Server) -> Command {
    let elsewhere = elsewhere(from, server, next);
    let way = format!("unix://{}", to.home().join("way").display());
    let mut command = from.command("virsh");
    command.args(["migrate", "--live", "--persistent", "--undefinesource", "--xml", &elsewhere]);
    command.args(["--persistent-xml", &elsewhere, "--migrateuri", &way, DOMAIN, &to.uri()]);
    command
}

#[test]
fn a_domain_migrates_to_another_host_and_back() {
    let Some(here) = Libvirt::start_as_host(1) else { return };
    let Some(there) = Libvirt::start_as_host(2) else { return };
    let mut guest = Guest::new(here);
    let server = guest.starts(CacheMode::None);

    let next = server_for_all(&guest.image, CacheMode::None, &IN_USE);
    // Given up on the way, it goes on where it is, though the other server has the image open.
    let mut given_up = migration(&guest.home, &there, &server, &next);
    let given_up = given_up.args(["--bandwidth", "1"]).stdout(Stdio::null()).stderr(Stdio::piped());
    let given_up = given_up.spawn().expect("virsh starts");
    wait_until("it is on its way", || guest.home.virsh_ok(&["domjobinfo", DOMAIN]).contains("Memory processed"));
    guest.home.virsh_ok(&["domjobabort", DOMAIN]);
    let said = given_up.wait_with_output().expect("our own child");
    assert!(String::from_utf8_lossy(&said.stderr).contains("canceled by client"), "{said:?}");
    guest.goes_on();
    is_locked(&guest.image);

    run(migration(&guest.home, &there, &server, &next).args(SLOWLY));
    guest.goes_on();
    is_locked(&guest.image);
    assert_eq!(there.virsh_ok(&["domstate", DOMAIN]), "running");
    assert_eq!(server.status()["connected"], false);
    // What its guest writes now cannot be held from where it was.
    let refused = server.ctl(&["--json", "quiesce"]);
    assert!(String::from_utf8_lossy(&refused.stdout).contains("\"not-ours\""), "{refused:?}");
    // Back to the server that it came from, while an operator holds the disk: it does not change before he lets it go.
    let mut operator = Qmp::connect(&next.control());
    let held = operator.execute("quiesce", json!({"timeout-ms": 60_000, "lease-ms": 600_000}));
    let digest = oracle::digest(&guest.image);
    run(migration(&there, &guest.home, &next, &server).args(SLOWLY));
    wait_until("the guest waits for its image", || server.status()["trouble"] == "not-ours");
    assert_eq!(oracle::digest(&guest.image), digest, "a guest that moved away wrote to a held disk");
    operator.execute("resume", json!({"token": held["token"]}));
    guest.goes_on();
    is_locked(&guest.image);
    assert_eq!(next.status()["connected"], false);
    assert!(next.terminate().0.success());
    let libvirt = guest.ends(server);
    libvirt.virsh_ok(&["undefine", DOMAIN]);
}
