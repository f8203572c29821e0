//! PURE. The options of the handshake ("Option types").

use super::wire::*;
use super::{Connection, End, MAX_OPTION, MAX_OPTIONS, MAX_READ, Phase, Step};

/// The fixed part of an option: magic, option, length.
const OPTION_HEADER: usize = 16;

/// The smallest read in bytes: the instant's reader rounds to blocks itself.
const MIN_BLOCK: u32 = 1;

/// The size that reads should be multiples of, in bytes.
const PREFERRED_BLOCK: u32 = 4096;

/// Adds one reply to an option ("Fixed newstyle negotiation").
fn reply(to: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    to.put64(OPTION_REPLY_MAGIC);
    to.put32(option);
    to.put32(kind);
    to.put32(data.len() as u32);
    to.extend_from_slice(data);
}

fn only(option: u32, kind: u32, text: &str) -> Vec<u8> {
    let mut message = Vec::new();
    reply(&mut message, option, kind, text.as_bytes());
    message
}

impl Connection {
    pub(super) fn next_option(&mut self) -> Step {
        let mut fields = Fields(&self.input);
        let (Some(magic), Some(option), Some(len)) = (fields.u64(), fields.u32(), fields.u32()) else {
            return Step::Wait;
        };
        if magic != IHAVEOPT {
            return Step::End(End::Violation("an option has another magic number"));
        }
        if len as usize > MAX_OPTION {
            self.input.drain(..OPTION_HEADER);
            return match option {
                // It can have no error reply.
                OPT_EXPORT_NAME => Step::End(End::Violation("it names an unknown export")),
                _ => self.skip_then(len.into(), only(option, REP_ERR_TOO_BIG, "the option is too long")),
            };
        }
        let Some(data) = fields.bytes(len as usize).map(<[u8]>::to_vec) else { return Step::Wait };
        self.input.drain(..OPTION_HEADER + len as usize);
        self.options += 1;
        if self.options > MAX_OPTIONS {
            return Step::End(End::Violation("it sends too many options"));
        }
        self.option(option, &data)
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Step {
        let no_data = |message: Vec<u8>| match data.is_empty() {
            true => message,
            false => only(option, REP_ERR_INVALID, "this option has no data"),
        };
        Step::Send(match option {
            OPT_EXPORT_NAME => return self.export_name(data),
            OPT_ABORT => {
                self.phase = Phase::Aborted;
                only(option, REP_ACK, "")
            }
            OPT_LIST => no_data(self.list(option)),
            OPT_INFO | OPT_GO => self.info_or_go(option, data),
            OPT_STRUCTURED_REPLY => {
                self.structured |= data.is_empty();
                no_data(only(option, REP_ACK, ""))
            }
            OPT_LIST_META_CONTEXT => self.list_contexts(option, data),
            OPT_SET_META_CONTEXT => self.set_contexts(option, data),
            _ => only(option, REP_ERR_UNSUP, "this server does not have the option"),
        })
    }

    fn is_ours(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.export.name.as_bytes()
    }

    fn flags() -> u16 {
        FLAG_HAS_FLAGS | FLAG_READ_ONLY | FLAG_SEND_DF | FLAG_CAN_MULTI_CONN
    }

    fn export_name(&mut self, name: &[u8]) -> Step {
        if !self.is_ours(name) {
            return Step::End(End::Violation("it names an unknown export"));
        }
        self.phase = Phase::Transmission;
        let mut message = Vec::new();
        message.put64(self.export.size);
        message.put16(Self::flags());
        if !self.no_zeroes {
            message.resize(message.len() + 124, 0);
        }
        Step::Send(message)
    }

    fn list(&self, option: u32) -> Vec<u8> {
        let mut name = Vec::new();
        name.put32(self.export.name.len() as u32);
        name.extend_from_slice(self.export.name.as_bytes());
        let mut message = Vec::new();
        reply(&mut message, option, REP_SERVER, &name);
        reply(&mut message, option, REP_ACK, b"");
        message
    }

    fn info_or_go(&mut self, option: u32, data: &[u8]) -> Vec<u8> {
        let Some((name, wanted)) = read_info(data) else {
            return only(option, REP_ERR_INVALID, "the option's data is malformed");
        };
        if !self.is_ours(name) {
            return only(option, REP_ERR_UNKNOWN, "there is no such export");
        }
        let mut message = Vec::new();
        let mut info = |kind: u16, fill: &dyn Fn(&mut Vec<u8>)| {
            let mut data = Vec::new();
            data.put16(kind);
            fill(&mut data);
            reply(&mut message, option, REP_INFO, &data);
        };
        if wanted.contains(&INFO_NAME) {
            info(INFO_NAME, &|data| data.extend_from_slice(self.export.name.as_bytes()));
        }
        // Clients that do not ask ignore it ("NBD_OPT_INFO and NBD_OPT_GO").
        info(INFO_BLOCK_SIZE, &|data| [MIN_BLOCK, PREFERRED_BLOCK, MAX_READ].iter().for_each(|size| data.put32(*size)));
        info(INFO_EXPORT, &|data| {
            data.put64(self.export.size);
            data.put16(Self::flags());
        });
        reply(&mut message, option, REP_ACK, b"");
        if option == OPT_GO {
            self.phase = Phase::Transmission;
        }
        message
    }

    fn list_contexts(&self, option: u32, data: &[u8]) -> Vec<u8> {
        let Some((name, queries)) = read_queries(data) else {
            return only(option, REP_ERR_INVALID, "the option's data is malformed");
        };
        if !self.is_ours(name) {
            return only(option, REP_ERR_UNKNOWN, "there is no such export");
        }
        // A query that ends with a colon lists what begins with it (QEMU, docs/interop/nbd.rst).
        let matches =
            |context: &[u8], query: &[u8]| context == query || (query.ends_with(b":") && context.starts_with(query));
        let mut message = Vec::new();
        for context in &self.export.contexts {
            if queries.is_empty() || queries.iter().any(|query| matches(context.as_bytes(), query)) {
                reply(&mut message, option, REP_META_CONTEXT, &context_reply(0, context));
            }
        }
        reply(&mut message, option, REP_ACK, b"");
        message
    }

    fn set_contexts(&mut self, option: u32, data: &[u8]) -> Vec<u8> {
        // "replaces all previously-set metadata contexts (including when this command fails)".
        self.selected.clear();
        if !self.structured {
            return only(option, REP_ERR_INVALID, "structured replies must be negotiated first");
        }
        let Some((name, queries)) = read_queries(data) else {
            return only(option, REP_ERR_INVALID, "the option's data is malformed");
        };
        if !self.is_ours(name) {
            return only(option, REP_ERR_UNKNOWN, "there is no such export");
        }
        let mut message = Vec::new();
        for (at, context) in self.export.contexts.iter().enumerate() {
            if queries.contains(&context.as_bytes()) {
                self.selected.push(at);
                reply(&mut message, option, REP_META_CONTEXT, &context_reply(at as u32 + 1, context));
            }
        }
        reply(&mut message, option, REP_ACK, b"");
        message
    }
}

fn context_reply(id: u32, context: &str) -> Vec<u8> {
    let mut data = Vec::new();
    data.put32(id);
    data.extend_from_slice(context.as_bytes());
    data
}

/// Reads the data of NBD_OPT_INFO and NBD_OPT_GO: the name and the kinds of information.
fn read_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u16()?;
    let wanted = (0..count).map(|_| fields.u16()).collect::<Option<_>>()?;
    fields.is_empty().then_some((name, wanted))
}

/// Reads the data of the two options for metadata contexts: the name and the queries.
fn read_queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    let queries = (0..count).map(|_| fields.string()).collect::<Option<_>>()?;
    fields.is_empty().then_some((name, queries))
}
