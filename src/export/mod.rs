//! The instant, read by others: an NBD server for the time of one export.

pub mod protocol;
