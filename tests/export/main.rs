//! The export of an instant over NBD: what clients read is the image at the instant, to the byte, whatever the guest does
//! meanwhile; and whatever clients do, the guest goes on.

mod clients;
mod command;
mod instant;
mod tools;
mod world;
