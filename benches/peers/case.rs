//! The requests that the servers get.

/// A pattern of requests.
#[derive(Clone, Copy, PartialEq)]
pub enum Pattern {
    RandomRead,
    RandomWrite,
    SequentialRead,
    /// Each request is a random write, followed by a flush when the write is completed.
    WriteFlush,
}

pub struct Case {
    /// `hot` or `direct`, pattern and block size, queue depth.
    pub name: &'static str,
    /// The image is opened with O_DIRECT, not through the host's page cache.
    pub direct: bool,
    pub pattern: Pattern,
    pub block: usize,
    pub queues: usize,
    /// The depth of each queue.
    pub depth: usize,
}

impl Case {
    const fn new(name: &'static str, direct: bool, pattern: Pattern, shape: (usize, usize, usize)) -> Case {
        Case { name, direct, pattern, block: shape.0, queues: shape.1, depth: shape.2 }
    }
}

use Pattern::{RandomRead, RandomWrite, SequentialRead, WriteFlush};

pub const CASES: [Case; 21] = [
    Case::new("hot rr4k q1", false, RandomRead, (4096, 1, 1)),
    Case::new("hot rw4k q1", false, RandomWrite, (4096, 1, 1)),
    Case::new("hot rr4k q32", false, RandomRead, (4096, 1, 32)),
    Case::new("hot rw4k q32", false, RandomWrite, (4096, 1, 32)),
    Case::new("hot rr4k 4xq32", false, RandomRead, (4096, 4, 32)),
    Case::new("hot rw4k 4xq32", false, RandomWrite, (4096, 4, 32)),
    Case::new("hot sr128k q8", false, SequentialRead, (128 << 10, 1, 8)),
    Case::new("hot wf4k q1", false, WriteFlush, (4096, 1, 1)),
    Case::new("hot wf4k q16", false, WriteFlush, (4096, 1, 16)),
    Case::new("direct rr4k q1", true, RandomRead, (4096, 1, 1)),
    Case::new("direct rw4k q1", true, RandomWrite, (4096, 1, 1)),
    Case::new("direct rr4k q32", true, RandomRead, (4096, 1, 32)),
    Case::new("direct rw4k q32", true, RandomWrite, (4096, 1, 32)),
    Case::new("direct rr4k q128", true, RandomRead, (4096, 1, 128)),
    Case::new("direct rw4k q128", true, RandomWrite, (4096, 1, 128)),
    Case::new("direct rr4k 4xq32", true, RandomRead, (4096, 4, 32)),
    Case::new("direct rw4k 4xq32", true, RandomWrite, (4096, 4, 32)),
    Case::new("direct sr128k q8", true, SequentialRead, (128 << 10, 1, 8)),
    Case::new("direct wf4k q1", true, WriteFlush, (4096, 1, 1)),
    Case::new("direct wf4k q4", true, WriteFlush, (4096, 1, 4)),
    Case::new("direct wf4k q16", true, WriteFlush, (4096, 1, 16)),
];

/// Chooses the next block. Every server gets the same sequence.
pub struct Blocks {
    sequential: bool,
    random: u64,
    next: u64,
    blocks: u64,
}

impl Blocks {
    pub fn new(case: &Case, size: u64) -> Blocks {
        let sequential = case.pattern == Pattern::SequentialRead;
        Blocks { sequential, random: 0x9e37_79b9_7f4a_7c15, next: 0, blocks: size / case.block as u64 }
    }

    pub fn next(&mut self) -> u64 {
        if self.sequential {
            self.next = (self.next + 1) % self.blocks;
            return self.next;
        }
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % self.blocks
    }
}
