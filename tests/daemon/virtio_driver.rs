//! The front-end suite on files.

use kit::front_end_suite;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

struct FileStore {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

fn new_store(size: u64) -> Box<dyn front_end_suite::Store> {
    // Where O_DIRECT works.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("disk.img");
    std::fs::write(&path, vec![0; size as usize]).unwrap();
    Box::new(FileStore { path, _dir: dir })
}

impl front_end_suite::Store for FileStore {
    fn options(&self) -> Vec<OsString> {
        vec!["--blk-file".into(), self.path.clone().into()]
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    fn copy_to(&self, file: &Path) -> Vec<OsString> {
        vec!["cp".into(), self.path.clone().into(), file.into()]
    }

    fn shows_what_is_cached(&self) -> bool {
        true
    }
}

kit::front_end_suite!(new_store);
