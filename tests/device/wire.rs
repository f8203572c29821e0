//! vhost-user messages byte by byte, for front-ends that are hostile or wrong.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use kit::front_end::*;
use kit::rig::Rig;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use virtioblkd::backend::file::{FileBackend, FileOptions};
use virtioblkd::backend::mem::{MemBackend, MemOptions};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::DeviceOptions;

pub(super) const OK: u8 = 0;

pub(super) fn options() -> DeviceOptions {
    DeviceOptions { mode: CacheMode::None, num_queues: 8, queue_size: 1024, serial: "hostile".into() }
}

pub(super) fn memory_disk() -> Rig {
    Rig::on(Arc::new(MemBackend::new(MemOptions::new(1 << 20))), &options())
}

/// A file served with O_DIRECT or without.
pub(super) struct Disk {
    pub(super) path: PathBuf,
    pub(super) _dir: tempfile::TempDir,
}

impl Disk {
    pub(super) fn new(size: u64) -> Disk {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("disk.img");
        File::create(&path).unwrap().set_len(size).unwrap();
        Disk { path, _dir: dir }
    }

    pub(super) fn rig(&self, options: DeviceOptions) -> Rig {
        let file = FileOptions {
            logical_block_size: Some(512),
            durable_writes: true,
            ..FileOptions::new(&self.path, options.mode.into())
        };
        Rig::on(Arc::new(FileBackend::open(&file).unwrap()), &options)
    }
}

/// vhost-user's request codes.
pub(super) mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// A message as it is on the wire; `flags` beside the version.
pub(super) fn send(wire: &UnixStream, code: u32, flags: u32, body: &[u8], files: &[BorrowedFd]) -> std::io::Result<()> {
    let mut message: Vec<u8> =
        [code, 1 | flags, body.len() as u32].iter().flat_map(|word| word.to_le_bytes()).collect();
    message.extend(body);
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(files.is_empty() || control.push(SendAncillaryMessage::ScmRights(files)));
    sendmsg(wire, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

pub(super) const NEED_REPLY: u32 = 8;

/// Sends a message that wants an acknowledgement; whether that came and was good.
pub(super) fn accepted(mut wire: &UnixStream, code: u32, body: &[u8], files: &[BorrowedFd]) -> bool {
    wire.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
    send(wire, code, NEED_REPLY, body, files).unwrap();
    let mut reply = [0; 20];
    wire.read_exact(&mut reply).is_ok() && reply[12..] == [0; 8]
}

/// A front-end with one ring, and its wire.
pub(super) fn connect(rig: &Rig) -> (FrontEnd, UnixStream) {
    let stream = UnixStream::connect(&rig.path).unwrap();
    let wire = stream.try_clone().unwrap();
    let mut guest = FrontEnd::handshake(stream, 1, 64, ALL);
    guest.start_ring(0, 0);
    (guest, wire)
}

pub(super) fn serves(rig: &Rig) {
    let mut guest = FrontEnd::connect(&rig.path, 2, 64, ALL);
    assert_eq!(guest.write(1, 0, &[1; 512]), OK);
    assert_eq!(guest.read(0, 0, 512), (OK, vec![1; 512]));
}

/// A pipe that takes no more: writing to it blocks.
pub(super) fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    rustix::fs::fcntl_setfl(&writer, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&writer, &[0; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&writer, flags).unwrap();
    (reader, writer)
}

/// The tables of vhost-user: guest address, size, the front-end's address, offset in the file.
pub(super) type Region = (u64, u64, u64, u64);

pub(super) fn table(regions: &[Region]) -> Vec<u8> {
    let mut body = (regions.len() as u64).to_le_bytes().to_vec();
    for &(guest, size, user, offset) in regions {
        body.extend([guest, size, user, offset].iter().flat_map(|word| word.to_le_bytes()));
    }
    body
}

pub(super) fn one_region((guest, size, user, offset): Region) -> Vec<u8> {
    [0, guest, size, user, offset].iter().flat_map(|word: &u64| word.to_le_bytes()).collect()
}

pub(super) fn memfd(len: u64) -> OwnedFd {
    let memory = rustix::fs::memfd_create("hostile", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, len).unwrap();
    memory
}
