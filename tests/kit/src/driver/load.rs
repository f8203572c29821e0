//! A driver that writes numbers and remembers which were acknowledged.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{ALL, Driver};
use crate::prng::Prng;

const WAIT_TIMEOUT: Duration = Duration::from_secs(60);
/// The image's size in bytes.
pub const SIZE: usize = 4 << 20;

/// Numbered writes of 4 KiB at depth over two rings, from a thread of its own, until told to stop.
pub struct Load {
    acknowledged: Arc<Mutex<Vec<u64>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

pub const PAGE: usize = 4096;
pub const PAGES: usize = SIZE / PAGE;
pub const LOAD_QUEUES: usize = 2;

impl Load {
    /// Connects to this socket and begins.
    pub fn start(socket: &Path) -> Load {
        let acknowledged = Arc::new(Mutex::new(vec![0; PAGES]));
        let stop = Arc::new(AtomicBool::new(false));
        let (acked, ended, socket) = (acknowledged.clone(), stop.clone(), socket.to_owned());
        let thread = std::thread::spawn(move || {
            let mut guest = Driver::connect_soon(&socket, LOAD_QUEUES, 64, SIZE, ALL);
            write_numbers(
                &mut guest,
                || ended.load(Ordering::Relaxed),
                |page, number| acked.lock().unwrap()[page] = number,
            );
        });
        Load { acknowledged, stop, thread: Some(thread) }
    }

    /// The newest number that was acknowledged, page by page.
    pub fn acknowledged(&self) -> Vec<u64> {
        self.acknowledged.lock().unwrap().clone()
    }

    /// Until so many more writes were acknowledged.
    pub fn wait_for(&self, writes: u64) {
        let newest = || self.acknowledged().into_iter().max().unwrap();
        let (goal, end) = (newest() + writes, Instant::now() + WAIT_TIMEOUT);
        while newest() < goal {
            assert!(Instant::now() < end, "the load stands still");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether nothing is acknowledged for a while.
    pub fn stands_still(&self) -> bool {
        let before = self.acknowledged();
        std::thread::sleep(Duration::from_millis(500));
        before == self.acknowledged()
    }

    /// Ends the load; what was acknowledged.
    pub fn stop(mut self) -> Vec<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        self.acknowledged()
    }
}

/// Writes number after number to page after page, each page's memory its own, and tells of every acknowledgement.
pub fn write_numbers(guest: &mut Driver, ended: impl Fn() -> bool, mut acknowledged: impl FnMut(usize, u64)) {
    let mut in_flight: Vec<Option<u64>> = vec![None; PAGES];
    let (mut number, mut prng, mut depth) = (0u64, Prng::new(5), [0; LOAD_QUEUES]);
    while !ended() {
        for (queue, depth) in depth.iter_mut().enumerate() {
            while *depth < 16 {
                let page = prng.below(PAGES as u64) as usize;
                if in_flight[page].is_none() {
                    number += 1;
                    guest.fill(page * PAGE, &number.to_le_bytes().repeat(PAGE / 8));
                    guest.write(queue, (page * PAGE) as u64, page * PAGE, PAGE, page as u64);
                    in_flight[page] = Some(number);
                    *depth += 1;
                }
            }
            guest.kick(queue);
            for (page, result) in guest.completed(queue) {
                assert_eq!(result, 0);
                let number = in_flight[page as usize].take().expect("answered once");
                acknowledged(page as usize, number);
                *depth -= 1;
            }
        }
        std::thread::yield_now();
    }
}

/// Every page holds what was acknowledged or something newer, and is whole.
pub fn holds(image: &[u8], acknowledged: &[u64], what: &str) {
    for (page, (found, &least)) in image.chunks(PAGE).zip(acknowledged).enumerate() {
        let number = u64::from_le_bytes(found[..8].try_into().unwrap());
        assert!(found == number.to_le_bytes().repeat(PAGE / 8), "{what}: page {page} is torn");
        assert!(number >= least, "{what}: page {page} holds {number}, {least} was acknowledged");
    }
}
