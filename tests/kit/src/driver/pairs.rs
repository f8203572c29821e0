//! A writer on two disks, one after the other: what an instant over both may hold.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::{ALL, Driver};

pub const BLOCK: usize = 4096;
/// Blocks that the writer goes round in.
pub const BLOCKS: u64 = 16;
/// Bytes of each disk that it uses.
pub const USED: usize = BLOCK * BLOCKS as usize;

/// Writes i to disk A, waits until that is acknowledged, writes i to disk B, waits, and so on, in a thread of its own
/// until it is dropped.
pub struct PairWriter {
    ends: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl PairWriter {
    /// Begins on the disks behind these vhost-user sockets.
    pub fn start(sockets: [PathBuf; 2]) -> PairWriter {
        let ends = Arc::new(AtomicBool::new(false));
        let written = Arc::new(AtomicU64::new(0));
        let thread = {
            let (ends, written) = (ends.clone(), written.clone());
            std::thread::spawn(move || write(&sockets, &ends, &written))
        };
        PairWriter { ends, written, thread: Some(thread) }
    }

    /// The newest i that both disks have acknowledged.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::SeqCst)
    }
}

impl Drop for PairWriter {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        let ended = self.thread.take().expect("joined once").join();
        assert!(ended.is_ok() || std::thread::panicking(), "the writer panicked");
    }
}

fn write(sockets: &[PathBuf; 2], ends: &AtomicBool, written: &AtomicU64) {
    let mut disks = sockets.each_ref().map(|socket| Driver::connect_soon(socket, 1, 16, BLOCK, ALL));
    for i in 1u64.. {
        if ends.load(Ordering::SeqCst) {
            return;
        }
        let block = i.to_le_bytes().repeat(BLOCK / 8);
        for disk in &mut disks {
            disk.fill(0, &block);
            let offset = i % BLOCKS * BLOCK as u64;
            assert_eq!(disk.one(0, |disk, id| disk.write(0, offset, 0, BLOCK, id)), 0);
        }
        written.store(i, Ordering::SeqCst);
    }
}

/// The largest i in what a disk holds. A block that holds two is torn in itself.
pub fn newest(bytes: &[u8]) -> u64 {
    let blocks = bytes[..USED].chunks(BLOCK).map(|block| {
        let numbers: Vec<u64> = block.chunks(8).map(|eight| u64::from_le_bytes(eight.try_into().unwrap())).collect();
        assert!(numbers.iter().all(|number| *number == numbers[0]), "a torn block: {numbers:?}");
        numbers[0]
    });
    blocks.max().unwrap()
}

/// Whether A and B are of one instant.
pub fn are_of_one_instant([a, b]: [u64; 2]) -> bool {
    a == b || a == b + 1
}
