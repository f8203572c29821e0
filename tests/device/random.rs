//! Random messages of a front-end and random descriptor chains of a guest: a connection ends at most, each request is
//! completed once, and the device writes only where a request names. Each test prints the seed of its random numbers.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use kit::front_end::*;
use kit::rig::Prng;
use rustix::event::{EventfdFlags, eventfd};
use virtioblkd::disk::Event;
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::DeviceOptions;
use vm_memory::{Bytes, GuestAddress};

use super::wire::*;

/// A random message that is nearly right: most have the size and the descriptors that they should have.
fn random_message(prng: &mut Prng, wire: &UnixStream, files: &[OwnedFd]) -> std::io::Result<()> {
    let word = |prng: &mut Prng| match prng.below(8) {
        0 => prng.one_of(&[u64::MAX, 1 << 63, 1 << 32, u64::from(u32::MAX), u64::MAX - 4095]),
        1 => prng.below(u64::MAX / 4096),
        2 => prng.below(1 << 20),
        3 => prng.below(1 << 10) * 4096,
        _ => prng.below(5),
    };
    let codes = [
        (code::SET_OWNER, 0),
        (code::GET_FEATURES, 0),
        (code::SET_FEATURES, 1),
        (code::SET_MEM_TABLE, 5),
        (code::SET_VRING_NUM, 1),
        (code::SET_VRING_ADDR, 5),
        (code::SET_VRING_BASE, 1),
        (code::GET_VRING_BASE, 1),
        (code::SET_VRING_KICK, 1),
        (code::SET_VRING_CALL, 1),
        (code::SET_VRING_ERR, 1),
        (code::SET_PROTOCOL_FEATURES, 1),
        (code::SET_VRING_ENABLE, 1),
        (code::GET_CONFIG, 3),
        (code::ADD_MEM_REG, 5),
        (code::REM_MEM_REG, 5),
    ];
    let (mut request, words) = prng.one_of(&codes);
    let mut body: Vec<u8> = (0..words).flat_map(|_| word(prng).to_le_bytes()).collect();
    match request {
        // Ring and number share a word; half of them name a ring that is there.
        code::SET_VRING_NUM | code::SET_VRING_BASE | code::SET_VRING_ENABLE if prng.below(2) == 0 => {
            body[..4].copy_from_slice(&(prng.below(2) as u32).to_le_bytes());
            body[4..].copy_from_slice(&prng.one_of(&[0u32, 1, 2, 64, 256]).to_le_bytes());
        }
        code::SET_FEATURES if prng.below(2) == 0 => {
            body = (1u64 << 32 | prng.below(2) << 30 | prng.below(2) << 29 | prng.below(2) << 9).to_le_bytes().into();
        }
        code::SET_MEM_TABLE => body[..8].copy_from_slice(&prng.below(2).to_le_bytes()),
        _ => {}
    }
    if prng.below(16) == 0 {
        request = prng.below(50) as u32;
    }
    if prng.below(16) == 0 {
        let len = prng.below(64) as usize;
        body.resize(len, 0xff);
    }
    let wanted = u64::from(matches!(
        request,
        code::SET_MEM_TABLE | code::ADD_MEM_REG | code::SET_VRING_KICK | code::SET_VRING_CALL | code::SET_VRING_ERR
    ));
    let count = if prng.below(16) == 0 { prng.below(4) } else { wanted };
    let files: Vec<BorrowedFd> = (0..count).map(|_| files[prng.below(files.len() as u64) as usize].as_fd()).collect();
    send(wire, request, prng.below(2) as u32 * NEED_REPLY, &body, &files)
}

