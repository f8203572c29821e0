//! Recognizes by its first bytes whether a connection speaks vhost-user. The bytes stay in the socket.

use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

/// The length in bytes of a vhost-user message's header: request, flags, size of the body.
const HEADER_BYTES: usize = 12;
/// No request has a larger number, and no body is larger (QEMU's docs/interop/vhost-user.rst).
const MAX_REQUEST: u32 = 64;
const MAX_BODY: u32 = 4096;
/// The bits of the flags that hold the version, which is 1, and mark a reply.
const VERSION_AND_REPLY: u32 = 0b111;

/// What a connection has sent so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FirstBytes {
    /// The other side has sent nothing.
    None,
    /// It has sent a vhost-user message.
    Message,
    /// It has sent bytes that begin no vhost-user message.
    Other,
    /// It has sent nothing and closed the connection.
    End,
}

impl FirstBytes {
    /// Checks the bytes that the other side has sent and this process has not read. Never blocks.
    pub(crate) fn of(connection: &UnixStream) -> FirstBytes {
        let mut header = [0; HEADER_BYTES];
        match recv(connection, &mut header, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((_, 0)) => FirstBytes::End,
            Ok((_, HEADER_BYTES)) if is_header(&header) => FirstBytes::Message,
            // Front-ends send a message in one piece.
            Ok(_) => FirstBytes::Other,
            Err(Errno::WOULDBLOCK | Errno::INTR) => FirstBytes::None,
            Err(_) => FirstBytes::End,
        }
    }
}

fn is_header(header: &[u8; HEADER_BYTES]) -> bool {
    let number = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("four bytes"));
    let (request, flags, body) = (number(0), number(4), number(8));
    (1..=MAX_REQUEST).contains(&request) && flags & VERSION_AND_REPLY == 1 && body <= MAX_BODY
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_vhost_user_message_is_recognized_and_stays_in_the_socket() {
        let get_features = [1u32, 1, 0].map(u32::to_ne_bytes).concat();
        let reply = [1u32, 5, 8].map(u32::to_ne_bytes).concat();
        let cases: [(&[u8], FirstBytes); 5] = [
            (b"", FirstBytes::None),
            (&get_features, FirstBytes::Message),
            (&get_features[..5], FirstBytes::Other),
            (&reply, FirstBytes::Other),
            (br#"{"execute":"qmp_capabilities"}"#, FirstBytes::Other),
        ];
        for (bytes, expected) in cases {
            let (mut there, here) = UnixStream::pair().unwrap();
            there.write_all(bytes).unwrap();
            assert_eq!(FirstBytes::of(&here), expected, "{bytes:?}");
            assert_eq!(FirstBytes::of(&here), expected, "it stays");
        }
        let (there, here) = UnixStream::pair().unwrap();
        there.shutdown(std::net::Shutdown::Both).unwrap();
        assert_eq!(FirstBytes::of(&here), FirstBytes::End);
    }
}
