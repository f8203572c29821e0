//! Clients that break the protocol, stall, die, or are too many; and exports that break. The guest goes on.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use kit::backend::{Driver, eventually};
use virtioblkd::backend::point_in_time::{CopyStep, ScratchOptions, Tuning};
use virtioblkd::disk::Copies;
use virtioblkd::engine::CacheMode;
use virtioblkd::internal::export::{ClientTimeouts, ServerOptions, start};

use super::world::*;

const TIMEOUT: Duration = Duration::from_secs(60);

/// A client that speaks a little NBD: structured replies, then NBD_OPT_GO.
pub fn connect(world: &World) -> UnixStream {
    connect_to(&world.socket(), b"vda")
}

/// [`connect`] to an export of this name.
pub fn connect_to(socket: &Path, name: &[u8]) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("a connection");
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.set_write_timeout(Some(TIMEOUT)).unwrap();
    stream.read_exact(&mut [0; 18]).expect("the greeting");
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    stream.write_all(b"IHAVEOPT\0\0\0\x08\0\0\0\0").unwrap();
    stream.read_exact(&mut [0; 20]).expect("structured replies");
    let len = name.len() as u8;
    let go = [b"IHAVEOPT\0\0\0\x07\0\0\0", &[len + 6, 0, 0, 0, len][..], name, b"\0\0"].concat();
    stream.write_all(&go).unwrap();
    // NBD_INFO_BLOCK_SIZE, NBD_INFO_EXPORT, NBD_REP_ACK.
    stream.read_exact(&mut [0; 20 + 14 + 20 + 12 + 20]).expect("the export");
    stream
}

pub fn ask(stream: &mut UnixStream, offset: u64, len: u32) {
    let mut request = b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\x01".to_vec();
    request.extend(offset.to_be_bytes());
    request.extend(len.to_be_bytes());
    stream.write_all(&request).expect("a request");
}

/// The reply to a read that fits into one chunk: its data, or the error's number and text.
pub fn reply(stream: &mut UnixStream) -> std::io::Result<Result<Vec<u8>, (u32, String)>> {
    let mut header = [0; 20];
    stream.read_exact(&mut header)?;
    let mut payload = vec![0; u32::from_be_bytes(header[16..].try_into().unwrap()) as usize];
    stream.read_exact(&mut payload)?;
    Ok(match header[6] {
        0 => Ok(payload[8..].to_vec()),
        _ => {
            let errno = u32::from_be_bytes(payload[..4].try_into().unwrap());
            Err((errno, String::from_utf8(payload[6..].to_vec()).unwrap()))
        }
    })
}

pub fn read(stream: &mut UnixStream, offset: u64, len: u32) -> Result<Vec<u8>, (u32, String)> {
    ask(stream, offset, len);
    reply(stream).expect("a reply")
}

#[test]
fn a_hundred_connections_are_served_in_turn() {
    let world = World::mem(7, Tuning::default());
    let (name, held) = world.serve(LONG);
    thread::scope(|scope| {
        for nth in 0..100u64 {
            let (world, held) = (&world, &held);
            scope.spawn(move || {
                let mut stream = connect(world);
                let at = nth * 40_000;
                let data = read(&mut stream, at, 40_000).expect("a read");
                same(&data, &held[at as usize..at as usize + 40_000], at).unwrap();
            });
        }
    });
    eventually("all have left", || world.status(&name).export.expect("an export").clients == 0);
    world.disk.cancel(&name).expect("it runs");
}

#[test]
fn hostile_clients_lose_their_connection_and_nothing_else() {
    let world = World::mem(8, Tuning::default());
    let (name, held) = world.serve(LONG);
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/nbd");
    for entry in std::fs::read_dir(folder).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        for garbage in [&bytes[1..], &bytes[5..], &[0xff; 100]] {
            let mut stream = UnixStream::connect(world.socket()).expect("a connection");
            // It may be disconnected before it has said all.
            let _ = stream.write_all(garbage);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        }
    }
    // One dies in the middle of a long read, and one never reads its reply.
    let mut dies = connect(&world);
    ask(&mut dies, 0, SIZE as u32);
    dies.read_exact(&mut [0; 1000]).unwrap();
    drop(dies);
    let mut stalls = connect(&world);
    (0..10).for_each(|_| ask(&mut stalls, 0, SIZE as u32));
    let mut driver = Driver::new(&*world.disk, 1);
    for at in (0..SIZE).step_by(CLUSTER as usize) {
        driver.write(at, &[9; 512]).expect("the guest's write");
    }
    let mut good = connect(&world);
    let data = read(&mut good, 12345, 100_000).expect("a read");
    same(&data, &held[12345..112_345], 12345).unwrap();
    world.disk.cancel(&name).expect("it runs");
    drop(stalls);
}

