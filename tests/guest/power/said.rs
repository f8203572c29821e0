//! What the front-end in the guest says to the host, a line a step, and what its sectors hold.

use std::fmt;
use std::ops::Range;

/// The smallest thing that a disk writes as a whole.
pub const SECTOR: usize = 512;

/// How a change fills its sectors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// With [`content`] of the change's number.
    Write,
    /// With zeroes.
    Zeroes,
    /// With whatever the device likes.
    Discard,
}

const KINDS: [(Kind, &str); 3] = [(Kind::Write, "write"), (Kind::Zeroes, "zeroes"), (Kind::Discard, "discard")];

/// One step of the front-end. Changes have numbers that grow; so have flushes. A step is on its way to the host before
/// the front-end does anything that depends on it.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    /// A change of these sectors is about to be sent.
    Sent(u64, Kind, Range<u64>),
    /// It was acknowledged.
    Acknowledged(u64),
    /// A flush is about to be sent.
    FlushSent(u64),
    /// It was acknowledged.
    FlushAcknowledged(u64),
    /// An operator's quiesce has succeeded and the disk is still held.
    Held,
    /// Copy so and so of the disk was reported to be complete.
    Copied(u64),
    /// The last request was answered.
    Ended,
    /// The server was ended in order: the host's own word.
    Stopped,
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Said::Sent(number, kind, sectors) => {
                let (_, kind) = KINDS.iter().find(|(known, _)| known == kind).expect("all are listed");
                write!(f, "sent {number} {kind} {} {}", sectors.start, sectors.end)
            }
            Said::Acknowledged(number) => write!(f, "acknowledged {number}"),
            Said::FlushSent(number) => write!(f, "flush-sent {number}"),
            Said::FlushAcknowledged(number) => write!(f, "flush-acknowledged {number}"),
            Said::Held => write!(f, "held"),
            Said::Copied(copy) => write!(f, "copied {copy}"),
            Said::Ended => write!(f, "ended"),
            Said::Stopped => write!(f, "stopped"),
        }
    }
}

impl Said {
    /// What `Display` wrote. `None`: something else.
    pub fn parse(line: &str) -> Option<Said> {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |at: usize| words.get(at)?.parse::<u64>().ok();
        Some(match words[0] {
            "sent" => {
                let (kind, _) = KINDS.iter().find(|(_, word)| words.get(2) == Some(word))?;
                Said::Sent(number(1)?, *kind, number(3)?..number(4)?)
            }
            "acknowledged" => Said::Acknowledged(number(1)?),
            "flush-sent" => Said::FlushSent(number(1)?),
            "flush-acknowledged" => Said::FlushAcknowledged(number(1)?),
            "held" => Said::Held,
            "copied" => Said::Copied(number(1)?),
            "ended" => Said::Ended,
            "stopped" => Said::Stopped,
            _ => return None,
        })
    }
}

/// What change `number` writes to `sector`; `salt` tells one load's sectors from another's.
pub fn content(salt: u64, sector: u64, number: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    let mut word = salt ^ sector.rotate_left(40) ^ number;
    for (at, eight) in bytes.chunks_exact_mut(8).enumerate() {
        if at == 0 {
            eight.copy_from_slice(&number.to_le_bytes());
            continue;
        }
        // Any mixing will do that makes no two sectors alike (Knuth's multiplier).
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(at as u64);
        eight.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// What is found in a sector after a cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Found {
    /// What change so and so wrote, to the byte.
    Change(u64),
    /// Zeroes.
    Zeroes,
    /// Something else: of another load, of another sector, or torn.
    Other,
}

/// Reads a sector.
pub fn read(salt: u64, sector: u64, bytes: &[u8]) -> Found {
    let number = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    if bytes == content(salt, sector, number) {
        Found::Change(number)
    } else if bytes.iter().all(|byte| *byte == 0) {
        Found::Zeroes
    } else {
        Found::Other
    }
}
