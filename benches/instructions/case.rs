//! What the servers are asked to do.

/// A pattern of requests of 4 KiB at changing places.
#[derive(Clone, Copy, PartialEq)]
pub enum Pattern {
    Read,
    Write,
    /// A batch of writes and then one flush, which counts as a request too.
    WriteFlush,
}

/// One case: how the server is started, and what the front-end sends.
pub struct Case {
    /// Back-end or cache mode, pattern, depth, further options.
    pub name: &'static str,
    /// `None`: the null back-end.
    pub cache: Option<&'static str>,
    pub pattern: Pattern,
    /// Requests in one batch.
    pub depth: usize,
    /// Further options of the server.
    pub more: &'static [&'static str],
}

const fn case(name: &'static str, cache: Option<&'static str>, pattern: Pattern, depth: usize) -> Case {
    Case { name, cache, pattern, depth, more: &[] }
}

use Pattern::{Read, Write, WriteFlush};

pub const CASES: [Case; 13] = [
    case("null read, depth 1", None, Read, 1),
    case("null read, depth 32", None, Read, 32),
    case("writeback read, depth 1", Some("writeback"), Read, 1),
    case("writeback read, depth 32", Some("writeback"), Read, 32),
    case("writeback write, depth 1", Some("writeback"), Write, 1),
    case("writeback write, depth 32", Some("writeback"), Write, 32),
    case("writeback write and flush, depth 1", Some("writeback"), WriteFlush, 1),
    case("none read, depth 1", Some("none"), Read, 1),
    case("none read, depth 32", Some("none"), Read, 32),
    case("none write, depth 1", Some("none"), Write, 1),
    case("none write, depth 32", Some("none"), Write, 32),
    case("none write and flush, depth 16", Some("none"), WriteFlush, 16),
    Case {
        name: "none write, depth 32, stable writes",
        cache: Some("none"),
        pattern: Write,
        depth: 32,
        more: &["--stable-writes", "copy"],
    },
];
