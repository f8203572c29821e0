//! The real-guest kit: a `virtioblkd` ([`Server`]), a QEMU with a guest in it ([`Vm`]), and what the host can see of
//! the image by itself ([`oracle`], [`ext4`]).
//!
//! Everything started here is ended by `Drop`, and a failing test prints what its server and its guest had to say.

pub mod agent;
mod booted_systemd;
pub mod ext4;
pub mod files;
pub mod initramfs;
pub mod ledger;
pub mod libvirt;
pub mod oracle;
pub mod qemu;
pub mod qmp;
pub mod server;
pub mod system_libvirt;
pub mod xfs;

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

pub use crate::programs::root;
use crate::programs::target_dir;
pub use crate::wait::{WAIT_TIMEOUT, wait_until};
pub use agent::Agent;
pub use ledger::Ledger;
pub use qemu::Vm;
pub use qmp::Qmp;
pub use server::Server;

/// A directory on the build's filesystem, gone after the test. Images live here, as /tmp may have no O_DIRECT.
pub fn scratch() -> tempfile::TempDir {
    crate::programs::disk_dir()
}

/// A sparse image of `size` bytes.
pub fn sparse_image(dir: &Path, size: u64) -> PathBuf {
    let path = dir.join("disk.img");
    fs::File::create(&path).and_then(|file| file.set_len(size)).expect("a sparse image");
    path
}

/// Says something that the reader of a passing test run should see too (the test runner hides `eprintln!` there).
pub fn tell(text: &str) {
    // Nobody left to read it is no reason to fail.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Runs a command to its end; panics with its output if it fails.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

/// Runs a command to its end, whatever that is.
pub fn output(command: &mut Command) -> Output {
    command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; 'make deps' installs what the guest tests need"))
}

/// A command that dies with this test process, even where the process is killed and no `Drop` runs.
pub fn mortal(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program);
    command
}

/// The directory with the guest's kernel and images, made once a test run.
pub fn guest_files() -> &'static Path {
    static FILES: OnceLock<PathBuf> = OnceLock::new();
    FILES.get_or_init(|| {
        script("guest-image");
        target_dir().join("guest")
    })
}

/// The accelerator that runs guests here: `kvm` or `tcg`.
pub fn accelerator() -> &'static str {
    static ACCELERATOR: OnceLock<String> = OnceLock::new();
    ACCELERATOR.get_or_init(|| {
        guest_files();
        script("guest-accel").trim().to_owned()
    })
}

/// Whether the QEMU here is one that may install no handler for its next connection after it has lost a daemon while the
/// guest's driver starts: `vhost_user_async_close_bh` from 7.2 until "vhost-user: fix lost reconnect", which is in 8.2.
pub fn qemu_can_lose_its_reconnection() -> bool {
    let version = run(Command::new("qemu-system-x86_64").arg("--version"));
    let version = version.split("version ").nth(1).unwrap_or_else(|| panic!("no version in {version}"));
    let mut numbers = version.split(['.', ' ']).map(|number| number.parse::<u32>());
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else { panic!("odd version {version}") };
    ((7, 2)..(8, 2)).contains(&(major, minor))
}

fn script(name: &str) -> String {
    run(Command::new(root().join("scripts").join(name)).env("CARGO_TARGET_DIR", target_dir()))
}
