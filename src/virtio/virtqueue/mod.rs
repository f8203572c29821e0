//! The guest's side of a ring: guest memory, the split virtqueue and its descriptor chains. Knows neither requests nor
//! threads.
//!
//! | file | what |
//! |---|---|
//! | `guest_memory` | guest memory as it is mapped here: guest addresses become pointers (unsafe) |
//! | `split_ring` | the available ring, the used ring and notification suppression of a running split virtqueue |
//! | `chain` | one descriptor chain, checked |

pub mod chain;
pub mod guest_memory;
pub mod split_ring;
