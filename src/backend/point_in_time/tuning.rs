//! What the daemon sets of the copies, and what only tests change.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A deliberate defect, with which tests show that they detect it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// No write is ever delayed.
    SavesNothing,
    /// Discards and write-zeroes are never delayed.
    ForgetsRanges,
    /// A write continues when the read of its clusters has started, not when it is complete.
    ReleasesEarly,
    /// A hole is punched in the scratch before the data there is read back.
    PunchesFirst,
    /// A reader of the instant does not check again whether a cluster was saved, after it has read the image.
    LooksOnce,
}

/// A step of the target's or the scratch's thread, for a [`TargetHook`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyStep {
    /// Writes some clusters to the target.
    Write,
    /// Syncs the target.
    Sync,
    /// Gives the target its final name.
    Publish,
    /// Stores old data in the scratch.
    Store,
    /// Reads old data back from the scratch.
    Load,
}

/// Called by the thread of the target or the scratch before each step. It may sleep; if it returns an error, the step fails
/// with that error.
pub type TargetHook = Arc<dyn Fn(CopyStep) -> io::Result<()> + Send + Sync>;

/// A directory that the sandbox lets copies go to, as it was when the daemon started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyDirectory {
    /// The path as the operator wrote it.
    pub path: PathBuf,
    /// The directory's device and inode, or a text that says why it could not be opened.
    pub at_start: Result<(u64, u64), String>,
}

/// The scratch: where old data may go first while the target is too slow to take it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScratchOptions {
    /// The directory in which each copy creates a file without a name.
    pub directory: PathBuf,
    /// The most bytes that one scratch file holds.
    pub size: u64,
}

/// Options that the daemon sets, and settings that only tests change.
#[derive(Clone)]
pub struct Tuning {
    /// How long a write may be delayed before the copy fails (longer by a second for each 32 MiB). A discard waits a
    /// fifth of this and is then skipped.
    pub timeout: Duration,
    /// The most bytes of old data in memory. May be exceeded by one read.
    pub memory: usize,
    /// For tests: makes the target or the scratch slow or failing.
    pub hook: Option<TargetHook>,
    /// For tests: the defect to have.
    pub mutant: Option<Mutant>,
    /// The directories that the sandbox lets copies go to. Only for error messages.
    pub directories: Arc<[CopyDirectory]>,
    /// The scratch for old data; `None`: no scratch.
    pub scratch: Option<ScratchOptions>,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            timeout: Duration::from_secs(5),
            memory: 32 << 20,
            hook: None,
            mutant: None,
            directories: Arc::default(),
            scratch: None,
        }
    }
}

impl Tuning {
    /// Calls the hook, if there is one, before `step`.
    pub(super) fn step(&self, step: CopyStep) -> io::Result<()> {
        self.hook.as_ref().map_or(Ok(()), |hook| hook(step))
    }
}
