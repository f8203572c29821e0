//! A client of an export, which finds out what the instant held where. `virtioblkctl map` uses it.
//!
//! The server may be any program: what it sends is bounded, and each wait for it ends.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::protocol::wire::*;

/// How long the server may take to accept us, and for each message. A reply waits for the image for 30 s at most.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// The longest message that is read, in bytes. A server of ours sends less.
const MAX_MESSAGE: u32 = 16 << 20;

/// The most messages that reply to one question. A server of ours sends three at most.
const MAX_MESSAGES: usize = 100;

/// The longest range that is asked for at once: a whole number of any server's blocks.
const MAX_REQUEST: u64 = u32::MAX as u64 + 1 - (64 << 10);

/// A connection that may ask for the status of one metadata context.
pub struct Client {
    stream: UnixStream,
    size: u64,
    context: u32,
    cookie: u64,
}

/// A reply to an option.
struct OptionReply {
    kind: u32,
    data: Vec<u8>,
}

/// A part of a reply to a request ("Structured reply chunk message").
struct Chunk {
    is_last: bool,
    kind: u16,
    payload: Vec<u8>,
}

impl Client {
    /// Connects to the socket of a server and selects a metadata context of the export.
    pub fn connect(socket: &Path, export: &str, context: &str) -> io::Result<Self> {
        let stream = open(socket, Instant::now() + REPLY_TIMEOUT)?;
        stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
        stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
        let mut client = Client { stream, size: 0, context: 0, cookie: 0 };
        client.greet()?;
        client.option(OPT_STRUCTURED_REPLY, b"", |_| Ok(()))?;
        client.context = client.select(export, context)?;
        client.size = client.go(export)?;
        Ok(client)
    }

