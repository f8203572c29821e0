//! The power-cut kit: a front-end in a guest ([`load`]), the disk below that guest, which loses what was not flushed
//! ([`disk`]), and the judge of what a cut may leave ([`judge`]). Used by `tests/guest/power_cut.rs`.

pub mod disk;
pub mod judge;
pub mod load;
mod nbd;
pub mod said;
