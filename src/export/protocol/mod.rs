//! PURE. The server's side of one NBD connection: bytes in, bytes out. It follows NetworkBlockDevice/nbd, doc/proto.md, whose
//! sections the comments name. It serves one export, read-only, in the fixed newstyle and without TLS.
//!
//! The owner feeds it what the client sends ([`Connection::feed`]) and does what each [`Step`] says until
//! [`Connection::step`] returns [`Step::Wait`]. It carries out the requests itself, and encodes its replies with the methods
//! of `replies`.
//!
//! Everything that a client sends is bounded: an option by [`MAX_OPTION`], their number by [`MAX_OPTIONS`], and a read by
//! [`MAX_READ`].

mod negotiation;
mod replies;
#[cfg(test)]
mod tests;
mod transmission;
pub(super) mod wire;

use std::sync::Arc;

use wire::{FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Fields, IHAVEOPT, NBDMAGIC, Put};

pub use replies::{Errno, Extent};

/// The longest data of an option, in bytes. Longer data is skipped, and the option fails.
pub const MAX_OPTION: usize = 64 << 10;

/// The most options of one connection. A client needs about ten.
pub const MAX_OPTIONS: u32 = 256;

/// The longest read, in bytes, and the most bytes of a refused message that are skipped; after more the connection ends.
/// The default of "Size constraints".
pub const MAX_READ: u32 = 32 << 20;

/// The longest read that is replied to in one chunk (NBD_CMD_FLAG_DF), in bytes. At least 64 KiB, by "Command flags".
pub const MAX_CHUNK: u32 = 256 << 10;

/// The metadata context of holes ("`base:allocation` metadata context").
pub const BASE_ALLOCATION: &str = "base:allocation";

/// The status of `base:allocation` for a range that is a hole and reads as zeroes: NBD_STATE_HOLE and NBD_STATE_ZERO.
pub const HOLE: u32 = 3;

/// What a client sees of the export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The name. A client that names none gets this export, too.
    pub name: String,
    /// The size in bytes.
    pub size: u64,
    /// The names of the metadata contexts: [`BASE_ALLOCATION`], and one `qemu:dirty-bitmap:NAME` at most, because
    /// ovirt-imageio refuses an export with several (`_query_dirty_bitmap`). An [`Extent`] has their status in this order.
    pub contexts: Vec<String>,
}

/// What the owner of a connection does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Feed more bytes.
    Wait,
    /// Send this.
    Send(Vec<u8>),
    /// Carry this out and send its reply.
    Run(Request),
    /// Close the connection.
    End(End),
}

/// Why a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The client said so: NBD_OPT_ABORT or NBD_CMD_DISC.
    Client,
    /// The client broke the protocol, in the way that the text names.
    Violation(&'static str),
}

/// A request that lies inside the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// NBD_CMD_READ.
    Read(Span),
    /// NBD_CMD_BLOCK_STATUS; `one`: of the first extent alone (NBD_CMD_FLAG_REQ_ONE).
    BlockStatus {
        /// The range.
        span: Span,
        /// Reply with one extent.
        one: bool,
    },
}

/// The range of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The client's number for the request, which the reply repeats.
    pub cookie: u64,
    /// The first byte.
    pub offset: u64,
    /// The length in bytes; never 0.
    pub len: u32,
}

/// The phase of a connection ("Protocol phases").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The greeting is not sent yet.
    Greeting,
    /// The client's flags are next.
    ClientFlags,
    /// An option is next ("Fixed newstyle negotiation").
    Options,
    /// A request is next.
    Transmission,
    /// The client has ended the negotiation (NBD_OPT_ABORT).
    Aborted,
}

/// One connection.
pub struct Connection {
    export: Arc<Export>,
    phase: Phase,
    /// Bytes of the client that are not used yet.
    input: Vec<u8>,
    /// How many further bytes of the client to skip.
    skip: u64,
    /// What to send once they are skipped.
    after_skip: Vec<u8>,
    /// The client wants no padding (NBD_FLAG_C_NO_ZEROES).
    no_zeroes: bool,
    /// The client understands structured replies.
    structured: bool,
    /// The positions in `export.contexts` that the client has selected.
    selected: Vec<usize>,
    options: u32,
}

impl Connection {
    /// Begins a connection. Its first step is the greeting.
    pub fn new(export: Arc<Export>) -> Self {
        Connection {
            export,
            phase: Phase::Greeting,
            input: Vec::new(),
            skip: 0,
            after_skip: Vec::new(),
            no_zeroes: false,
            structured: false,
            selected: Vec::new(),
            options: 0,
        }
    }

    /// Adds bytes of the client.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Whether the negotiation is over, so that the client may pause for as long as it likes.
    pub fn is_negotiated(&self) -> bool {
        self.phase == Phase::Transmission
    }

    /// Returns the next step.
    pub fn step(&mut self) -> Step {
        let skipped = self.skip.min(self.input.len() as u64);
        self.input.drain(..skipped as usize);
        self.skip -= skipped;
        if self.skip > 0 {
            return Step::Wait;
        }
        if !self.after_skip.is_empty() {
            return Step::Send(std::mem::take(&mut self.after_skip));
        }
        match self.phase {
            Phase::Greeting => {
                self.phase = Phase::ClientFlags;
                let mut greeting = Vec::new();
                greeting.put64(NBDMAGIC);
                greeting.put64(IHAVEOPT);
                greeting.put16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
                Step::Send(greeting)
            }
            Phase::ClientFlags => self.client_flags(),
            Phase::Options => self.next_option(),
            Phase::Transmission => self.next_request(),
            Phase::Aborted => Step::End(End::Client),
        }
    }

    /// Reads the client's flags ("Client flags").
    fn client_flags(&mut self) -> Step {
        let Some(flags) = Fields(&self.input).u32() else { return Step::Wait };
        self.input.drain(..4);
        if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
            return Step::End(End::Violation("its flags are unknown"));
        }
        self.no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
        self.phase = Phase::Options;
        self.next_option()
    }

    /// Skips `len` bytes of the client that come next, and then sends `reply`.
    fn skip_then(&mut self, len: u64, reply: Vec<u8>) -> Step {
        if len > u64::from(MAX_READ) {
            return Step::End(End::Violation("it sends a message that is too long"));
        }
        (self.skip, self.after_skip) = (len, reply);
        self.step()
    }
}
