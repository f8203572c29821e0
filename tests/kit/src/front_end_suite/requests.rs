//! Every request, vector, number of queues and block size.

use super::*;
use crate::driver::load::SIZE;
use crate::driver::{ALL, Driver};

pub fn every_request_type_works_in_every_mode(new_store: NewStore) {
    for mode in MODES {
        let served = Served::new(new_store, &["--cache", mode]);
        let mut guest = served.connect(2, 128, 4 << 20);
        let mut model = vec![0; SIZE];
        // Offset in the image, position and length in memory: odd sizes, from addresses aligned to nothing.
        let shapes = [(0, 0, 512), (512, 1, 512), (4096, 4096, 4096), (10_240, 513, 1536), (65_024, 3, 66_048)];
        for (seed, (offset, at, len)) in (1u64..).zip(shapes.into_iter().chain([(1 << 20, 4095, 1 << 20)])) {
            let data = pattern(seed, len);
            guest.fill(at, &data);
            assert_eq!(guest.one(0, |guest, id| guest.write(0, offset as u64, at, len, id)), 0, "{mode} {offset}");
            model[offset..offset + len].copy_from_slice(&data);
            let to = (2 << 20) + at;
            guest.fill(to, &vec![0xee; len]);
            assert_eq!(guest.one(1, |guest, id| guest.read(1, offset as u64, to, len, id)), 0, "{mode} {offset}");
            assert!(guest.fetch(to, len) == data, "{mode}: {len} bytes at {offset} came back changed");
        }
        assert_eq!(guest.one(0, |guest, id| guest.flush(0, id)), 0, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write_zeroes(0, 4096, 8192, false, id)), 0, "{mode}");
        model[4096..4096 + 8192].fill(0);
        assert_eq!(guest.one(1, |guest, id| guest.write_zeroes(1, 512, 512, true, id)), 0, "{mode}");
        model[512..1024].fill(0);
        assert_eq!(guest.one(0, |guest, id| guest.discard(0, 2 << 20, 1 << 20, id)), 0, "{mode}");
        // Past the end, and half a sector.
        assert_eq!(guest.one(0, |guest, id| guest.read(0, SIZE as u64, 0, 512, id)), EIO, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write(0, SIZE as u64 - 512, 0, 1024, id)), EIO, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 0, 0, 100, id)), EIO, "{mode}");
        drop(guest);
        let image = served.end();
        assert!(image[..2 << 20] == model[..2 << 20], "{mode}: the image is not what was written");
    }
}

pub fn many_part_vectors_arrive_in_order(new_store: NewStore) {
    for mode in ["none", "writethrough"] {
        let served = Served::new(new_store, &["--cache", mode]);
        let mut guest = served.connect(1, 128, 1 << 20);
        // 126 parts is what a ring of 128 takes: whole sectors, then odd pieces that add up to sectors.
        for (round, piece) in [512usize, 513, 1, 1023].into_iter().enumerate() {
            let mut parts: Vec<(usize, usize)> = (0..126).map(|part| (part * 2048 + part % 7, piece)).collect();
            let total: usize = parts.iter().map(|part| part.1).sum();
            parts.last_mut().unwrap().1 += total.next_multiple_of(512) - total;
            let data = pattern(round as u64 + 7, total.next_multiple_of(512));
            let mut done = 0;
            for &(at, len) in &parts {
                guest.fill(at, &data[done..done + len]);
                done += len;
            }
            let offset = (round * (256 << 10)) as u64;
            assert_eq!(guest.one(0, |guest, id| guest.vectored(0, true, offset, &parts, id)), 0, "{mode} {piece}");
            for &(at, len) in &parts {
                guest.fill(at, &vec![0; len]);
            }
            assert_eq!(guest.one(0, |guest, id| guest.vectored(0, false, offset, &parts, id)), 0, "{mode} {piece}");
            let back: Vec<u8> = parts.iter().flat_map(|&(at, len)| guest.fetch(at, len)).collect();
            assert!(back == data, "{mode}: parts of {piece}");
            let offset = offset as usize;
            assert!(served.image()[offset..offset + data.len()] == data, "{mode}: parts of {piece} in the image");
        }
    }
}

pub fn as_many_queues_run_as_are_asked_for(new_store: NewStore) {
    let served = Served::new(new_store, &[]);
    for queues in [1, 16, 256] {
        let mut guest = served.connect_again(queues, 16, 256 * 512);
        for queue in 0..queues {
            guest.fill(queue * 512, &pattern((queues + queue) as u64, 512));
            guest.write(queue, (queue * 512) as u64, queue * 512, 512, queue as u64);
            guest.kick(queue);
        }
        for queue in 0..queues {
            assert_eq!(guest.wait(queue), [(queue as u64, 0)]);
        }
        let status = served.status();
        assert_eq!(status["rings"].as_array().unwrap().len(), queues, "a thread for each ring in use, and no more");
        let image = served.image();
        for queue in 0..queues {
            assert!(image[queue * 512..(queue + 1) * 512] == pattern((queues + queue) as u64, 512), "{queue}");
        }
    }
    // More than was allowed is refused, not served wrongly; and the next is served.
    let few = Served::new(new_store, &["--num-queues", "2"]);
    assert!(Driver::connect(&few.socket, 3, 16, 4096, ALL).is_err());
    let mut guest = few.connect_again(2, 16, 4096);
    assert_eq!(guest.one(1, |guest, id| guest.write(1, 0, 0, 512, id)), 0);
}

pub fn a_4096_byte_block_is_the_smallest_there_is(new_store: NewStore) {
    for mode in MODES {
        let served = Served::new(new_store, &["--cache", mode, "--logical-block-size", "4096"]);
        let mut guest = served.connect(1, 64, 64 << 10);
        guest.fill(1, &[7; 8192]);
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 4096, 1, 8192, id)), 0, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 512, 1, 4096, id)), EIO, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 4096, 1, 512, id)), EIO, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write_zeroes(0, 4096, 4096, true, id)), 0, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write_zeroes(0, 512, 4096, true, id)), EIO, "{mode}");
        drop(guest);
        let image = served.end();
        assert!(image[..8192] == [0; 8192] && image[8192..12288] == [7; 4096] && image[12288] == 0, "{mode}");
    }
}

pub fn a_read_only_disk_is_read_and_never_written(new_store: NewStore) {
    for mode in MODES {
        let served = Served::new(new_store, &["--cache", mode, "--read-only"]);
        let mut guest = served.connect(1, 64, 8192);
        guest.fill(0, &[7; 4096]);
        assert_eq!(guest.one(0, |guest, id| guest.read(0, 0, 4096, 4096, id)), 0, "{mode}");
        assert_eq!(guest.fetch(4096, 4096), [0; 4096]);
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 0, 0, 4096, id)), EIO, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write_zeroes(0, 0, 4096, true, id)), ENOTSUP, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.discard(0, 0, 4096, id)), ENOTSUP, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.flush(0, id)), 0, "{mode}: there is nothing to sync, and it is");
        drop(guest);
        assert!(served.end().iter().all(|&byte| byte == 0), "{mode}");
    }
}
