//! The vhost-user-blk device in this process, over a RAM disk that fails, hangs or crashes on request, under front-ends
//! that send what a test tells them. No test here starts another process.

mod activation;
mod crash_load;
mod dirty_log;
mod drivers;
mod durability;
mod failed_syncs;
mod file_rig;
mod hold;
mod hostile;
mod inflight;
mod inflight_random;
mod inflight_region;
mod interrupts;
mod latency;
mod limits;
mod long_chains;
mod memory_sharing;
mod memory_tables;
mod on_error;
mod protocol;
mod random;
mod requests;
mod resize;
mod stall;
mod tracking;
mod wire;
