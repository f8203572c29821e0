//! Messages with descriptors between two daemons. A message is a header (the length of the JSON in bytes, the number of
//! descriptors), the JSON, and one byte for each bundle of descriptors (SCM_RIGHTS, unix(7)). The descriptors are bundled
//! because the kernel takes at most 253 of them with one message.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The most descriptors in one bundle.
const MAX_BUNDLE: usize = 128;

/// The longest JSON in bytes. 256 virtqueues and 509 memory regions take a small part of it.
const MAX_BYTES: u32 = 4 << 20;

/// The most descriptors with one message.
const MAX_DESCRIPTORS: u32 = 2048;

/// One end of the connection between two daemons. Its calls block; each wait for the other end has a timeout.
pub(crate) struct Channel {
    stream: UnixStream,
}

impl Channel {
    /// Creates a channel over a stream that is used for nothing else any more.
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        Ok(Channel { stream })
    }

    /// The stream, to detect that the other end hangs up, or to query its credentials.
    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a message. Fails if the other end does not read all of it within `timeout`.
    pub(crate) fn send(&self, message: &impl Serialize, descriptors: &[OwnedFd], timeout: Duration) -> io::Result<()> {
        let end = Instant::now() + timeout;
        let text = serde_json::to_vec(message)?;
        let mut bytes = [text.len(), descriptors.len()].map(|length| length as u32).map(u32::to_le_bytes).concat();
        bytes.extend(text);
        self.write(&bytes, end)?;
        for bundle in descriptors.chunks(MAX_BUNDLE) {
            let bundle: Vec<BorrowedFd<'_>> = bundle.iter().map(AsFd::as_fd).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_BUNDLE))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !ancillary.push(SendAncillaryMessage::ScmRights(&bundle)) {
                return Err(io::Error::other("too many descriptors at once"));
            }
            self.stream.set_write_timeout(Some(left_until(end).map_err(explain_write)?))?;
            retry_on_intr(|| sendmsg(&self.stream, &[IoSlice::new(b"+")], &mut ancillary, SendFlags::NOSIGNAL))
                .map_err(|errno| explain_write(errno.into()))?;
        }
        Ok(())
    }

    /// Receives a message. Fails if the other end hangs up, does not send all of it within `timeout`, or sends something else;
    /// the error's text says which.
    pub(crate) fn receive<T: DeserializeOwned>(&self, timeout: Duration) -> io::Result<(T, Vec<OwnedFd>)> {
        let end = Instant::now() + timeout;
        let mut header = [0; 8];
        self.read(&mut header, end)?;
        let field = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (length, count) = (field(0), field(4));
        if length > MAX_BYTES || count > MAX_DESCRIPTORS {
            return Err(io::Error::other("it sent something that is not a message of virtioblkd"));
        }
        let mut text = vec![0; length as usize];
        self.read(&mut text, end)?;
        let mut descriptors = Vec::with_capacity(count as usize);
        while descriptors.len() < count as usize {
            self.receive_bundle(&mut descriptors, end)?;
        }
        Ok((serde_json::from_slice(&text)?, descriptors))
    }

    /// Reads all of the bytes. One that comes now and then does not renew the time, because a guest may wait for this.
    fn read(&self, bytes: &mut [u8], end: Instant) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            self.stream.set_read_timeout(Some(left_until(end).map_err(explain_read)?))?;
            match (&self.stream).read(&mut bytes[done..]) {
                Ok(0) => return Err(explain_read(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(explain_read(error)),
            }
        }
        Ok(())
    }

    /// Writes all of the bytes.
    fn write(&self, bytes: &[u8], end: Instant) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            self.stream.set_write_timeout(Some(left_until(end).map_err(explain_write)?))?;
            match (&self.stream).write(&bytes[done..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(explain_write(error)),
            }
        }
        Ok(())
    }

    fn receive_bundle(&self, descriptors: &mut Vec<OwnedFd>, end: Instant) -> io::Result<()> {
        self.stream.set_read_timeout(Some(left_until(end).map_err(explain_read)?))?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_BUNDLE))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = retry_on_intr(|| recvmsg(&self.stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, flags))
            .map_err(|errno| explain_read(errno.into()))?;
        let before = descriptors.len();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(bundle) = message {
                descriptors.extend(bundle);
            }
        }
        if got.bytes == 0 {
            return Err(explain_read(io::ErrorKind::UnexpectedEof.into()));
        }
        if got.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() == before {
            return Err(io::Error::other(format!(
                "descriptors that it sent were lost; {}",
                crate::base::unix_listener::MORE_DESCRIPTORS
            )));
        }
        Ok(())
    }
}

/// The time until then, which is not 0. Fails when there is none left.
fn left_until(end: Instant) -> io::Result<Duration> {
    let left = end.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Explains what an error of a read means for the other end, which the caller's message names.
fn explain_read(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::new(io::ErrorKind::TimedOut, "it sent nothing, or not all, in time")
        }
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
            io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up")
        }
        _ => error,
    }
}

/// Explains what an error of a write means for the other end, which the caller's message names.
fn explain_write(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::new(io::ErrorKind::TimedOut, "not all was read in time")
        }
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => io::Error::new(error.kind(), "it hung up"),
        _ => error,
    }
}

/// The descriptors of a message, which refers to them by their index in this list.
#[derive(Default)]
pub(crate) struct Descriptors {
    list: Vec<Option<OwnedFd>>,
}

impl Descriptors {
    /// The list of the descriptors that were received with a message.
    pub(crate) fn new(received: Vec<OwnedFd>) -> Self {
        Descriptors { list: received.into_iter().map(Some).collect() }
    }

