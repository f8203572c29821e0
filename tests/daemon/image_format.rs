//! Images of other formats, as qemu-img makes them, are warned of and served as raw all the same.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use kit::backend::open_error;
use kit::driver::{ALL, Driver};
use kit::guest::{Server, output, scratch, sparse_image, tell, wait_until};
use kit::stall::fuse::{Stalling, Unable};
use virtioblkd::backend::file::FileOptions;
use virtioblkd::engine::CacheMode;

const MIB: u64 = 1 << 20;

/// Formats and options of `qemu-img create`. A VHD of fixed size has its footer at the end, the others have headers.
const FORMATS: [(&str, &[&str]); 9] = [
    ("qcow2", &[]),
    ("qcow", &[]),
    ("qed", &[]),
    ("vmdk", &[]),
    ("vpc", &[]),
    ("vpc", &["-o", "subformat=fixed,force_size=on"]),
    ("vhdx", &[]),
    ("vdi", &[]),
    ("luks", &["--object", "secret,id=key,data=abc", "-o", "key-secret=key,iter-time=10"]),
];

/// `None`: this qemu-img does not know the format.
fn make(path: &Path, format: &str, options: &[&str]) -> Option<()> {
    let made = output(Command::new("qemu-img").args(["create", "-q", "-f", format]).args(options).arg(path).arg("8M"));
    if !made.status.success() {
        tell(&format!("SKIPPED: {format}: {}", String::from_utf8_lossy(&made.stderr).trim()));
        return None;
    }
    Some(())
}

/// Cuts the image to whole blocks of 4 KiB, keeping its last sector: as raw images come.
fn round_up(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let footer = bytes[bytes.len() - bytes.len().min(512)..].to_vec();
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    let at = bytes.len() - footer.len();
    bytes[at..].copy_from_slice(&footer);
    fs::write(path, bytes).unwrap();
}

/// An image of each format that can be made here, whole sectors long.
fn images(dir: &Path) -> impl Iterator<Item = (&'static str, PathBuf)> {
    FORMATS.into_iter().enumerate().filter_map(move |(number, (format, options))| {
        let path = dir.join(format!("{number}.img"));
        make(&path, format, options)?;
        round_up(&path);
        Some((format, path))
    })
}

#[test]
fn images_of_other_formats_are_warned_of_and_served() {
    let dir = scratch();
    for (format, path) in images(dir.path()) {
        for mode in [CacheMode::None, CacheMode::Writeback] {
            let server = Server::start(&path, mode, &[]);
            wait_until("the format is seen", || server.status()["detected-format"] == format);
            let page = server.ctl_ok(&["status"]);
            for words in [format, "qemu-img", "--format raw"] {
                assert!(page.contains(words), "{format}: '{words}' is not in: {page}");
            }
            wait_until("the log has it", || {
                server.log().lines().any(|line| line.contains("warn:") && line.contains("-O raw"))
            });
            let mut guest = Driver::connect_soon(&server.socket(), 1, 128, 4096, ALL);
            assert_eq!(guest.one(0, |guest, id| guest.read(0, 0, 0, 4096, id)), 0, "{format}");
            assert!(guest.fetch(0, 4096) == fs::read(&path).unwrap()[..4096], "{format}: read as raw");
        }
        let server = Server::start(&path, CacheMode::Writeback, &["--format", "raw"]);
        // Where it would be warned of, that came before the first answer to a guest or within moments.
        let mut guest = Driver::connect_soon(&server.socket(), 1, 128, 4096, ALL);
        assert_eq!(guest.one(0, |guest, id| guest.read(0, 0, 0, 4096, id)), 0, "{format}");
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(server.status()["detected-format"].is_null(), "{format}: --format raw is silent");
        assert!(!server.log().contains("-O raw"), "{format}: {}", server.log());
    }
}

#[test]
fn a_raw_image_is_not_warned_of() {
    let dir = scratch();
    let server = Server::start(&sparse_image(dir.path(), MIB), CacheMode::None, &[]);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(server.status()["detected-format"].is_null());
    assert!(!server.log().contains("qemu-img"), "{}", server.log());
}

/// Rounding it up, as an odd raw image is, would spoil an image of another format.
#[test]
fn an_image_of_another_format_and_an_odd_size_names_its_conversion() {
    let dir = scratch();
    for (format, path) in images(dir.path()) {
        // Those that have a header get an odd end; a footer stays at the end.
        let mut bytes = fs::read(&path).unwrap();
        let footer = bytes.split_off(bytes.len() - 512);
        bytes.extend([0; 512]);
        bytes.extend(footer);
        fs::write(&path, bytes).unwrap();
        for mode in [CacheMode::None, CacheMode::Writeback] {
            let options = FileOptions { logical_block_size: Some(4096), ..FileOptions::new(&path, mode.into()) };
            let why = open_error(&options);
            for words in ["is not a multiple", "-O raw", "truncate -s"] {
                assert!(why.contains(words), "{format}: '{words}' is not in: {why}");
            }
            let why = open_error(&FileOptions { is_raw: true, ..options });
            assert!(!why.contains("-O raw"), "{format}, --format raw: {why}");
        }
    }
    let odd = dir.path().join("odd");
    File::create(&odd).unwrap().set_len(1000).unwrap();
    let why = open_error(&FileOptions::new(&odd, CacheMode::Writeback.into()));
    assert!(why.contains("truncate") && !why.contains("qemu-img"), "a raw one: {why}");
}

/// Looking at the image waits for its storage; the start, the control socket and the end do not wait for the look.
#[test]
fn an_image_whose_storage_hangs_is_served_before_its_format_is_seen() {
    let mut content = vec![0; MIB as usize];
    content[..4].copy_from_slice(b"QED\0");
    let disk = match Stalling::mount(content) {
        Ok(disk) => disk,
        Err(Unable(why)) => return tell(&format!("SKIPPED: a file whose server hangs: {why}")),
    };
    // To open a FUSE file takes a read of its start, so it is its end that hangs.
    disk.stall_reads_of(MIB - 1);
    let server = Server::start(&disk.image(), CacheMode::Writeback, &[]);
    wait_until("the look waits", || disk.waiting() > 0);
    assert!(server.status()["detected-format"].is_null());
    disk.let_go();
    wait_until("the format is seen", || server.status()["detected-format"] == "qed");
    drop(server);
    disk.stall_reads_of(MIB - 1);
    let server = Server::start(&disk.image(), CacheMode::Writeback, &[]);
    let (status, log) = server.terminate();
    disk.let_go();
    assert!(status.success(), "{status}\n{log}");
}

/// Sizes at which a read for the format could end early or be empty.
#[test]
fn an_image_of_a_few_bytes_is_refused_without_a_panic() {
    let dir = scratch();
    for (size, said) in [(0, "it is empty"), (1, "truncate"), (511, "truncate"), (513, "truncate")] {
        let image = dir.path().join("small");
        fs::write(&image, vec![0; size]).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
        command.arg("--socket-path").arg(dir.path().join("vhost")).arg("--blk-file").arg(&image);
        let refused = output(&mut command);
        let error = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{size}: {error}");
        assert!(error.contains(said) && !error.contains("panicked"), "{size}: {error}");
    }
}
