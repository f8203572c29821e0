//! PURE. The numbers of the NBD protocol (NetworkBlockDevice/nbd, doc/proto.md, "Values"), and reading and writing its
//! fields, which are big-endian.

pub(in crate::export) const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
pub(in crate::export) const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
pub(in crate::export) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(in crate::export) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(in crate::export) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(in crate::export) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, and the client's flags with the same bits.
pub(in crate::export) const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub(in crate::export) const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Transmission flags.
pub(in crate::export) const FLAG_HAS_FLAGS: u16 = 1;
pub(in crate::export) const FLAG_READ_ONLY: u16 = 1 << 1;
pub(in crate::export) const FLAG_SEND_DF: u16 = 1 << 7;
pub(in crate::export) const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

pub(in crate::export) const OPT_EXPORT_NAME: u32 = 1;
pub(in crate::export) const OPT_ABORT: u32 = 2;
pub(in crate::export) const OPT_LIST: u32 = 3;
pub(in crate::export) const OPT_INFO: u32 = 6;
pub(in crate::export) const OPT_GO: u32 = 7;
pub(in crate::export) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(in crate::export) const OPT_LIST_META_CONTEXT: u32 = 9;
pub(in crate::export) const OPT_SET_META_CONTEXT: u32 = 10;

pub(in crate::export) const REP_ACK: u32 = 1;
pub(in crate::export) const REP_SERVER: u32 = 2;
pub(in crate::export) const REP_INFO: u32 = 3;
pub(in crate::export) const REP_META_CONTEXT: u32 = 4;
/// Replies that are errors have this bit.
pub(in crate::export) const REP_ERROR: u32 = 1 << 31;
pub(in crate::export) const REP_ERR_UNSUP: u32 = 1 << 31 | 1;
pub(in crate::export) const REP_ERR_INVALID: u32 = 1 << 31 | 3;
pub(in crate::export) const REP_ERR_UNKNOWN: u32 = 1 << 31 | 6;
pub(in crate::export) const REP_ERR_TOO_BIG: u32 = 1 << 31 | 9;

pub(in crate::export) const INFO_EXPORT: u16 = 0;
pub(in crate::export) const INFO_NAME: u16 = 1;
pub(in crate::export) const INFO_BLOCK_SIZE: u16 = 3;

pub(in crate::export) const CMD_READ: u16 = 0;
pub(in crate::export) const CMD_WRITE: u16 = 1;
pub(in crate::export) const CMD_DISC: u16 = 2;
pub(in crate::export) const CMD_TRIM: u16 = 4;
pub(in crate::export) const CMD_WRITE_ZEROES: u16 = 6;
pub(in crate::export) const CMD_BLOCK_STATUS: u16 = 7;

pub(in crate::export) const CMD_FLAG_DF: u16 = 1 << 2;
pub(in crate::export) const CMD_FLAG_REQ_ONE: u16 = 1 << 3;

pub(in crate::export) const REPLY_FLAG_DONE: u16 = 1;
pub(in crate::export) const REPLY_TYPE_NONE: u16 = 0;
pub(in crate::export) const REPLY_TYPE_OFFSET_DATA: u16 = 1;
pub(in crate::export) const REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// Chunks that are errors have this bit.
pub(in crate::export) const REPLY_TYPE_IS_ERROR: u16 = 1 << 15;
pub(in crate::export) const REPLY_TYPE_ERROR: u16 = 1 << 15 | 1;

/// The length of a request without its payload ("Request message").
pub(in crate::export) const REQUEST_SIZE: usize = 28;

/// Takes fields from the front of a message. Each method returns `None` when the message is too short.
pub(in crate::export) struct Fields<'a>(pub(in crate::export) &'a [u8]);

impl<'a> Fields<'a> {
    pub(in crate::export) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    pub(in crate::export) fn u16(&mut self) -> Option<u16> {
        self.bytes(2).map(|bytes| u16::from_be_bytes(bytes.try_into().expect("two bytes")))
    }

    pub(in crate::export) fn u32(&mut self) -> Option<u32> {
        self.bytes(4).map(|bytes| u32::from_be_bytes(bytes.try_into().expect("four bytes")))
    }

    pub(in crate::export) fn u64(&mut self) -> Option<u64> {
        self.bytes(8).map(|bytes| u64::from_be_bytes(bytes.try_into().expect("eight bytes")))
    }

    /// A string with its length in front.
    pub(in crate::export) fn string(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.bytes(len as usize)
    }

    /// Whether every field was taken.
    pub(in crate::export) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Adds fields to a message.
pub(in crate::export) trait Put {
    fn put16(&mut self, value: u16);
    fn put32(&mut self, value: u32);
    fn put64(&mut self, value: u64);
}

impl Put for Vec<u8> {
    fn put16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_be_bytes());
    }
}
