//! The front-end suite on images of a real Ceph cluster.

use std::ffi::OsString;
use std::path::Path;

use kit::ceph::{Cluster, Image, POOL};
use kit::front_end_suite::Store;

struct RbdStore(Image<'static>);

impl Store for RbdStore {
    fn options(&self) -> Vec<OsString> {
        let conf = self.0.cluster.conf().into();
        vec!["--rbd".into(), self.0.spec.clone().into(), "--ceph-conf".into(), conf]
    }

    fn content(&self) -> Vec<u8> {
        self.0.content()
    }

    fn copy_to(&self, file: &Path) -> Vec<OsString> {
        let words = ["rbd".into(), "-c".into(), self.0.cluster.conf().into_os_string(), "export".into()];
        words.into_iter().chain(["--no-progress".into(), self.0.spec.clone().into(), file.into()]).collect()
    }

    fn shows_what_is_cached(&self) -> bool {
        false
    }
}

fn new_store(size: u64) -> Box<dyn Store> {
    // Objects of 1 MiB, so that requests touch two and more.
    Box::new(RbdStore(Cluster::shared().image_in(POOL, size, &["--object-size", "1M"])))
}

kit::front_end_suite!(new_store);
