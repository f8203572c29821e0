//! The real programs, `virtioblkd` in its sandbox and `virtioblkctl`: options, start and end, copies, media and clients
//! that stop answering.

mod check;
mod copies;
mod domain;
mod domain_commands;
mod domain_scene;
mod front_ends;
mod hold_command;
mod hook_bounds;
mod hook_killed;
mod host_crash;
mod hung_target;
mod image_format;
mod life_cycle;
mod log_unread;
mod metrics;
mod names;
mod options;
mod process;
mod proxmox;
mod run_command;
mod short_writes;
mod sockets;
mod stable_writes;
mod stalled;
mod terminal;
mod virtio_driver;
mod virtioblkctl;
