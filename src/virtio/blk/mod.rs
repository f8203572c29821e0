//! virtio-blk: what the device offers, and what a guest asks of it. Knows neither rings nor threads.
//!
//! | file | what |
//! |---|---|
//! | `features` | feature bits and configuration space, from the cache policy and the image's geometry |
//! | `request` | a descriptor chain becomes a checked request, or a status that refuses it |

pub mod features;
pub mod request;
