//! A real Ceph cluster, started by the tests themselves ([`Cluster`]), images in it ([`Image`]), and `virtioblkd` on them
//! ([`serve`]). Used by the tests in `tests/ceph`.
//!
//! A test program has one cluster, started when the first test asks for it. What runs it waits for the end of a pipe from
//! here, so it ends with this process, however that ends.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

use crate::guest::{Server, mortal, output, root, run, server::program, wait_until};

/// The pool that every cluster has.
pub const POOL: &str = "vms";
/// And a namespace in it.
pub const NAMESPACE: &str = "guests";

/// A cluster of one monitor and one OSD.
pub struct Cluster {
    runner: Child,
    dir: PathBuf,
    images: AtomicU32,
}

impl Cluster {
    /// This test program's own. Its tests run side by side: who stops, fills or fences something takes
    /// [`Cluster::start`].
    pub fn shared() -> &'static Cluster {
        static SHARED: OnceLock<Cluster> = OnceLock::new();
        SHARED.get_or_init(|| Cluster::start(&[]))
    }

    /// One more. `options`: of `ceph-cluster run`.
    pub fn start(options: &[&str]) -> Cluster {
        // A short name, as sockets below it have at most 107 bytes; whatever TMPDIR says.
        let dir = tempfile::Builder::new().prefix("ceph-").tempdir_in("/tmp").expect("a directory").keep();
        let mut runner = Command::new(root().join("scripts/ceph-cluster"));
        runner.arg("run").arg(&dir).args(options).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut runner = runner.spawn().expect("scripts/ceph-cluster");
        let mut ready = String::new();
        BufReader::new(runner.stdout.take().expect("piped")).read_line(&mut ready).expect("a word from ceph-cluster");
        assert_eq!(ready, "ready\n", "no cluster; 'make check-rbd' installs what it needs");
        let cluster = Cluster { runner, dir, images: AtomicU32::new(0) };
        cluster.ceph(&["osd", "pool", "create", POOL]);
        cluster.rbd(&["pool", "init", POOL]);
        cluster.rbd(&["namespace", "create", &format!("{POOL}/{NAMESPACE}")]);
        cluster
    }

    /// What `--ceph-conf` names.
    pub fn conf(&self) -> PathBuf {
        self.dir.join("ceph.conf")
    }

    /// Where the cluster keeps its things.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn command(&self, program: &str) -> Command {
        let mut command = mortal("timeout");
        command.args(["--signal", "KILL", "120", program, "-c"]).arg(self.conf());
        command
    }

    /// Runs `ceph`; panics if that fails. What it printed.
    pub fn ceph(&self, arguments: &[&str]) -> String {
        run(self.command("ceph").args(arguments))
    }

    /// Runs `rbd`; panics if that fails. What it printed.
    pub fn rbd(&self, arguments: &[&str]) -> String {
        run(self.command("rbd").args(arguments))
    }

    /// Runs `rbd`, whatever comes of it.
    pub fn try_rbd(&self, arguments: &[&str]) -> Output {
        output(self.command("rbd").args(arguments))
    }

    /// `rbd`, to be run by the caller: in the background, say.
    pub fn rbd_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.command("rbd");
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs a Python program with `rbd`, Ceph's own binding, and `io`, the pool, at hand. What it wrote.
    pub fn python(&self, program: &str, arguments: &[&str]) -> Vec<u8> {
        let program = format!(
            "import rados, rbd, sys\ncluster = rados.Rados(conffile={:?})\ncluster.connect()\nio = \
             cluster.open_ioctx({POOL:?})\n{program}",
            self.conf()
        );
        // Debian's own: another one would not have Debian's modules.
        let mut command = mortal("timeout");
        command.args(["--signal", "KILL", "120", "/usr/bin/python3", "-c", &program]).args(arguments);
        let output = output(&mut command);
        assert!(output.status.success(), "{program}\n{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    /// A new image of `size` bytes, whole MiB.
    pub fn image(&self, size: u64) -> Image<'_> {
        self.image_in(POOL, size, &[])
    }

    /// The same, in a pool or `pool/namespace`, with more options of `rbd create`.
    pub fn image_in(&self, place: &str, size: u64, options: &[&str]) -> Image<'_> {
        let number = self.images.fetch_add(1, Ordering::Relaxed);
        let image = Image { cluster: self, spec: format!("{place}/disk-{number}") };
        let size = format!("{}M", size >> 20);
        self.rbd(&[&["create", "--size", &size, &image.spec], options].concat());
        image
    }

    fn script(&self, command: &str) {
        run(Command::new("timeout")
            .args(["--signal", "KILL", "120"])
            .arg(root().join("scripts/ceph-cluster"))
            .arg(command)
            .arg(&self.dir));
    }

    /// Ends the OSD in order: it keeps what it stores.
    pub fn osd_down(&self) {
        self.script("osd-down");
    }

    /// Starts it again.
    pub fn osd_up(&self) {
        self.script("osd-up");
    }

    /// Makes the cluster full, or lets it have space again.
    pub fn full(&self, full: bool) {
        self.python(include_str!("../ceph/full.py"), &[&full.to_string(), POOL]);
    }

    /// Shuts out whoever has this image open (`ceph osd blocklist add`).
    pub fn fence(&self, image: &Image) {
        let status: Value =
            serde_json::from_str(&self.rbd(&["status", "--format", "json", &image.spec])).expect("JSON");
        let watchers = status["watchers"].as_array().expect("watchers");
        assert!(!watchers.is_empty(), "nobody has {} open", image.spec);
        for watcher in watchers {
            self.ceph(&["osd", "blocklist", "add", watcher["address"].as_str().expect("an address"), "600"]);
        }
    }

    /// Lets everybody in again.
    pub fn forgive(&self) {
        self.ceph(&["osd", "blocklist", "clear"]);
    }

    /// Asks a client of this cluster, by its process, on its admin socket. `prefix` is the command, such as `perf dump`.
    pub fn ask_client(&self, pid: u32, prefix: &str) -> Value {
        let infix = format!(".{pid}.");
        let mut socket = None;
        wait_until("the client has an admin socket", || {
            let entries = fs::read_dir(self.dir.join("run"))
                .expect("the run directory")
                .map(|entry| entry.expect("an entry").path());
            socket = entries.into_iter().find(|path| path.to_string_lossy().contains(&infix));
            socket.is_some()
        });
        let mut stream = UnixStream::connect(socket.expect("found")).expect("the admin socket");
        // A command ends with a zero byte, an answer begins with its length.
        stream.write_all(format!("{{\"prefix\": \"{prefix}\"}}\0").as_bytes()).expect("a command sent");
        let mut length = [0; 4];
        stream.read_exact(&mut length).expect("the answer's length");
        let mut answer = vec![0; u32::from_be_bytes(length) as usize];
        stream.read_exact(&mut answer).expect("the answer");
        serde_json::from_slice(&answer).expect("JSON")
    }

    /// A counter of a client's only image: of the group `librbd-…`, such as `flush`.
    pub fn image_counter(&self, pid: u32, counter: &str) -> u64 {
        let dump = self.ask_client(pid, "perf dump");
        let groups = dump.as_object().expect("groups");
        let image = groups.iter().find(|(name, _)| name.starts_with("librbd-")).expect("an open image").1;
        image[counter].as_u64().unwrap_or_else(|| panic!("no counter '{counter}' in {image}"))
    }

    /// Writes that a client sent to OSDs.
    pub fn osd_writes(&self, pid: u32) -> u64 {
        let dump = self.ask_client(pid, "perf dump");
        dump["objecter"]["osdop_write"].as_u64().expect("a number")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.runner.stdin.take());
        // It fails only if somebody else has reaped our child.
        let ended = self.runner.wait();
        assert!(std::thread::panicking() || ended.is_ok_and(|status| status.success()), "ceph-cluster failed to stop");
    }
}