/// The time is for the whole negotiation: each byte does not renew it.
#[test]
fn a_client_that_negotiates_forever_is_disconnected() {
    let world = World::mem(14, Tuning::default());
    let timeouts = ClientTimeouts { negotiation: Duration::from_millis(300), ..ClientTimeouts::default() };
    let (name, _) = world.serve_within(LONG, timeouts);
    let mut stream = UnixStream::connect(world.socket()).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    stream.read_exact(&mut [0; 18]).expect("the greeting");
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x03\0\0\xff\xff").unwrap();
    let end = Instant::now() + TIMEOUT;
    // The end of the connection, or a reset because of the bytes that nobody has read.
    let is_served = |stream: &mut UnixStream| {
        let read = stream.read(&mut [0; 1]);
        stream.write_all(b"a").is_ok() && read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    };
    while is_served(&mut stream) {
        assert!(Instant::now() < end, "it is still served");
    }
    world.disk.cancel(&name).expect("it runs");
}

/// The place goes to a client that waits for it, and not before one waits.
#[test]
fn the_longest_silent_client_makes_room_for_one_that_waits() {
    let world = World::mem(14, Tuning::default());
    let timeouts = ClientTimeouts { silence: Duration::from_millis(200), ..ClientTimeouts::default() };
    let (name, held) = world.serve_within(LONG, timeouts);
    let mut silent: Vec<UnixStream> = (0..16).map(|_| connect(&world)).collect();
    std::thread::sleep(2 * timeouts.silence);
    assert_eq!(read(&mut silent[0], 0, 512).expect("no other client waits"), held[..512]);
    let mut next = connect(&world);
    assert_eq!(read(&mut next, 512, 512).expect("a read"), held[512..1024]);
    assert_eq!(silent[1].read(&mut [0; 1]).expect("the end"), 0, "it was silent for longest");
    assert_eq!(read(&mut silent[0], 0, 512).expect("it keeps its place"), held[..512]);
    assert_eq!(read(&mut silent[2], 0, 512).expect("it keeps its place"), held[..512]);
    world.disk.cancel(&name).expect("it runs");
}

/// O_NONBLOCK belongs to the socket, which the process that made it may go on to use.
#[test]
fn the_flags_of_the_makers_socket_stay_as_they_were() {
    let world = World::mem(14, Tuning::default());
    for is_nonblocking in [false, true] {
        let (name, reader) = world.disk.prepare_instant(&world.options(LONG)).expect("a prepared export");
        let _ = std::fs::remove_file(world.socket());
        let listener = UnixListener::bind(world.socket()).expect("a socket");
        listener.set_nonblocking(is_nonblocking).unwrap();
        let ours = listener.try_clone().expect("a descriptor");
        let options = ServerOptions { name: "vda".into(), idle: LONG, timeouts: ClientTimeouts::default() };
        start(listener, reader, options).expect("a served export");
        world.disk.start(&name).expect("nothing is in flight");
        let mut client = connect(&world);
        read(&mut client, 0, 512).expect("a read");
        let flags = rustix::fs::fcntl_getfl(&ours).unwrap();
        assert_eq!(flags.contains(rustix::fs::OFlags::NONBLOCK), is_nonblocking);
        world.disk.cancel(&name).expect("it runs");
    }
}

#[test]
fn a_full_scratch_breaks_the_export_and_not_the_guest() {
    let scratch = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let options = ScratchOptions { directory: scratch.path().into(), size: 4 * CLUSTER };
    let world = World::mem(10, Tuning { scratch: Some(options), ..Tuning::default() });
    let (name, held) = world.serve(LONG);
    let mut client = connect(&world);
    let mut driver = Driver::new(&*world.disk, 1);
    for cluster in 0..4 {
        driver.write(cluster * CLUSTER, &[9; 512]).expect("the guest's write");
    }
    let data = read(&mut client, 0, 5 * CLUSTER as u32 / 2).expect("a read");
    same(&data, &held[..5 * CLUSTER as usize / 2], 0).unwrap();
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0, "the scratch has no name");
    for cluster in 4..20 {
        driver.write(cluster * CLUSTER, &[9; 512]).expect("the guest's write");
    }
    let status = world.wait_ended(&name);
    let error = status.error.expect("why");
    assert!(status.state == "failed" && error.contains("--scratch-size"), "{error}");
    ask(&mut client, 0, 512);
    // The reason, or the end of the connection.
    if let Ok(reply) = reply(&mut client) {
        let (errno, text) = reply.expect_err("no data");
        assert_eq!((errno, &text), (108, &error));
    }
    assert!(world.status(&name).scratch_bytes == 0);
}

