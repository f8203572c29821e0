//! A librados and a librbd without a cluster, compiled here: images in memory that do on request what a cluster cannot
//! be made to do.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use virtioblkd::backend::rbd::{OpenError, RbdBackend, RbdOptions};
use virtioblkd::engine::CacheMode;

use crate::wait::wait_until;

/// The directory that holds both libraries. `old`: as of a Ceph that asks nobody before a snapshot.
pub fn libraries(old: bool) -> &'static Path {
    static BUILT: [OnceLock<PathBuf>; 2] = [OnceLock::new(), OnceLock::new()];
    BUILT[usize::from(old)].get_or_init(|| build(old))
}

fn build(old: bool) -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("rbd_stub");
    let dir = crate::programs::target_dir().join("tmp").join(if old { "ceph-stub-old" } else { "ceph-stub" });
    std::fs::create_dir_all(&dir).expect("a directory");
    for (library, files) in [("librados.so.2", &["librados.c"][..]), ("librbd.so.1", &["librbd.c", "control.c"])] {
        // Several test programs may do this at once: each puts a whole file in its place.
        let made = dir.join(format!("{library}.{}", std::process::id()));
        let mut cc = Command::new("cc");
        cc.args(["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]);
        cc.args(old.then_some("-DOLD")).arg("-o").arg(&made);
        let status = cc.args(files.iter().map(|file| sources.join(file))).status().expect("cc starts");
        assert!(status.success(), "{library} was not built");
        std::fs::rename(&made, dir.join(library)).expect("the same directory");
    }
    dir
}

/// One image of the stub, and where it takes orders.
pub struct Stub {
    /// How it is opened.
    pub options: RbdOptions,
    control: PathBuf,
    _dir: tempfile::TempDir,
}

impl Stub {
    /// An image of 8 MiB that nobody used before.
    pub fn new(mode: CacheMode) -> Stub {
        static IMAGES: AtomicU32 = AtomicU32::new(0);
        let dir = tempfile::tempdir().expect("a directory");
        let control = dir.path().join("stub");
        let name = format!("pool/image {}", IMAGES.fetch_add(1, Ordering::Relaxed));
        let mut options = RbdOptions::new(name.parse().expect("a name"), mode);
        options.library_path = Some(libraries(false).to_path_buf());
        let mut stub = Stub { options, control: control.clone(), _dir: dir };
        stub.set("stub_control", control.to_str().expect("text"));
        stub
    }

    /// An option of librbd's, or of the stub's.
    pub fn set(&mut self, name: &str, value: &str) -> &mut Self {
        self.options.options.push((name.into(), value.into()));
        self
    }

    pub fn open(&self) -> RbdBackend {
        self.try_open().unwrap_or_else(|error| panic!("{error}"))
    }

    /// Opens the image once it is closed: a thread that tries to take the lock keeps it open for a moment longer than its
    /// back-end.
    pub fn try_open(&self) -> Result<RbdBackend, OpenError> {
        wait_until("the image is closed", || !self.control.exists());
        RbdBackend::open(&self.options)
    }

    /// Gives an order to the open image; its answer.
    pub fn tell(&self, order: &str) -> String {
        let mut stream = UnixStream::connect(&self.control).expect("the image is open");
        writeln!(stream, "{order}").expect("an order");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    }

    /// How often something was done; see `counts` in control.c.
    pub fn count(&self, what: &str) -> i64 {
        let counts = self.tell("counts");
        let found = counts.split(' ').find_map(|pair| pair.strip_prefix(what)?.strip_prefix('='));
        found.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no {what} in {counts}"))
    }
}