    /// Adds a descriptor. Returns its index.
    pub(crate) fn add(&mut self, descriptor: OwnedFd) -> usize {
        self.list.push(Some(descriptor));
        self.list.len() - 1
    }

    /// Adds a duplicate of a descriptor. Returns its index.
    pub(crate) fn add_copy(&mut self, descriptor: impl AsFd) -> io::Result<usize> {
        Ok(self.add(descriptor.as_fd().try_clone_to_owned()?))
    }

    /// Takes the descriptor with this index. Fails if it was not sent, or was taken already.
    pub(crate) fn take(&mut self, index: usize) -> io::Result<OwnedFd> {
        let taken = self.list.get_mut(index).and_then(Option::take);
        taken.ok_or_else(|| io::Error::other("the message refers to a descriptor that did not come with it"))
    }

    /// All descriptors that were added, in order, for sending.
    pub(crate) fn into_list(self) -> Vec<OwnedFd> {
        self.list.into_iter().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    const SHORT_TIMEOUT: Duration = Duration::from_millis(50);
    const LONG_TIMEOUT: Duration = Duration::from_secs(20);

    fn pair() -> (Channel, Channel) {
        let (here, there) = UnixStream::pair().unwrap();
        (Channel::new(here).unwrap(), Channel::new(there).unwrap())
    }

    #[test]
    fn many_descriptors_arrive_in_order() {
        let (here, there) = pair();
        let files: Vec<OwnedFd> = (0..300)
            .map(|number| {
                let file = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
                rustix::fs::ftruncate(&file, number).unwrap();
                file
            })
            .collect();
        let sender = std::thread::spawn(move || {
            here.send(&"first", &files, LONG_TIMEOUT).unwrap();
            here.send(&"second", &[], LONG_TIMEOUT).unwrap();
        });
        let (text, descriptors): (String, _) = there.receive(LONG_TIMEOUT).unwrap();
        assert_eq!((text.as_str(), descriptors.len()), ("first", 300));
        let mut descriptors = Descriptors::new(descriptors);
        for number in [299, 0, 128, 127] {
            let file = std::fs::File::from(descriptors.take(number).unwrap());
            assert_eq!(file.metadata().unwrap().len(), number as u64);
            let flags = rustix::io::fcntl_getfd(&file).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC), "descriptor {}", file.as_raw_fd());
        }
        assert!(descriptors.take(0).is_err() && descriptors.take(300).is_err());
        assert_eq!(there.receive::<String>(LONG_TIMEOUT).unwrap().0, "second");
        sender.join().unwrap();
    }

    /// Each byte would renew the time, while the guest is paused.
    #[test]
    fn a_message_without_end_is_given_up() {
        let (here, there) = pair();
        let sender = std::thread::spawn(move || {
            let end = Instant::now() + 3 * LONG_TIMEOUT;
            here.stream.set_write_timeout(Some(LONG_TIMEOUT)).unwrap();
            (&here.stream).write_all(&[0, 0, 1, 0, 0, 0, 0, 0]).unwrap();
            while (&here.stream).write_all(b" ").is_ok() {
                assert!(Instant::now() < end, "it is still received");
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        assert!(there.receive::<String>(4 * SHORT_TIMEOUT).err().unwrap().to_string().contains("in time"));
        drop(there);
        sender.join().unwrap();
        // One that is read a byte now and then.
        let (here, there) = pair();
        let reader = std::thread::spawn(move || {
            while (&there.stream).read(&mut [0; 1000]).is_ok_and(|count| count > 0) {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let error = here.send(&"x".repeat(4 << 20), &[], 4 * SHORT_TIMEOUT).unwrap_err();
        assert_eq!(error.to_string(), "not all was read in time");
        drop(here);
        reader.join().unwrap();
    }

    #[test]
    fn a_message_that_is_not_read_is_said_to_be_unread() {
        // The bytes fill the socket.
        let (here, _there) = pair();
        let error = here.send(&"x".repeat(4 << 20), &[], SHORT_TIMEOUT).unwrap_err();
        assert_eq!((error.kind(), error.to_string().as_str()), (io::ErrorKind::TimedOut, "not all was read in time"));
        // The descriptors do.
        let (here, _there) = pair();
        let error = (0..100_000).find_map(|_| {
            let null = std::fs::File::open("/dev/null").unwrap();
            here.send(&"x", &[null.into()], SHORT_TIMEOUT).err()
        });
        assert_eq!(error.unwrap().to_string(), "not all was read in time");
        assert_eq!(here.send(&"x", &[], Duration::ZERO).unwrap_err().to_string(), "not all was read in time");
        let (here, there) = pair();
        drop(there);
        assert_eq!(here.send(&"x", &[], LONG_TIMEOUT).unwrap_err().to_string(), "it hung up");
    }

    #[test]
    fn silence_a_hang_up_and_garbage_are_different_errors() {
        let (here, there) = pair();
        assert!(there.receive::<String>(SHORT_TIMEOUT).err().unwrap().to_string().contains("in time"));
        (&here.stream).write_all(&[0xff; 8]).unwrap();
        assert!(there.receive::<String>(LONG_TIMEOUT).err().unwrap().to_string().contains("not a message"));
        drop(here);
        assert!(there.receive::<String>(LONG_TIMEOUT).err().unwrap().to_string().contains("hung up"));
        // A message that announces a descriptor and does not bring it.
        let (here, there) = pair();
        (&here.stream).write_all(&[2, 0, 0, 0, 1, 0, 0, 0, b'"', b'"', b'+']).unwrap();
        assert!(there.receive::<String>(LONG_TIMEOUT).err().unwrap().to_string().contains("lost"));
    }
}
