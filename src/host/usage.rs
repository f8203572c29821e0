//! How much of the host's storage an image takes.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::snapshot::child::{CommandEnd, output};

/// How long a look at an image may take, whose storage may hang.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What an image takes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// What is stored of it: a sparse file stores less than its size.
    pub allocation: u64,
    /// Its size.
    pub physical: u64,
}

/// Asks about a file in a process of its own. `None`: the storage does not answer, or it is a device, which has no holes that
/// are known.
pub fn of_file(path: &Path) -> Option<Usage> {
    let mut stat = Command::new("stat");
    stat.args(["-L", "-c", "%b %B %s %F", "--"]).arg(path).env("LC_ALL", "C");
    match output(stat, Instant::now() + TIMEOUT, None) {
        Ok((CommandEnd::Status(status), text, _)) if status.success() => parse(&text),
        _ => None,
    }
}

fn parse(text: &str) -> Option<Usage> {
    let mut words = text.trim_end().splitn(4, ' ');
    let mut number = || words.next()?.parse::<u64>().ok();
    let (blocks, block_size, physical) = (number()?, number()?, number()?);
    let is_file = words.next()?.starts_with("regular");
    is_file.then(|| Usage { allocation: blocks.saturating_mul(block_size), physical })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparse_file_stores_less_than_its_size() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a b");
        std::fs::File::create(&path).unwrap().set_len(1 << 30).unwrap();
        let usage = of_file(&path).unwrap();
        assert_eq!(usage.physical, 1 << 30);
        assert!(usage.allocation < 1 << 20, "{usage:?}");
        assert_eq!(of_file(&directory.path().join("none")), None);
        assert_eq!(parse("0 512 0 block special file\n"), None);
    }
}
