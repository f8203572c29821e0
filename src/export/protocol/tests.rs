//! Tests of the protocol against bytes as the specification has them.

use super::wire::*;
use super::*;

fn export() -> Arc<Export> {
    let contexts = vec![BASE_ALLOCATION.to_owned(), "qemu:dirty-bitmap:backup-vda".to_owned()];
    Arc::new(Export { name: "vda".into(), size: (5 << 30) + 512, contexts })
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put64(IHAVEOPT);
    bytes.put32(option);
    bytes.put32(data.len() as u32);
    bytes.extend_from_slice(data);
    bytes
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let count = (queries.len() as u32).to_be_bytes().to_vec();
    [string(name), count, queries.iter().flat_map(|query| string(query)).collect()].concat()
}

fn info(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.put16(wanted.len() as u16);
    wanted.iter().for_each(|kind| data.put16(*kind));
    data
}

fn request(flags: u16, kind: u16, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put32(REQUEST_MAGIC);
    bytes.put16(flags);
    bytes.put16(kind);
    bytes.put64(7);
    bytes.put64(offset);
    bytes.put32(len);
    bytes
}

/// A connection whose flags are read.
fn connected(flags: u32) -> Connection {
    let mut connection = Connection::new(export());
    let Step::Send(greeting) = connection.step() else { panic!("no greeting") };
    assert_eq!(greeting, b"NBDMAGICIHAVEOPT\0\x03");
    connection.feed(&flags.to_be_bytes());
    assert_eq!(connection.step(), Step::Wait);
    connection
}

/// The replies to one option: their types and data.
fn ask(connection: &mut Connection, kind: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
    connection.feed(&option(kind, data));
    let Step::Send(bytes) = connection.step() else { panic!("no reply to option {kind}") };
    let (mut fields, mut replies) = (Fields(&bytes), Vec::new());
    while !fields.is_empty() {
        assert_eq!((fields.u64(), fields.u32()), (Some(OPTION_REPLY_MAGIC), Some(kind)));
        let reply = fields.u32().unwrap();
        replies.push((reply, fields.string().unwrap().to_vec()));
    }
    replies
}

fn kinds(replies: &[(u32, Vec<u8>)]) -> Vec<u32> {
    replies.iter().map(|(kind, _)| *kind).collect()
}

/// A connection in the transmission phase with structured replies and these contexts.
fn negotiated(contexts: &[&str]) -> Connection {
    let mut connection = connected(3);
    assert_eq!(kinds(&ask(&mut connection, OPT_STRUCTURED_REPLY, b"")), [REP_ACK]);
    let selected = ask(&mut connection, OPT_SET_META_CONTEXT, &queries("vda", contexts));
    assert_eq!(selected.len(), contexts.len() + 1);
    assert!(!connection.is_negotiated());
    ask(&mut connection, OPT_GO, &info("vda", &[]));
    assert!(connection.is_negotiated());
    connection
}

fn step(connection: &mut Connection, bytes: &[u8]) -> Step {
    connection.feed(bytes);
    connection.step()
}

/// The errno of the error that a step sends.
fn refused(step: &Step) -> u32 {
    let Step::Send(bytes) = step else { panic!("{step:?}") };
    let mut fields = Fields(bytes);
    match fields.u32().unwrap() {
        SIMPLE_REPLY_MAGIC => fields.u32().unwrap(),
        _ => {
            assert_eq!((fields.u16(), fields.u16()), (Some(REPLY_FLAG_DONE), Some(REPLY_TYPE_ERROR)));
            assert_eq!(fields.u64(), Some(7));
            assert_eq!(fields.u32().unwrap() as usize, fields.0.len());
            let errno = fields.u32().unwrap();
            assert_eq!(usize::from(fields.u16().unwrap()), fields.0.len(), "the text");
            errno
        }
    }
}

