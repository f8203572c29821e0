//! The control socket in front of a fake disk, in this process: commands, holds, events, users, what a store asks, the
//! control side of an upgrade.

mod careless_clients;
mod commands;
mod events;
mod hand_over;
mod holds;
mod other_clients;
mod store;
mod users;