#[test]
fn random_messages_end_no_more_than_their_connection() {
    let rig = memory_disk();
    let (_reader, pipe) = full_pipe();
    let (socket, _peer) = UnixStream::pair().unwrap();
    let event = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let file = || OwnedFd::from(tempfile::tempfile().unwrap());
    // Eventfds and memory more often than what is neither.
    let files = [event(), event(), event(), memfd(4 << 20), memfd(4 << 20), memfd(0), file(), pipe, socket.into()];
    let end = Instant::now() + Duration::from_secs(10);
    for seed in 0..400 {
        eprintln!("seed {seed}");
        let mut prng = Prng::new(seed);
        // A front-end that is there already, or one that begins with the chaos.
        let (guest, wire) = if prng.below(2) == 0 {
            let (guest, wire) = connect(&rig);
            (Some(guest), wire)
        } else {
            (None, UnixStream::connect(&rig.path).unwrap())
        };
        wire.set_nonblocking(true).unwrap();
        for _ in 0..40 {
            // The connection is over, or the other side is slow: more chaos comes with the next seed.
            if random_message(&mut prng, &wire, &files).is_err() {
                break;
            }
            // What it answers is its own affair.
            let _ = (&wire).read(&mut [0; 4096]);
        }
        drop((guest, wire));
        rig.disconnected();
        if seed % 20 == 0 {
            serves(&rig);
            rig.disconnected();
        }
        if Instant::now() > end {
            break;
        }
    }
    serves(&rig);
}

/// The first half of the image is what random requests may write to; no header names the other.
const HALF: u64 = 32 << 20;

/// Fills the ring's descriptors and what they point to at random: chains, loops, tables in tables, memory that is not
/// there, lengths that overflow.
fn random_ring(prng: &mut Prng, guest: &FrontEnd) {
    let (headers, data) = (0x80_0000u64, 0x90_0000u64);
    let mut kinds = Vec::new();
    for at in 0..16 {
        // Sectors and counts such that no reading from a shifted place makes one that lies in the second half.
        let sector = prng.one_of(&[0, 3, 1000, 1023, u64::MAX, u64::MAX / 512, 1 << 40]);
        kinds.push(prng.one_of(&[IN, OUT, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 99]));
        guest.put_header(headers + at * 128, kinds[at as usize], sector);
        let range = headers + 0x1000 + at * 16;
        guest.memory.write_obj(prng.one_of(&[0u64, 3, 1000, u64::MAX]), GuestAddress(range)).unwrap();
        guest.memory.write_obj(prng.one_of(&[0u32, 1, 8, u32::MAX]), GuestAddress(range + 8)).unwrap();
        guest.memory.write_obj(prng.one_of(&[0u32, 0, 1, 2]), GuestAddress(range + 12)).unwrap();
    }
    let descriptor = |prng: &mut Prng, first: bool| -> (u64, u32, u16, u16) {
        let header = headers + prng.below(16) * 128;
        let address = match prng.below(12) {
            _ if first => header,
            0 => headers + 0x1000 + prng.below(16) * 16,
            1 => prng.one_of(&[1 << 40, u64::MAX, u64::MAX - 15, 2 * REGION_BORDER - 8, 2 * REGION_BORDER]),
            2 => REGION_BORDER - prng.below(600),
            3 => header + 64,
            4 => headers + 0x2000 + prng.below(4) * 256,
            _ => data + prng.below(1 << 20),
        };
        let len = match prng.below(6) {
            0 => prng.one_of(&[0, 3, 15, 17, 1 << 31, u32::MAX, (4 << 20) + 1]),
            1 => 1,
            2 | 3 => 16,
            _ => 512 * prng.below(20) as u32,
        };
        let kind = prng.one_of(&[0, 0, 0, WRITE, WRITE, INDIRECT, WRITE | INDIRECT]);
        let more = if prng.below(3) > 0 { NEXT } else { 0 };
        (address, if first { 16 } else { len }, if first { NEXT } else { kind | more }, prng.below(70) as u16)
    };
    let mut sane = 0;
    // Indirect tables.
    for table in 0..4 {
        for entry in 0..16 {
            let (address, len, flags, _) = descriptor(prng, entry == 0);
            let at = headers + 0x2000 + table * 256 + entry * 16;
            guest.memory.write_obj(address, GuestAddress(at)).unwrap();
            let rest = u64::from(len) | u64::from(flags) << 32 | (entry + 1) << 48;
            guest.memory.write_obj(rest, GuestAddress(at + 8)).unwrap();
        }
    }
    for index in 0..64 {
        // Every other chain makes sense up to its header's sector.
        if index % 4 == 0 && prng.below(2) == 0 {
            let header = prng.below(16);
            let body = match kinds[header as usize] {
                OUT => (data + prng.below(5000), 512 * (1 + prng.below(8) as u32), 0),
                DISCARD | WRITE_ZEROES => (headers + 0x1000 + prng.below(16) * 16, 16, 0),
                _ => (data + prng.below(5000), 512 * (1 + prng.below(8) as u32), WRITE),
            };
            let header = headers + header * 128;
            guest.put_chain(0, index, &[(header, 16, 0), body, (header + 64, 1, WRITE)]);
            sane = index + 4;
        }
        if index < sane {
            continue;
        }
        let (address, len, flags, next) = descriptor(prng, index % 4 == 0);
        // Mostly the next one, so that some chains make sense.
        let next = if prng.below(4) > 0 { index + 1 } else { next };
        let flags = if index % 4 == 3 && prng.below(2) == 0 { WRITE } else { flags };
        guest.put_descriptor(0, index, address, len, flags, next);
    }
}

