//! Fuzzes a front-end's messages to a device in this process: in any order, with any content and any descriptors.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use virtioblkd::backend::mem::{MemBackend, MemOptions};
use virtioblkd::disk::{Disk, Events};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::{Device, DeviceOptions};

const MEMORY: u64 = 0x1_0000;

/// Runs one input: messages, each with a request code, flags, descriptors, the length of the body, and the body. The header
/// has the true length unless the highest bit of the flags is set. A code from 150 on is an action of the guest: it writes
/// the rest of the body to the address in the first two bytes, and kicks. A code above 200 is the front-end truncating the
/// memory. Returns the number of requests that were completed.
pub fn run(data: &[u8]) -> u64 {
    let options = DeviceOptions { mode: CacheMode::Writeback, num_queues: 4, queue_size: 64, serial: "fuzz".into() };
    let backend = Arc::new(MemBackend::new(MemOptions::new(1 << 16)));
    let device = Device::new(backend, &options, Arc::new(Events::new().expect("an eventfd")));
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    std::thread::scope(|scope| {
        let served = device.clone();
        let server = scope.spawn(move || served.serve(theirs));
        // Replies must be read, or both sides would block. An error ends the reading, too.
        scope.spawn(|| std::io::copy(&mut &ours, &mut std::io::sink()));
        send_all(&ours, data);
        // The device reads all messages before it sees the end of the connection.
        ours.shutdown(std::net::Shutdown::Write).expect("it was open");
        // The device may end the session with an error, but must not panic.
        let _ = server.join().expect("no panic");
    });
    let status = device.disk().status();
    assert_eq!(status.total.in_flight, 0, "nothing is left behind");
    device.shutdown();
    status.total.reads + status.total.writes
}

/// A virtqueue with one write: descriptors at 0, the available ring at 0x1000, the used ring at 0x2000.
fn ring() -> Vec<u8> {
    let mut memory = vec![0; 0x3000];
    let descriptor = |at: u64, len: u32, flags: u16, next: u16| {
        let words = [at, u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48];
        words.map(u64::to_le_bytes).concat()
    };
    let chain = [descriptor(0x800, 16, 1, 1), descriptor(0x2800, 512, 1, 2), descriptor(0x840, 1, 2, 0)].concat();
    memory[..chain.len()].copy_from_slice(&chain);
    memory[0x800] = 1;
    memory[0x1002] = 1;
    memory
}

fn send_all(wire: &UnixStream, data: &[u8]) {
    let memory = memfd_create("guest", MemfdFlags::CLOEXEC).expect("memory");
    ftruncate(&memory, MEMORY).expect("room");
    let file = std::fs::File::from(memory.try_clone().expect("a descriptor"));
    file.write_all_at(&ring(), 0).expect("room");
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
    let fds: [&OwnedFd; 2] = [&memory, &event];
    let mut rest = data;
    while let [code, flags, descriptors, len, more @ ..] = rest {
        let (body, after) = more.split_at(usize::from(*len).min(more.len()));
        rest = after;
        if *code > 200 {
            ftruncate(&memory, u64::from(*code - 200) * 1024).expect("smaller or larger");
            continue;
        }
        let size = if flags & 0x80 == 0 { body.len() as u32 } else { u32::from(*len) << 8 };
        if *code >= 150 {
            let [low, high, bytes @ ..] = body else { continue };
            let at = u64::from(u16::from_le_bytes([*low, *high]));
            file.write_all_at(bytes, at).expect("room");
            rustix::io::write(&event, &1u64.to_ne_bytes()).expect("far from full");
            continue;
        }
        let header = [u32::from(*code), 1 | u32::from(flags & 0x7c), size];
        let mut message: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        message.extend(body);
        let chosen: Vec<BorrowedFd> =
            (0..descriptors & 7).map(|at| fds[usize::from(descriptors >> 4 >> at & 1)].as_fd()).collect();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(chosen.is_empty() || control.push(SendAncillaryMessage::ScmRights(&chosen)));
        // This fails if the connection has ended.
        if sendmsg(wire, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL).is_err() {
            return;
        }
    }
}
