//! Error replies. `schema` lists the codes.

/// QEMU's error classes, as far as they are used. Clients know a closed list of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// All other errors.
    GenericError,
    /// The command is unknown, or not accepted now.
    CommandNotFound,
}

/// An error reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// For clients that know QEMU.
    pub class: Class,
    /// For programs; the list is in `schema`.
    pub code: &'static str,
    /// For people.
    pub desc: String,
}

impl Error {
    /// An error of class `GenericError`.
    pub fn new(code: &'static str, desc: impl Into<String>) -> Self {
        Error { class: Class::GenericError, code, desc: desc.into() }
    }

    pub(super) fn command(code: &'static str, desc: impl Into<String>) -> Self {
        Error { class: Class::CommandNotFound, code, desc: desc.into() }
    }

    pub(in crate::control) fn argument(desc: impl Into<String>) -> Self {
        Error::new("bad-argument", desc)
    }
}
