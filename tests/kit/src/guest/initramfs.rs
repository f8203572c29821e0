//! The initial file system of a guest: a prepared one, with the test's job and programs appended.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::qemu::SHELL;
use super::{guest_files, root, run};

/// An initramfs that runs `job`; `image` is what scripts/guest-image calls it.
pub fn initramfs(job: &str, image: &str) -> Vec<u8> {
    let base = guest_files().join(image);
    let mut initramfs = fs::read(&base).unwrap_or_else(|error| panic!("{}: {error}", base.display()));
    append_file(&mut initramfs, "job", job.as_bytes());
    initramfs
}

/// Appends a program as `/bin/name`, without its debug information, and its libraries.
pub(super) fn append_program(initramfs: &mut Vec<u8>, name: &str, program: &Path, scratch: &Path) {
    let stripped = scratch.join(name);
    run(Command::new("strip").arg("-o").arg(&stripped).arg(program));
    append_file(initramfs, &format!("bin/{name}"), &fs::read(&stripped).expect("what strip wrote"));
    let libraries = run(Command::new("ldd").arg(program));
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        append_file(initramfs, library.trim_start_matches('/'), &fs::read(library).expect("a library"));
    }
}

/// Appends one file to an initramfs as a second cpio archive ("newc", cpio(5)). The kernel looks for it at a multiple
/// of four bytes and takes no notice of it elsewhere.
fn append_file(initramfs: &mut Vec<u8>, name: &str, content: &[u8]) {
    let entry = |out: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]| {
        // inode, mode, uid, gid, links, mtime, size, device and its class twice, length of the name, checksum
        let size = u32::try_from(content.len()).expect("a small file");
        let name_size = u32::try_from(name.len() + 1).expect("a short name");
        out.extend(b"070701");
        for field in [0, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            out.extend(format!("{field:08x}").bytes());
        }
        out.extend(name.bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend(content);
        out.resize(out.len().next_multiple_of(4), 0);
    };
    initramfs.resize(initramfs.len().next_multiple_of(4), 0);
    entry(initramfs, name, 0o100_755, content);
    entry(initramfs, "TRAILER!!!", 0, &[]);
}

/// What [`super::qemu::linux_shell`] boots, with `kexec` in it, for [`super::qemu::Qemu::boot`] and for `kexec` itself.
pub fn initramfs_with_kexec(functions: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory for the compiler");
    let program = dir.path().join("compiled");
    let mut cc = Command::new("cc");
    run(cc
        .args(["-O1", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&program)
        .arg(root().join("tests/kit/guest/kexec.c")));
    let mut initramfs = initramfs(&format!("{functions}\n{}", SHELL), "initramfs-agent.cpio");
    append_program(&mut initramfs, "kexec", &program, dir.path());
    initramfs
}
