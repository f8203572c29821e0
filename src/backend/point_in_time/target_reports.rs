//! The thread that acts on the reports of the target's thread: it updates the counters, returns buffers to the copier and
//! moves the copy to its next phase.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender};

use super::copy::{Copy, Phase};
use super::target_thread::TargetReport;
use crate::base::rate_limit::{COPY_LOG, log_limited};

/// Runs until the copy is over. It does not wait for the target's thread beyond that, because the end of the copy sends a
/// report too.
pub(super) fn run(copy: &Arc<Copy>, reports: &Receiver<TargetReport>, publish: &Sender<()>) {
    while !copy.phase().is_over() {
        match reports.recv() {
            Ok(TargetReport::Written { buf, stored, clusters }) => {
                copy.stored.fetch_add(stored, Relaxed);
                copy.done.fetch_add(clusters, Relaxed);
                copy.return_buffer(buf);
                copy.warn_if_slow();
            }
            Ok(TargetReport::Syncing) => {
                copy.begin_sync();
            }
            Ok(TargetReport::Durable(sha256)) => {
                if copy.begin_publish(sha256) {
                    // The target's thread waits for this permission.
                    let _ = publish.send(());
                }
            }
            Ok(TargetReport::Published(left)) => {
                if let Some(left) = left {
                    log_limited!(COPY_LOG, Warn, "{left}");
                }
                copy.end(Phase::Completed, None);
            }
            Ok(TargetReport::Failed(why)) => copy.fail(why),
            Ok(TargetReport::Scratch(reply)) => copy.add_scratch_reply(reply),
            Ok(TargetReport::Over) => {}
            Err(_) => copy.fail("the thread that writes the target ended; please report this as a defect".into()),
        }
    }
    // The thread that cancels a copy cleans up itself.
    if copy.phase() != Phase::Cancelled {
        copy.clean_up();
    }
}
