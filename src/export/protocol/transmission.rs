//! PURE. The requests of the transmission phase ("Request types").

use super::wire::*;
use super::{Connection, End, Errno, MAX_CHUNK, MAX_READ, Request, Span, Step};

impl Connection {
    pub(super) fn next_request(&mut self) -> Step {
        let mut fields = Fields(&self.input);
        let magic = fields.u32();
        let (Some(flags), Some(kind), Some(cookie), Some(offset), Some(len)) =
            (fields.u16(), fields.u16(), fields.u64(), fields.u64(), fields.u32())
        else {
            return Step::Wait;
        };
        self.input.drain(..REQUEST_SIZE);
        if magic != Some(REQUEST_MAGIC) {
            return Step::End(End::Violation("a request has another magic number"));
        }
        let span = Span { cookie, offset, len };
        let refused = |errno, why| Step::Send(self.error(cookie, errno, why));
        let allowed = match kind {
            CMD_READ => CMD_FLAG_DF,
            CMD_BLOCK_STATUS => CMD_FLAG_REQ_ONE,
            CMD_DISC => return Step::End(End::Client),
            CMD_WRITE => {
                let refusal = self.error(cookie, Errno::Permission, "the export is read-only");
                return self.skip_then(len.into(), refusal);
            }
            CMD_TRIM | CMD_WRITE_ZEROES => return refused(Errno::Permission, "the export is read-only"),
            _ => return refused(Errno::Invalid, "this server does not have the request"),
        };
        if flags & !allowed != 0 {
            return refused(Errno::Invalid, "the request has a flag that it cannot have");
        }
        if len == 0 || offset.checked_add(len.into()).is_none_or(|end| end > self.export.size) {
            return refused(Errno::Invalid, "the range is not inside the export");
        }
        match kind {
            CMD_READ if len > MAX_READ => refused(Errno::Overflow, "the read is longer than the maximum block size"),
            CMD_READ if flags & CMD_FLAG_DF != 0 && len > MAX_CHUNK => {
                refused(Errno::Overflow, "the read is too long for one chunk")
            }
            CMD_READ => Step::Run(Request::Read(span)),
            _ if self.selected.is_empty() => refused(Errno::Invalid, "no metadata context was selected"),
            _ => Step::Run(Request::BlockStatus { span, one: flags & CMD_FLAG_REQ_ONE != 0 }),
        }
    }
}