    /// The size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn greet(&mut self) -> io::Result<()> {
        let mut greeting = [0; 18];
        self.stream.read_exact(&mut greeting)?;
        let mut fields = Fields(&greeting);
        if fields.u64() != Some(NBDMAGIC) || fields.u64() != Some(IHAVEOPT) {
            return Err(violation("it is no NBD server"));
        }
        if fields.u16().is_none_or(|flags| flags & FLAG_FIXED_NEWSTYLE == 0) {
            return Err(violation("it does not have the fixed newstyle negotiation"));
        }
        let mut flags = Vec::new();
        flags.put32((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).into());
        self.stream.write_all(&flags)
    }

    /// Returns the server's number for the context.
    fn select(&mut self, export: &str, context: &str) -> io::Result<u32> {
        let mut query = Vec::new();
        put_string(&mut query, export);
        query.put32(1);
        put_string(&mut query, context);
        let mut id = None;
        self.option(OPT_SET_META_CONTEXT, &query, |reply| {
            let mut fields = Fields(&reply.data);
            match (reply.kind, fields.u32()) {
                (REP_META_CONTEXT, Some(number)) if fields.0 == context.as_bytes() => {
                    id = Some(number);
                    Ok(())
                }
                _ => Err(violation("it replies wrongly to a query of metadata contexts")),
            }
        })?;
        id.ok_or_else(|| io::Error::new(ErrorKind::NotFound, format!("the export has no metadata context '{context}'")))
    }

    /// Ends the negotiation. Returns the export's size.
    fn go(&mut self, export: &str) -> io::Result<u64> {
        let mut name = Vec::new();
        put_string(&mut name, export);
        name.put16(0);
        let mut size = None;
        self.option(OPT_GO, &name, |reply| {
            let mut fields = Fields(&reply.data);
            if (reply.kind, fields.u16()) == (REP_INFO, Some(INFO_EXPORT)) {
                size = fields.u64();
            }
            Ok(())
        })?;
        size.ok_or_else(|| violation("it does not say how large the export is"))
    }

    /// Sends an option and passes its replies to `handle`, until the server has acknowledged it.
    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        mut handle: impl FnMut(OptionReply) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut message = Vec::new();
        message.put64(IHAVEOPT);
        message.put32(option);
        message.put32(data.len() as u32);
        message.extend_from_slice(data);
        self.stream.write_all(&message)?;
        for _ in 0..MAX_MESSAGES {
            let reply = self.option_reply(option)?;
            match reply.kind {
                REP_ACK => return Ok(()),
                kind if kind & REP_ERROR != 0 => {
                    let text = String::from_utf8_lossy(&reply.data);
                    return Err(io::Error::other(format!("it refuses the option {option}: {text}")));
                }
                _ => handle(reply)?,
            }
        }
        Err(violation("it does not come to an end of its replies"))
    }

    fn option_reply(&mut self, option: u32) -> io::Result<OptionReply> {
        let mut header = [0; 20];
        self.stream.read_exact(&mut header)?;
        let mut fields = Fields(&header);
        let (magic, of) = (fields.u64(), fields.u32());
        let (Some(OPTION_REPLY_MAGIC), Some(kind), Some(len)) = (magic, fields.u32(), fields.u32()) else {
            return Err(violation("a reply to an option has another magic number"));
        };
        if of != Some(option) {
            return Err(violation("a reply is for another option"));
        }
        Ok(OptionReply { kind, data: self.bytes(len)? })
    }

    /// Returns lengths and statuses from a byte of the export on, without gaps. There is one at least. They may end before
    /// the export does.
    pub fn block_status(&mut self, offset: u64) -> io::Result<Vec<(u64, u32)>> {
        self.cookie += 1;
        let mut request = Vec::new();
        request.put32(REQUEST_MAGIC);
        request.put16(0);
        request.put16(CMD_BLOCK_STATUS);
        request.put64(self.cookie);
        request.put64(offset);
        request.put32((self.size - offset).min(MAX_REQUEST) as u32);
        self.stream.write_all(&request)?;
        let mut found = Vec::new();
        let mut left = self.size - offset;
        for _ in 0..MAX_MESSAGES {
            let chunk = self.chunk()?;
            let mut fields = Fields(&chunk.payload);
            match chunk.kind {
                REPLY_TYPE_BLOCK_STATUS if fields.u32() == Some(self.context) => {
                    while let (Some(len), Some(status)) = (fields.u32(), fields.u32()) {
                        let len = u64::from(len).min(left);
                        left -= len;
                        found.extend((len > 0).then_some((len, status)));
                    }
                }
                REPLY_TYPE_NONE => {}
                kind if kind & REPLY_TYPE_IS_ERROR != 0 => return Err(error_of(fields)),
                _ => return Err(violation("it replies to a block status with something else")),
            }
            if chunk.is_last {
                return match found.is_empty() {
                    true => Err(violation("it replies to a block status with nothing")),
                    false => Ok(found),
                };
            }
        }
        Err(violation("it does not come to an end of its replies"))
    }

    fn chunk(&mut self) -> io::Result<Chunk> {
        let mut header = [0; 20];
        self.stream.read_exact(&mut header)?;
        let mut fields = Fields(&header);
        let magic = fields.u32();
        let (Some(STRUCTURED_REPLY_MAGIC), Some(flags), Some(kind)) = (magic, fields.u16(), fields.u16()) else {
            return Err(violation("a reply has another magic number"));
        };
        let (cookie, len) = (fields.u64(), fields.u32());
        if cookie != Some(self.cookie) {
            return Err(violation("a reply is to another request"));
        }
        Ok(Chunk { is_last: flags & REPLY_FLAG_DONE != 0, kind, payload: self.bytes(len.unwrap_or(0))? })
    }

    fn bytes(&mut self, len: u32) -> io::Result<Vec<u8>> {
        if len > MAX_MESSAGE {
            return Err(violation("it sends a message that is too long"));
        }
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }
}

impl Drop for Client {
    /// Says goodbye (NBD_CMD_DISC), so that the server has nothing to report.
    fn drop(&mut self) {
        let mut request = Vec::new();
        request.put32(REQUEST_MAGIC);
        request.put16(0);
        request.put16(CMD_DISC);
        request.resize(REQUEST_SIZE, 0);
        // The server may be gone.
        let _ = self.stream.write_all(&request);
    }
}

