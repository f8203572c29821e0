//! The version of the programs, with the git revision that they were built from (build.rs).

/// The version, and the revision in parentheses if it is known: `0.1.0 (a1b2c3d4e5)`.
pub const VERSION: &str = env!("VIRTIOBLKD_VERSION");

/// The git revision, `a1b2c3d4e5` or `a1b2c3d4e5-dirty`. `None` for a debug build, and for one of an archive.
pub fn revision() -> Option<&'static str> {
    Some(env!("VIRTIOBLKD_REVISION")).filter(|revision| !revision.is_empty())
}
