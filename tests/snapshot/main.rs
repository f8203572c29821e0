//! `virtioblkctl snapshot` and `attend`, with real daemons and a fake guest agent: whatever fails or dies, every disk goes
//! on and every guest is thawed.

mod attend;
mod command;
mod copies;
mod image;
mod reflink;
mod torn_pairs;