#[test]
fn an_old_client_selects_the_export_by_its_name() {
    for (flags, padding) in [(1, 124), (3, 0)] {
        for name in ["vda", ""] {
            let mut connection = connected(flags);
            let Step::Send(bytes) = step(&mut connection, &option(OPT_EXPORT_NAME, name.as_bytes())) else { panic!() };
            let mut fields = Fields(&bytes);
            assert_eq!(fields.u64(), Some((5 << 30) + 512));
            assert_eq!(fields.u16(), Some(FLAG_HAS_FLAGS | FLAG_READ_ONLY | FLAG_SEND_DF | FLAG_CAN_MULTI_CONN));
            assert_eq!(fields.0, vec![0; padding]);
            let read = Span { cookie: 7, offset: 512, len: 1024 };
            assert_eq!(step(&mut connection, &request(0, CMD_READ, 512, 1024)), Step::Run(Request::Read(read)));
            assert_eq!(connection.before_data(read, 0, 512), b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x07");
            assert_eq!(connection.before_data(read, 512, 512), b"", "the data of a simple reply is in one piece");
            assert_eq!(connection.read_failed(read, 512, Errno::Io, "lost"), None);
            assert!(connection.read_failed(read, 0, Errno::Io, "lost").is_some());
        }
    }
    let mut connection = connected(1);
    assert!(matches!(step(&mut connection, &option(OPT_EXPORT_NAME, b"vdb")), Step::End(End::Violation(_))));
}

#[test]
fn unknown_flags_and_magic_numbers_end_the_connection() {
    let mut connection = Connection::new(export());
    connection.step();
    assert!(matches!(step(&mut connection, &4u32.to_be_bytes()), Step::End(End::Violation(_))));
    assert!(matches!(step(&mut connected(3), &[0; 16]), Step::End(End::Violation(_))));
    assert!(matches!(step(&mut negotiated(&[]), &[0; 28]), Step::End(End::Violation(_))));
}

#[test]
fn the_export_is_listed_and_described() {
    let mut connection = connected(3);
    let listed = ask(&mut connection, OPT_LIST, b"");
    assert_eq!(listed, [(REP_SERVER, string("vda")), (REP_ACK, vec![])]);
    assert_eq!(kinds(&ask(&mut connection, OPT_LIST, b"x")), [REP_ERR_INVALID]);
    assert_eq!(kinds(&ask(&mut connection, OPT_INFO, &info("vdb", &[]))), [REP_ERR_UNKNOWN]);
    assert_eq!(kinds(&ask(&mut connection, OPT_INFO, b"\0\0\0\x09vda\0\0")), [REP_ERR_INVALID]);
    assert_eq!(kinds(&ask(&mut connection, OPT_INFO, &[info("vda", &[3]), vec![0]].concat())), [REP_ERR_INVALID]);
    let described = ask(&mut connection, OPT_INFO, &info("", &[INFO_NAME, 77]));
    assert_eq!(kinds(&described), [REP_INFO, REP_INFO, REP_INFO, REP_ACK]);
    assert_eq!(described[0].1, b"\0\x01vda");
    assert_eq!(described[1].1, b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0");
    assert_eq!(kinds(&ask(&mut connection, 5, b"")), [REP_ERR_UNSUP], "NBD_OPT_STARTTLS");
    assert_eq!(kinds(&ask(&mut connection, 11, b"")), [REP_ERR_UNSUP], "NBD_OPT_EXTENDED_HEADERS");
    assert_eq!(kinds(&ask(&mut connection, OPT_ABORT, b"")), [REP_ACK]);
    assert_eq!(connection.step(), Step::End(End::Client));
}

#[test]
fn contexts_are_listed_by_wildcard_and_selected_by_name() {
    let mut connection = connected(3);
    let select = |connection: &mut Connection, names: &[&str]| -> Vec<(u32, Vec<u8>)> {
        ask(connection, OPT_SET_META_CONTEXT, &queries("vda", names))
    };
    assert_eq!(kinds(&select(&mut connection, &[BASE_ALLOCATION])), [REP_ERR_INVALID], "before structured replies");
    assert_eq!(kinds(&ask(&mut connection, OPT_STRUCTURED_REPLY, b"x")), [REP_ERR_INVALID]);
    assert_eq!(kinds(&ask(&mut connection, OPT_STRUCTURED_REPLY, b"")), [REP_ACK]);
    for (query, found) in [
        (&[][..], 2),
        (&["base:"], 1),
        (&["qemu:"], 1),
        (&["qemu:dirty-bitmap:"], 1),
        (&["qemu:dirty-bitmap:backup"], 0),
        (&["x:y", BASE_ALLOCATION], 1),
        (&["base:allocation", "base:"], 1),
    ] {
        let listed = ask(&mut connection, OPT_LIST_META_CONTEXT, &queries("vda", query));
        assert_eq!(listed.len(), found + 1, "{query:?}");
        assert_eq!(listed.last(), Some(&(REP_ACK, vec![])));
    }
    for wildcard in ["base:", "qemu:", "qemu:dirty-bitmap:", "nothing"] {
        assert_eq!(kinds(&select(&mut connection, &[wildcard])), [REP_ACK], "{wildcard}");
    }
    let both = select(&mut connection, &["qemu:dirty-bitmap:backup-vda", BASE_ALLOCATION, BASE_ALLOCATION]);
    assert_eq!(kinds(&both), [REP_META_CONTEXT, REP_META_CONTEXT, REP_ACK]);
    assert!(both[0].1[..4] != both[1].1[..4], "their ids differ");
    // A later one that fails takes the selection back.
    assert_eq!(kinds(&ask(&mut connection, OPT_SET_META_CONTEXT, &queries("vdb", &["base:"]))), [REP_ERR_UNKNOWN]);
    ask(&mut connection, OPT_GO, &info("vda", &[]));
    assert_eq!(refused(&step(&mut connection, &request(0, CMD_BLOCK_STATUS, 0, 512))), 22);
    let mut connection = connected(3);
    ask(&mut connection, OPT_STRUCTURED_REPLY, b"");
    let hostile = [string("vda"), u32::MAX.to_be_bytes().to_vec()].concat();
    assert_eq!(kinds(&ask(&mut connection, OPT_SET_META_CONTEXT, &hostile)), [REP_ERR_INVALID]);
}

#[test]
fn requests_are_checked() {
    let mut connection = negotiated(&[BASE_ALLOCATION]);
    let size = (5 << 30) + 512;
    for (flags, kind, offset, len, errno) in [
        (0, CMD_READ, 0, 0, 22),
        (0, CMD_READ, size - 512, 513, 22),
        (0, CMD_READ, u64::MAX, 2, 22),
        (1, CMD_READ, 0, 512, 22),
        (CMD_FLAG_REQ_ONE, CMD_READ, 0, 512, 22),
        (CMD_FLAG_DF, CMD_READ, 0, MAX_CHUNK + 1, 75),
        (0, CMD_READ, 0, MAX_READ + 1, 75),
        (0, CMD_BLOCK_STATUS, size, 1, 22),
        (0, CMD_TRIM, 0, 512, 1),
        (0, CMD_WRITE_ZEROES, 0, 512, 1),
        (0, 3, 0, 0, 22),
        (0, 99, 0, 0, 22),
    ] {
        let step = step(&mut connection, &request(flags, kind, offset, len));
        assert_eq!(refused(&step), errno, "flags {flags} kind {kind} offset {offset} len {len}");
    }
    let write = [request(0, CMD_WRITE, 0, 5000), vec![9; 4999]].concat();
    assert_eq!(step(&mut connection, &write), Step::Wait);
    assert_eq!(refused(&step(&mut connection, &[9])), 1, "once its payload is skipped");
    let span = Span { cookie: 7, offset: 0, len: u32::MAX };
    let asked = step(&mut connection, &request(CMD_FLAG_REQ_ONE, CMD_BLOCK_STATUS, 0, u32::MAX));
    assert_eq!(asked, Step::Run(Request::BlockStatus { span, one: true }));
    assert!(matches!(step(&mut connection, &request(0, CMD_WRITE, 0, u32::MAX)), Step::End(End::Violation(_))));
    assert_eq!(step(&mut negotiated(&[]), &request(0, CMD_DISC, 0, 0)), Step::End(End::Client));
}

/// The extents of each context in a status reply.
fn statuses(bytes: &[u8]) -> Vec<(u32, Vec<(u32, u32)>)> {
    let (mut fields, mut found) = (Fields(bytes), Vec::new());
    while !fields.is_empty() {
        assert_eq!(fields.u32(), Some(STRUCTURED_REPLY_MAGIC));
        let done = fields.u16() == Some(REPLY_FLAG_DONE);
        assert_eq!((fields.u16(), fields.u64()), (Some(REPLY_TYPE_BLOCK_STATUS), Some(7)));
        let mut payload = Fields(fields.string().unwrap());
        assert_eq!(done, fields.is_empty(), "the last chunk is marked, and no other");
        let id = payload.u32().unwrap();
        let mut extents = Vec::new();
        while let (Some(len), Some(status)) = (payload.u32(), payload.u32()) {
            extents.push((len, status));
        }
        found.push((id, extents));
    }
    found
}

#[test]
fn the_contexts_of_a_status_cover_the_same_length() {
    let connection = negotiated(&["qemu:dirty-bitmap:backup-vda", BASE_ALLOCATION]);
    let span = |len| Span { cookie: 7, offset: 0, len };
    let extent = |len, hole, dirty| Extent { len, status: [hole, dirty] };
    let extents = [extent(4096, 0, 0), extent(4096, HOLE, 0), extent(8192, HOLE, 1)];
    let found = statuses(&connection.block_status(span(1 << 20), false, &extents));
    assert_eq!(found, [(1, vec![(4096, 0), (12288, HOLE)]), (2, vec![(8192, 0), (8192, 1)])]);
    let one = statuses(&connection.block_status(span(1 << 20), true, &extents));
    assert_eq!(one, [(1, vec![(4096, 0)]), (2, vec![(4096, 0)])]);
    let cut = statuses(&connection.block_status(span(6000), false, &extents));
    assert_eq!(cut, [(1, vec![(4096, 0), (1904, HOLE)]), (2, vec![(6000, 0)])], "never beyond the request");
    let none = statuses(&connection.block_status(span(512), false, &[]));
    assert_eq!(none, [(1, vec![(512, 0)]), (2, vec![(512, 0)])], "at least one extent");
    let huge = [extent(u32::MAX, HOLE, 0), extent(u32::MAX, HOLE, 0)];
    let found = statuses(&connection.block_status(span(u32::MAX), false, &huge));
    assert_eq!(found, [(1, vec![(u32::MAX, HOLE)]), (2, vec![(u32::MAX, 0)])]);
    let many: Vec<Extent> = (0..5000).map(|nth| extent(512, nth % 2, nth % 3)).collect();
    let found = statuses(&connection.block_status(span(u32::MAX), false, &many));
    let totals: Vec<u64> = found.iter().map(|(_, list)| list.iter().map(|(len, _)| u64::from(*len)).sum()).collect();
    assert_eq!(totals, [1024 * 512, 1024 * 512], "a bounded number of extents, and equal lengths");
}

#[test]
fn structured_reads_are_cut_into_chunks() {
    let connection = negotiated(&[]);
    let read = Span { cookie: 7, offset: 1 << 20, len: 1000 };
    let header = |flags: u8, len: u8, low: u8| {
        let fixed = [0x66, 0x8e, 0x33, 0xef, 0, flags, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 2, len];
        [&fixed[..], &[0, 0, 0, 0, 0, 0x10, low, 0]].concat()
    };
    assert_eq!(connection.before_data(read, 0, 512), header(0, 8, 0));
    assert_eq!(connection.before_data(read, 512, 488)[..6], header(1, 0, 0)[..6]);
    let text = "\u{e9}".repeat(5000);
    let failed = connection.read_failed(read, 512, Errno::Shutdown, &text).unwrap();
    assert!(failed.len() < 1100 && std::str::from_utf8(&failed[26..]).is_ok(), "cut between characters");
}

#[test]
fn an_option_that_is_too_long_is_skipped() {
    let mut connection = connected(3);
    let long = option(OPT_INFO, &vec![1; MAX_OPTION + 1]);
    assert_eq!(step(&mut connection, &long[..MAX_OPTION]), Step::Wait);
    let Step::Send(reply) = step(&mut connection, &long[MAX_OPTION..]) else { panic!("no reply") };
    assert_eq!(reply[12..16], REP_ERR_TOO_BIG.to_be_bytes());
    for _ in 0..MAX_OPTIONS {
        ask(&mut connection, OPT_LIST, b"");
    }
    assert!(matches!(step(&mut connection, &option(OPT_LIST, b"")), Step::End(End::Violation(_))), "no end of options");
}

/// However the client's bytes are cut, the steps are the same.
#[test]
fn the_steps_do_not_depend_on_how_the_bytes_arrive() {
    let stream = [
        3u32.to_be_bytes().to_vec(),
        option(OPT_STRUCTURED_REPLY, b""),
        option(OPT_LIST_META_CONTEXT, &queries("vda", &["base:"])),
        option(OPT_SET_META_CONTEXT, &queries("vda", &[BASE_ALLOCATION])),
        option(OPT_INFO, &vec![0; MAX_OPTION + 7]),
        option(OPT_GO, &info("vda", &[3])),
        request(0, CMD_READ, 0, 4096),
        [request(0, CMD_WRITE, 0, 100), vec![0; 100]].concat(),
        request(0, CMD_BLOCK_STATUS, 0, 1 << 30),
        request(0, CMD_DISC, 0, 0),
    ]
    .concat();
    let run = |size: usize| {
        let (mut connection, mut steps) = (Connection::new(export()), Vec::new());
        for piece in stream.chunks(size) {
            connection.feed(piece);
            loop {
                match connection.step() {
                    Step::Wait => break,
                    Step::End(end) => {
                        steps.push(Step::End(end));
                        return steps;
                    }
                    step => steps.push(step),
                }
            }
        }
        steps
    };
    let whole = run(stream.len());
    assert_eq!((whole.len(), whole.last()), (10, Some(&Step::End(End::Client))));
    for size in [1, 2, 3, 7, 28, 100, 4096] {
        assert!(run(size) == whole, "in pieces of {size}");
    }
}
