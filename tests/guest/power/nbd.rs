//! The NBD protocol, as much of it as QEMU needs to use a disk (doc/proto.md of the NBD project): the fixed newstyle
//! handshake, simple replies.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

const HANDSHAKE: u64 = 0x4e42_444d_4147_4943; // NBDMAGIC
const OPTION: u64 = 0x4948_4156_454f_5054; // IHAVEOPT
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;

/// NBD_FLAG_FIXED_NEWSTYLE and NBD_FLAG_NO_ZEROES.
const HANDSHAKE_FLAGS: u16 = 1 | 2;
/// NBD_FLAG_HAS_FLAGS, _SEND_FLUSH, _SEND_TRIM and _SEND_WRITE_ZEROES. No FUA: a flush is the only way to be sure.
const EXPORT_FLAGS: u16 = 1 | 1 << 2 | 1 << 5 | 1 << 6;

const OPT_ABORT: u32 = 2;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERR_UNSUP: u32 = 1 << 31 | 1;

/// A request, with what the reply must name.
pub struct Request {
    /// NBD's cookie.
    pub cookie: u64,
    /// What to do.
    pub command: Command,
}

/// Offsets and lengths in bytes.
pub enum Command {
    Read {
        offset: u64,
        len: usize,
    },
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    /// Trim or write-zeroes: this disk trims to zeroes.
    Zero {
        offset: u64,
        len: usize,
    },
    Flush,
    Disconnect,
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("NBD: {what}"))
}

fn u16_of(stream: &mut UnixStream) -> io::Result<u16> {
    let mut bytes = [0; 2];
    stream.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}

fn u32_of(stream: &mut UnixStream) -> io::Result<u32> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn u64_of(stream: &mut UnixStream) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

fn bytes_of(stream: &mut UnixStream, len: u32) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Offers one export of `size` bytes until the client takes it. `false`: it went without.
pub fn handshake(stream: &mut UnixStream, size: u64) -> io::Result<bool> {
    let mut hello = HANDSHAKE.to_be_bytes().to_vec();
    hello.extend(OPTION.to_be_bytes());
    hello.extend(HANDSHAKE_FLAGS.to_be_bytes());
    stream.write_all(&hello)?;
    // The client's flags: it may do without anything that we offer.
    u32_of(stream)?;
    loop {
        if u64_of(stream)? != OPTION {
            return Err(bad("no option where one was due"));
        }
        let option = u32_of(stream)?;
        let len = u32_of(stream)?;
        bytes_of(stream, len)?;
        match option {
            OPT_GO | OPT_INFO => {
                // NBD_INFO_EXPORT, number 0.
                let mut info = 0u16.to_be_bytes().to_vec();
                info.extend(size.to_be_bytes());
                info.extend(EXPORT_FLAGS.to_be_bytes());
                reply_to_option(stream, option, REP_INFO, &info)?;
                reply_to_option(stream, option, REP_ACK, &[])?;
                if option == OPT_GO {
                    return Ok(true);
                }
            }
            OPT_ABORT => {
                reply_to_option(stream, option, REP_ACK, &[])?;
                return Ok(false);
            }
            _ => reply_to_option(stream, option, REP_ERR_UNSUP, &[])?,
        }
    }
}

fn reply_to_option(stream: &mut UnixStream, option: u32, reply: u32, data: &[u8]) -> io::Result<()> {
    let mut bytes = OPTION_REPLY.to_be_bytes().to_vec();
    for word in [option, reply, data.len() as u32] {
        bytes.extend(word.to_be_bytes());
    }
    bytes.extend(data);
    stream.write_all(&bytes)
}

/// Reads one request, waiting for all of it.
pub fn request(stream: &mut UnixStream) -> io::Result<Request> {
    if u32_of(stream)? != REQUEST {
        return Err(bad("no request where one was due"));
    }
    let _flags = u16_of(stream)?;
    let (kind, cookie) = (u16_of(stream)?, u64_of(stream)?);
    let (offset, len) = (u64_of(stream)?, u32_of(stream)?);
    let command = match kind {
        0 => Command::Read { offset, len: len as usize },
        1 => Command::Write { offset, data: bytes_of(stream, len)? },
        2 => Command::Disconnect,
        3 => Command::Flush,
        4 | 6 => Command::Zero { offset, len: len as usize },
        other => return Err(bad(&format!("request {other} was not offered"))),
    };
    Ok(Request { cookie, command })
}

/// Says that a request succeeded.
pub fn reply(stream: &mut UnixStream, cookie: u64, data: &[u8]) -> io::Result<()> {
    let mut bytes = REPLY.to_be_bytes().to_vec();
    bytes.extend(0u32.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(data);
    stream.write_all(&bytes)
}
