//! The vhost-user-blk device in this process, over a RAM disk that fails, hangs or crashes on request, under front-ends
//! that send what a test tells them. No test here starts another process.

mod activation;
mod dirty_log;
mod drivers;
mod durability;
mod hostile;
mod inflight;
mod on_error;
mod protocol;
mod random;
mod resize;
mod stall;