#[test]
fn a_scratch_that_fails_or_is_slow_breaks_the_export_and_not_the_guest() {
    let fails = |step| match step {
        CopyStep::Store => Err(std::io::Error::from_raw_os_error(libc::EIO)),
        _ => Ok(()),
    };
    let stopped = Arc::new(AtomicBool::new(false));
    let is_stopped = stopped.clone();
    let hangs = move |step| {
        while step == CopyStep::Store && !is_stopped.load(Relaxed) {
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    };
    let timeout = Duration::from_millis(300);
    for (hook, words) in [
        (Arc::new(fails) as virtioblkd::backend::point_in_time::TargetHook, "cannot take more"),
        (Arc::new(hangs), "waited"),
    ] {
        stopped.store(false, Relaxed);
        let world = World::mem(12, Tuning { hook: Some(hook), timeout, ..Tuning::default() });
        let (name, _) = world.serve(LONG);
        let mut client = connect(&world);
        let mut driver = Driver::new(&*world.disk, 1);
        driver.write(0, &[9; 512]).expect("the guest's write");
        let status = world.wait_ended(&name);
        assert!(status.state == "failed" && status.error.clone().is_some_and(|why| why.contains(words)), "{status:?}");
        let _ = client.write_all(&[0; 28]);
        assert_eq!(client.read_to_end(&mut Vec::new()).unwrap_or(0), 0, "no data after the end");
        driver.write(CLUSTER, &[9; 512]).expect("the guest's write");
        stopped.store(true, Relaxed);
    }
}

#[test]
fn an_export_without_a_client_ends() {
    let world = World::mem(14, Tuning::default());
    let (name, _) = world.serve(Duration::from_millis(50));
    let status = world.wait_ended(&name);
    assert!(
        status.state == "failed" && status.error.clone().is_some_and(|why| why.contains("no client")),
        "{status:?}"
    );
    // And the next one begins.
    let (next, held) = world.serve(LONG);
    let mut client = connect(&world);
    assert_eq!(read(&mut client, 0, 512).unwrap(), held[..512]);
    world.disk.cancel(&next).expect("it runs");
    assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 0, "its client is disconnected");
}

/// A probe that only connects is no backup.
#[test]
fn an_export_that_no_client_used_has_failed() {
    let world = World::mem(14, Tuning::default());
    let (name, _) = world.serve(Duration::from_secs(2));
    drop(UnixStream::connect(world.socket()).expect("it listens"));
    let status = world.wait_ended(&name);
    assert!(
        status.state == "failed" && status.error.clone().is_some_and(|why| why.contains("no client has used")),
        "{status:?}"
    );
}

/// What is cut off looks like a hole, also when the image grows again.
#[test]
fn an_image_that_is_truncated_ends_its_export() {
    let (world, dir) = World::file(CacheMode::Writeback);
    let (name, _) = world.serve(LONG);
    let mut client = connect(&world);
    let image = std::fs::File::options().write(true).open(dir.path().join("image")).expect("the image");
    image.set_len(1 << 20).expect("truncated");
    assert!(read(&mut client, (3 << 20) as u64, 512).is_err(), "it is gone");
    image.set_len(SIZE).expect("grown");
    assert_eq!(world.wait_ended(&name).state, "failed");
}

/// Whoever made the socket can shut it down: poll(2) reports that again and again.
#[test]
fn a_socket_that_is_shut_down_ends_its_export() {
    let world = World::mem(14, Tuning::default());
    let (name, reader) = world.disk.prepare_instant(&world.options(LONG)).expect("a prepared export");
    let listener = UnixListener::bind(world.socket()).expect("a socket");
    let ours = listener.try_clone().expect("a descriptor");
    start(listener, reader, ServerOptions { name: "vda".into(), idle: LONG, timeouts: ClientTimeouts::default() })
        .expect("a served export");
    world.disk.start(&name).expect("nothing is in flight");
    rustix::net::shutdown(&ours, rustix::net::Shutdown::Both).expect("shut down");
    let status = world.wait_ended(&name);
    assert!(status.error.as_ref().is_some_and(|why| why.contains("shut down")), "{status:?}");
}
