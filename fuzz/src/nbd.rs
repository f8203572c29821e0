//! Fuzzes the bytes that an NBD client writes, in pieces of any size.

use std::sync::Arc;

use virtioblkd::internal::export::protocol::{
    BASE_ALLOCATION, Connection, Errno, Export, Extent, MAX_READ, Request, Step,
};

/// The size of the export: a little more than one request can ask for.
const SIZE: u64 = (4 << 30) + 512;

/// The most bytes that one step sends: the list of contexts, or the status of all extents.
const LONGEST_REPLY: usize = 64 << 10;

/// Runs one input. The first byte is the size of the pieces.
pub fn run(data: &[u8]) {
    let [piece, bytes @ ..] = data else { return };
    let whole = steps(bytes, bytes.len().max(1));
    assert!(steps(bytes, usize::from(*piece).max(1)) == whole, "however it is cut");
}

fn steps(bytes: &[u8], piece: usize) -> Vec<Step> {
    let contexts = vec![BASE_ALLOCATION.to_owned(), "qemu:dirty-bitmap:backup-vda".to_owned()];
    let export = Arc::new(Export { name: "vda".into(), size: SIZE, contexts });
    let (mut connection, mut found) = (Connection::new(export), Vec::new());
    for part in [&[][..]].into_iter().chain(bytes.chunks(piece)) {
        connection.feed(part);
        loop {
            let step = connection.step();
            match &step {
                Step::Wait => break,
                Step::Send(message) => assert!(!message.is_empty() && message.len() <= LONGEST_REPLY),
                Step::Run(request) => carry_out(&connection, *request),
                Step::End(_) => {
                    found.push(step);
                    return found;
                }
            }
            found.push(step);
        }
    }
    found
}

/// Every request that gets through lies inside the export, and has a reply of the right length.
fn carry_out(connection: &Connection, request: Request) {
    let (Request::Read(span) | Request::BlockStatus { span, .. }) = request;
    assert!(span.len > 0 && span.offset + u64::from(span.len) <= SIZE);
    match request {
        Request::Read(read) => {
            assert!(read.len <= MAX_READ);
            assert!(connection.before_data(read, 0, read.len).len() <= 28);
            assert!(connection.error(read.cookie, Errno::Io, "text").len() <= 30);
        }
        Request::BlockStatus { span, one } => {
            let extents = [Extent { len: 4096, status: [3, 0] }, Extent { len: u32::MAX, status: [0, 1] }];
            let reply = connection.block_status(span, one, &extents);
            assert!(!reply.is_empty() && reply.len() <= 2 * (24 + 2 * 8));
        }
    }
}
