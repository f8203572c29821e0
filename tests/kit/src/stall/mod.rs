//! Media that stop answering when a test tells them to.

pub mod directory;
pub mod frozen;
pub mod fuse;
pub mod withheld;
