//! A filesystem that takes a part of each write, of which the daemon sees no sign from io_uring, is served all the same.

use kit::driver::{ALL, Driver};
use kit::guest;
use kit::stall::fuse::{Stalling, Unable};
use virtioblkd::engine::CacheMode;

const SIZE: usize = 1 << 20;

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 512 + at + seed) as u8).collect()
}

#[test]
fn a_file_system_that_takes_512_bytes_at_a_time_takes_every_write() {
    for mode in CacheMode::ALL {
        let disk = match Stalling::mount_as(vec![0; SIZE], false, 512) {
            Ok(disk) => disk,
            Err(Unable(why)) => return guest::tell(&format!("SKIPPED: a filesystem with short writes: {why}")),
        };
        let server = guest::Server::start(&disk.image(), mode, &[]);
        let mut guest = Driver::connect_soon(&server.socket(), 1, 128, SIZE, ALL);
        for (seed, (offset, len)) in
            [(0, 4096), (4096, 1 << 16), (512 << 10, 300 << 10), (8192, 512), (12288, 4096)].into_iter().enumerate()
        {
            let wanted = pattern(len, seed);
            guest.fill(0, &wanted);
            assert_eq!(guest.one(0, |guest, id| guest.write(0, offset, 0, len, id)), 0, "{mode}: {len} at {offset}");
            assert_eq!(guest.one(0, |guest, id| guest.read(0, offset, 0, len, id)), 0, "{mode}: {len} at {offset}");
            for (what, got) in [
                ("read", guest.fetch(0, len)),
                ("stored", std::fs::read(disk.image()).unwrap()[offset as usize..][..len].to_vec()),
            ] {
                let differs = got.iter().zip(&wanted).position(|(got, wanted)| got != wanted);
                assert_eq!(differs, None, "{mode}: {what}, {len} at {offset}");
            }
        }
        drop(guest);
        drop(server);
    }
}
