//! `virtioblkctl snapshot` and `attend`, with real daemons and a fake guest agent: whatever fails or dies, every disk goes
//! on and every guest is thawed.

mod agent;
mod attend;
mod attend_scene;
mod command;
mod copies;
mod hooks;
mod image;
mod interrupted;
mod reflink;
mod scene;
mod torn_pairs;
