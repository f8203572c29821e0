//! The front-end suite on images of a real Ceph cluster.

mod ceph;
mod driver;
mod guest;
#[path = "driver/suite.rs"]
mod suite;

use std::ffi::OsString;
use std::path::Path;

use ceph::{Cluster, Image};

impl suite::Store for Image<'static> {
    fn options(&self) -> Vec<OsString> {
        let conf = self.cluster.conf().into();
        vec!["--rbd".into(), self.spec.clone().into(), "--ceph-conf".into(), conf]
    }

    fn content(&self) -> Vec<u8> {
        Image::content(self)
    }

    fn copy_to(&self, file: &Path) -> Vec<OsString> {
        let words = ["rbd".into(), "-c".into(), self.cluster.conf().into_os_string(), "export".into()];
        words.into_iter().chain(["--no-progress".into(), self.spec.clone().into(), file.into()]).collect()
    }

    fn shows_what_is_cached(&self) -> bool {
        false
    }
}

fn new_store(size: u64) -> Box<dyn suite::Store> {
    // Objects of 1 MiB, so that requests touch two and more.
    Box::new(Cluster::shared().image_in(ceph::POOL, size, &["--object-size", "1M"]))
}
