//! The method `rbd`: the daemon has the image's store make the snapshot, and removes it if our connection ends before
//! we have decided to keep it.

use std::time::{Duration, Instant};

use serde_json::json;

use super::disks::{Disks, OnFailure};
use super::wait::CancelFd;
use crate::control::client::{Failure, REPLY_TIMEOUT};

/// How long a removal may take: the store may be slow, and no guest waits.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(60);

/// One disk's snapshot.
#[derive(Clone, Debug)]
pub struct ImageSnapshot {
    /// The disk's index in the list.
    pub disk: usize,
    name: String,
    /// The daemon got the request to make the snapshot.
    requested: bool,
    /// POOL/IMAGE@NAME. `None`: the snapshot is not made, or that is not known.
    pub full_name: Option<String>,
}

impl ImageSnapshot {
    /// Creates the request for the disk with this index. Sends nothing yet.
    pub fn new(disk: usize, name: String) -> Self {
        ImageSnapshot { disk, name, requested: false, full_name: None }
    }
}

/// Makes all snapshots at the same time, while all disks are held, until `deadline` at most.
pub fn take(
    disks: &mut Disks,
    images: &mut [ImageSnapshot],
    deadline: Instant,
    cancel: CancelFd<'_>,
) -> Result<(), Failure> {
    let request = |image: &mut ImageSnapshot| {
        image.requested = true;
        let token = disks.list[image.disk].token().unwrap_or_default();
        (image.disk, "image-snapshot", json!({"name": image.name, "token": token}))
    };
    let requests = images.iter_mut().map(request).collect();
    let mut failed = Ok(());
    // Wait for all replies: a snapshot that was made can be removed only if its reply is known.
    for (image, answer) in images.iter_mut().zip(disks.execute(requests, deadline, cancel, OnFailure::WaitForAll)) {
        match answer.result {
            Ok(made) => image.full_name = made["snapshot"].as_str().map(str::to_owned),
            Err(why) if failed.is_ok() => {
                failed = Err(disks.list[answer.disk].blame("has no snapshot made by its store", why));
            }
            Err(_) => {}
        }
    }
    failed
}

/// Makes the snapshots outlive our connection. This is the last step that can fail; [`undo`] also removes those that
/// outlive it by then.
pub fn keep(disks: &mut Disks, images: &[ImageSnapshot]) -> Result<(), Failure> {
    let requests =
        images.iter().map(|image| (image.disk, "image-snapshot-keep", json!({"name": image.name}))).collect();
    let mut failed = Ok(());
    for answer in disks.execute(requests, Instant::now() + REPLY_TIMEOUT, None, OnFailure::WaitForAll) {
        if let Err(why) = answer.result
            && failed.is_ok()
        {
            failed = Err(disks.list[answer.disk].blame("lost the snapshot that its store had made", why));
        }
    }
    failed
}

/// Removes the snapshots that were made. Returns a text for each one that could not be removed.
pub fn undo(disks: &mut Disks, images: &[ImageSnapshot]) -> Vec<String> {
    let made: Vec<&ImageSnapshot> = images.iter().filter(|image| image.full_name.is_some()).collect();
    let request = |image: &&ImageSnapshot| (image.disk, "image-snapshot-remove", json!({"name": image.name}));
    let requests = made.iter().map(request).collect();
    let answers = disks.execute(requests, Instant::now() + REMOVAL_TIMEOUT, None, OnFailure::WaitForAll);
    let unmade = images.iter().filter(|image| image.requested && image.full_name.is_none());
    // These were refused, or their result is not known; then the daemon removes them when our connection ends.
    let unknown = unmade.filter(|image| disks.list[image.disk].fd().is_none()).map(|image| {
        let control = disks.list[image.disk].control.display();
        format!(
            "whether '{control}' made the snapshot '{}' is not known; its daemon removes it if it lives",
            image.name
        )
    });
    let mut failures: Vec<String> = unknown.collect();
    for (image, answer) in made.iter().zip(answers) {
        if let Err(why) = answer.result {
            let full = image.full_name.as_deref().unwrap_or_default();
            failures.push(format!("the snapshot {full}, which is not to be relied on, may be left: {why}"));
        }
    }
    failures
}
