//! The control socket in front of a fake disk, in this process: commands, holds, events, users, what a store asks, the
//! control side of an upgrade.

mod commands;
mod hand_over;
mod other_clients;
mod store;
mod users;
