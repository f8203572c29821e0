//! PURE. The replies to requests ("Simple reply message", "Structured reply chunk message").

use super::wire::*;
use super::{Connection, Span};

/// The most extents of one reply, so that no client makes the server search long. The specification's limit is 2^20.
const MAX_EXTENTS: usize = 1024;

/// The longest text of an error, in bytes ("Conventions": strings).
const MAX_TEXT: usize = 1024;

/// An error value ("Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errno {
    /// NBD_EPERM: the export is read-only.
    Permission = 1,
    /// NBD_EIO: the instant cannot be read.
    Io = 5,
    /// NBD_EINVAL: the request makes no sense.
    Invalid = 22,
    /// NBD_EOVERFLOW: the read is too long.
    Overflow = 75,
    /// NBD_ESHUTDOWN: the export has ended.
    Shutdown = 108,
}

/// Some bytes of the export that have one status in each context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The length in bytes; not 0.
    pub len: u32,
    /// The status in each of the export's contexts, in their order.
    pub status: [u32; 2],
}

impl Connection {
    /// Encodes an error: the reply to a request, or what ends a reply that has begun.
    pub fn error(&self, cookie: u64, errno: Errno, text: &str) -> Vec<u8> {
        if !self.structured {
            return simple(cookie, errno as u32);
        }
        let cut = (0..=text.len().min(MAX_TEXT)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        let mut payload = Vec::new();
        payload.put32(errno as u32);
        payload.put16(cut as u16);
        payload.extend_from_slice(&text.as_bytes()[..cut]);
        let mut message = chunk(cookie, REPLY_TYPE_ERROR, true, payload.len());
        message.extend_from_slice(&payload);
        message
    }

    /// Encodes what precedes the bytes of a read, from `done` on, `len` of them. The parts of a read are sent in order.
    pub fn before_data(&self, read: Span, done: u32, len: u32) -> Vec<u8> {
        if !self.structured {
            return if done == 0 { simple(read.cookie, 0) } else { Vec::new() };
        }
        let is_last = done + len == read.len;
        let mut message = chunk(read.cookie, REPLY_TYPE_OFFSET_DATA, is_last, len as usize + 8);
        message.put64(read.offset + u64::from(done));
        message
    }

    /// Encodes that a read failed after `done` bytes were sent. `None`: the connection must be closed, because a simple
    /// reply that has begun cannot fail.
    pub fn read_failed(&self, read: Span, done: u32, errno: Errno, text: &str) -> Option<Vec<u8>> {
        (self.structured || done == 0).then(|| self.error(read.cookie, errno, text))
    }

    /// Encodes the status of the extents from the request's offset on: a chunk for each context that the client selected,
    /// all of the same length, since virtnbdbackup and nbdinfo advance by one of them. `one`: only the first extent.
    pub fn block_status(&self, request: Span, one: bool, extents: &[Extent]) -> Vec<u8> {
        let extents = &extents[..extents.len().min(if one { 1 } else { MAX_EXTENTS })];
        let mut message = Vec::new();
        for (nth, &context) in self.selected.iter().enumerate() {
            let mut merged: Vec<(u64, u32)> = Vec::new();
            let mut left = u64::from(request.len);
            for extent in extents {
                let len = u64::from(extent.len).min(left);
                left -= len;
                match merged.last_mut() {
                    Some((total, status)) if *status == extent.status[context] => *total += len,
                    _ if len > 0 => merged.push((len, extent.status[context])),
                    _ => {}
                }
            }
            if merged.is_empty() {
                // A status of 0 is always true.
                merged.push((request.len.into(), 0));
            }
            let is_last = nth + 1 == self.selected.len();
            message.extend(chunk(request.cookie, REPLY_TYPE_BLOCK_STATUS, is_last, 4 + 8 * merged.len()));
            message.put32(context as u32 + 1);
            for (len, status) in merged {
                message.put32(len as u32);
                message.put32(status);
            }
        }
        message
    }
}

fn simple(cookie: u64, errno: u32) -> Vec<u8> {
    let mut message = Vec::new();
    message.put32(SIMPLE_REPLY_MAGIC);
    message.put32(errno);
    message.put64(cookie);
    message
}

fn chunk(cookie: u64, kind: u16, is_last: bool, len: usize) -> Vec<u8> {
    let mut message = Vec::new();
    message.put32(STRUCTURED_REPLY_MAGIC);
    message.put16(if is_last { REPLY_FLAG_DONE } else { 0 });
    message.put16(kind);
    message.put64(cookie);
    message.put32(len as u32);
    message
}