/// An image, for as long as its cluster is there.
pub struct Image<'a> {
    pub cluster: &'a Cluster,
    /// `POOL[/NAMESPACE]/IMAGE`.
    pub spec: String,
}

impl Image<'_> {
    /// All of it, read by `rbd export`: past every cache of ours.
    pub fn content(&self) -> Vec<u8> {
        self.content_of(&self.spec)
    }

    /// All of a snapshot.
    pub fn snapshot(&self, name: &str) -> Vec<u8> {
        self.content_of(&self.at(name))
    }

    /// All of it in a snapshot of its group, which has another name here than there.
    pub fn snapshot_of_group(&self, name: &str) -> Vec<u8> {
        self.cluster.python(
            "image = rbd.Image(io, sys.argv[1], read_only=True)\n\
             ids = [s['id'] for s in image.list_snaps() if s.get('group', {}).get('snap_name') == sys.argv[2]]\n\
             image.set_snap_by_id(ids[0])\n\
             sys.stdout.buffer.write(image.read(0, image.size()))\n\
             image.close()",
            &[self.name(), name],
        )
    }

    fn content_of(&self, spec: &str) -> Vec<u8> {
        let output = self.cluster.try_rbd(&["export", "--no-progress", spec, "-"]);
        assert!(output.status.success(), "rbd export {spec}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    /// Its name without the pool.
    pub fn name(&self) -> &str {
        self.spec.rsplit_once('/').expect("POOL/IMAGE").1
    }

    /// The specification of a snapshot of it.
    pub fn at(&self, snapshot: &str) -> String {
        format!("{}@{snapshot}", self.spec)
    }

    /// `rbd snap create`, in a process of its own.
    pub fn take_snapshot(&self, name: &str, options: &[&str]) -> Output {
        self.cluster.try_rbd(&[&["snap", "create", "--no-progress", &self.at(name)], options].concat())
    }

    /// Sets an option in the image's own metadata.
    pub fn configure(&self, option: &str, value: &str) {
        self.cluster.rbd(&["config", "image", "set", &self.spec, option, value]);
    }
}

/// `virtioblkd` for an image, ready to be started with more options.
pub fn virtioblkd(cluster: &Cluster, spec: &str, mode: &str, socket: &Path, control: &Path) -> Command {
    let mut command = mortal(program("virtioblkd"));
    command.arg("--socket-path").arg(socket).arg("--control-path").arg(control);
    command.args(["--rbd", spec, "--cache", mode]).arg("--ceph-conf").arg(cluster.conf());
    command
}

/// Serves an image, and waits until it is served.
pub fn serve(image: &Image, mode: &str, more: &[&str]) -> Server {
    serve_spec(image.cluster, &image.spec, mode, more)
}

/// Serves what a specification names.
pub fn serve_spec(cluster: &Cluster, spec: &str, mode: &str, more: &[&str]) -> Server {
    Server::start_as(|socket, control| {
        let mut command = virtioblkd(cluster, spec, mode, socket, control);
        command.args(more);
        command
    })
    .once_serving()
}

/// Starts `virtioblkd` where it must refuse; what it said, and its exit status.
pub fn refused(cluster: &Cluster, spec: &str, mode: &str, more: &[&str]) -> String {
    let dir = tempfile::tempdir().expect("a directory for the sockets");
    let mut command = mortal("timeout");
    command.args(["--signal", "KILL", "100"]);
    let ours = virtioblkd(cluster, spec, mode, &dir.path().join("vhost"), &dir.path().join("control"));
    command.arg(ours.get_program()).args(ours.get_args()).args(more);
    let output = output(&mut command);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code().is_some_and(|code| code != 0 && code < 100), "{spec}: {}: {said}", output.status);
    said
}