#[test]
fn random_chains_are_completed_once_and_write_only_where_they_name() {
    for mode in [CacheMode::None, CacheMode::Writeback] {
        let disk = Disk::new(2 * HALF);
        let secret: Vec<u8> = (0..HALF).map(|at| (at % 251) as u8 ^ 0x5a).collect();
        let file = File::options().write(true).open(&disk.path).unwrap();
        file.write_all_at(&secret, HALF).unwrap();
        file.sync_all().unwrap();
        let rig = disk.rig(DeviceOptions { mode, ..options() });
        let served = |whole| {
            let total = rig.status().total;
            [whole, total.reads, total.writes, total.flushes, total.discards, total.write_zeroes, total.errors]
        };
        let mut whole = 0;
        let end = Instant::now() + Duration::from_secs(8);
        for seed in 0..400 {
            eprintln!("{mode}, seed {seed}");
            let mut prng = Prng::new(seed);
            let (mut guest, wire) = connect(&rig);
            random_ring(&mut prng, &guest);
            let mut offered = vec![0; 64];
            let requests = 1 + prng.below(40);
            for _ in 0..requests {
                let head = prng.below(64) as u16 & if prng.below(8) == 0 { u16::MAX } else { !3 };
                offered[usize::from(head)] += 1;
                guest.make_available(0, head);
            }
            guest.kick(0);
            // Until all is answered or the ring is broken; what is in flight is finished by the stop.
            let mut answered = 0;
            let mut take = |guest: &mut FrontEnd| {
                while let Some((head, _)) = guest.used(0) {
                    offered[head as usize] -= 1;
                    assert!(offered[head as usize] >= 0, "head {head} was answered more often than it was offered");
                    answered += 1;
                }
                answered
            };
            let timeout = Instant::now() + WAIT_TIMEOUT;
            let mut broken = false;
            while take(&mut guest) < requests && !broken {
                broken = rig
                    .events
                    .take()
                    .events
                    .iter()
                    .any(|event| matches!(event, Event::ProtocolError(why) if why.starts_with("queue 0 stopped")));
                assert!(Instant::now() < timeout, "unanswered: {:?}", rig.status());
                std::thread::yield_now();
            }
            let base = guest.stop_ring(0);
            let answered = take(&mut guest);
            // What broke the ring was taken and never answered.
            assert_eq!(u64::from(base), answered + u64::from(broken), "taken and answered");
            whole += u64::from(!broken);
            assert_eq!(rig.status().total.in_flight, 0);
            drop((guest, wire));
            rig.disconnected();
            // A slow machine needs longer until each kind was served.
            if Instant::now() > end && !served(whole).contains(&0) {
                break;
            }
        }
        let served = served(whole);
        assert!(!served.contains(&0), "{mode}: the chaos tested less than it should: {served:?}");
        serves(&rig);
        let image = std::fs::read(&disk.path).unwrap();
        assert!(image[HALF as usize..] == secret, "{mode}: something was written that no request named");
    }
}
