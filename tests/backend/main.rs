//! What holds for back-ends: the contract, files and block devices, librbd without a cluster, copies, stable writes. In
//! this process, without the daemon.

mod contract;
mod copy_content;
mod copy_failures;
mod copy_image_claim;
mod copy_instant;
mod copy_scratch;
mod copy_target;
mod copy_world;
mod file;
mod file_blocks;
mod file_failures;
mod file_space;
mod mirror;
mod rbd_holes;
mod rbd_io;
mod rbd_listener;
mod rbd_lock;
mod rbd_open;
mod rbd_quiesce;
mod rbd_snapshots;
mod stable_choice;
mod stable_memory;
mod stable_writes;
mod tmpfs;