/// Connects. A server whose queue is full is waited for until `deadline`.
fn open(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    loop {
        match connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn put_string(to: &mut Vec<u8>, text: &str) {
    to.put32(text.len() as u32);
    to.extend_from_slice(text.as_bytes());
}

fn violation(why: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

/// The text of an error chunk's payload.
fn error_of(mut fields: Fields<'_>) -> io::Error {
    let errno = fields.u32().unwrap_or(0);
    let text = fields.u16().and_then(|len| fields.bytes(len.into())).unwrap_or_default();
    io::Error::other(format!("{} (NBD error {errno})", String::from_utf8_lossy(text)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::prng::Prng;
    use std::os::unix::net::UnixListener;
    use std::thread;

    /// An option's reply.
    fn option(kind: u32, of: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.put64(OPTION_REPLY_MAGIC);
        bytes.put32(of);
        bytes.put32(kind);
        bytes.put32(data.len() as u32);
        bytes.extend_from_slice(data);
        bytes
    }

    fn chunk(flags: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.put32(STRUCTURED_REPLY_MAGIC);
        bytes.put16(flags);
        bytes.put16(kind);
        bytes.put64(1);
        bytes.put32(payload.len() as u32);
        bytes.extend_from_slice(payload);
        bytes
    }

    /// All that a server says to a client that asks for one block status of an export of 1 MiB.
    fn talk(chunks: &[Vec<u8>]) -> Vec<u8> {
        let mut info = b"\0\0".to_vec();
        info.put64(1 << 20);
        info.put16(FLAG_HAS_FLAGS);
        [
            b"NBDMAGICIHAVEOPT\0\x03".to_vec(),
            option(REP_ACK, OPT_STRUCTURED_REPLY, b""),
            option(REP_META_CONTEXT, OPT_SET_META_CONTEXT, b"\0\0\0\x05base:allocation"),
            option(REP_ACK, OPT_SET_META_CONTEXT, b""),
            option(REP_INFO, OPT_GO, &info),
            option(REP_ACK, OPT_GO, b""),
            chunks.concat(),
        ]
        .concat()
    }

    fn extents(of: u32, extents: &[(u32, u32)]) -> Vec<u8> {
        let mut payload = of.to_be_bytes().to_vec();
        extents.iter().for_each(|(len, status)| {
            payload.put32(*len);
            payload.put32(*status);
        });
        payload
    }

    /// What a client makes of a server that says this and hangs up.
    fn ask(said: &[u8]) -> Result<Vec<(u64, u32)>, String> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nbd");
        let listener = UnixListener::bind(&socket).unwrap();
        thread::scope(|scope| {
            scope.spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                // The client may have left.
                let _ = stream.write_all(said);
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let _ = io::copy(&mut stream, &mut io::sink());
            });
            let client = Client::connect(&socket, "vda", "base:allocation");
            client.and_then(|mut client| client.block_status(0)).map_err(|error| error.to_string())
        })
    }

    #[test]
    fn extents_end_with_the_export() {
        let status = |extents: &[u8]| ask(&talk(&[chunk(REPLY_FLAG_DONE, REPLY_TYPE_BLOCK_STATUS, extents)]));
        assert_eq!(status(&extents(5, &[(4096, 0), (8192, 3)])), Ok(vec![(4096, 0), (8192, 3)]));
        assert_eq!(status(&extents(5, &[(u32::MAX, 3), (4096, 0)])), Ok(vec![(1 << 20, 3)]));
    }

    #[test]
    fn a_server_that_lies_is_an_error() {
        let status = |extents: &[u8]| chunk(REPLY_FLAG_DONE, REPLY_TYPE_BLOCK_STATUS, extents);
        let unfinished = vec![chunk(0, REPLY_TYPE_NONE, b""); MAX_MESSAGES];
        let error = [&extents(108, &[])[..], &[0, 2], b"no"].concat();
        for (said, words) in [
            (b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(), "no NBD server"),
            (talk(&[status(&extents(6, &[(4096, 0)]))]), "something else"),
            (talk(&[status(&extents(5, &[]))]), "with nothing"),
            (talk(&[status(&extents(5, &[(0, 0)]))]), "with nothing"),
            (talk(&unfinished), "an end"),
            (talk(&[chunk(REPLY_FLAG_DONE, REPLY_TYPE_ERROR, &error)]), "no (NBD error 108)"),
            (talk(&[]), "fill whole buffer"),
        ] {
            let refused = ask(&said).expect_err(words);
            assert!(refused.contains(words), "'{words}' is not in '{refused}'");
        }
    }

    #[test]
    fn damaged_bytes_never_panic() {
        let good = talk(&[chunk(REPLY_FLAG_DONE, REPLY_TYPE_BLOCK_STATUS, &extents(5, &[(4096, 0)]))]);
        let mut prng = Prng::new(1);
        for _ in 0..300 {
            let mut bad = good.clone();
            let at = prng.below(bad.len() as u64) as usize;
            bad[at] ^= 1 << prng.below(8);
            bad.truncate(bad.len() - prng.below(3) as usize * 7);
            let _ = ask(&bad);
        }
    }
}
