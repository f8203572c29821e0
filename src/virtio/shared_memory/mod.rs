//! Memory that the front-end shares with this process by descriptor. Every access is checked, and memory that the
//! front-end takes away ends only its own session.
//!
//! | file | what |
//! |---|---|
//! | `memory_table` | the guest's memory regions (VHOST_USER_SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG) |
//! | `region` | one mapped region, for the in-flight region and the dirty log |
//! | `inflight` | the in-flight region: which requests a server that died had taken and not completed |
//! | `dirty_log` | the dirty log of a live migration |
//! | `sigbus` | maps zeroes over memory that was truncated under us (unsafe) |

pub(super) mod dirty_log;
pub(super) mod inflight;
pub(super) mod memory_table;
pub(super) mod region;
pub(super) mod sigbus;
