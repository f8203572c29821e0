//! The thread that carries out what the target's thread reports: figures, buffers, and the copy's next phase.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender};

use super::copy::{Copy, Phase};
use super::target_thread::Note;
use crate::base::rate_limit::{COPY_LOG, log_limited};

/// Runs until the copy is over. It waits for the target's thread only as long as the copy runs: the copy's end sends a
/// note too.
pub(super) fn run(copy: &Arc<Copy>, notes: &Receiver<Note>, publish: &Sender<()>) {
    while !copy.phase().is_over() {
        match notes.recv() {
            Ok(Note::Written { buf, stored, clusters }) => {
                copy.stored.fetch_add(stored, Relaxed);
                copy.done.fetch_add(clusters, Relaxed);
                copy.give_back(buf);
                copy.warn_if_slow();
            }
            Ok(Note::Syncing) => {
                copy.begin_sync();
            }
            Ok(Note::Durable(sha256)) => {
                if copy.begin_publish(sha256) {
                    // The thread waits for this.
                    let _ = publish.send(());
                }
            }
            Ok(Note::Published(left)) => {
                if let Some(left) = left {
                    log_limited!(COPY_LOG, Warn, "{left}");
                }
                copy.end(Phase::Completed, None);
            }
            Ok(Note::Failed(why)) => copy.fail(why),
            Ok(Note::Scratch(answer)) => copy.scratch_answered(answer),
            Ok(Note::Over) => {}
            Err(_) => copy.fail("the thread of its target ended; please report this as a defect".into()),
        }
    }
    // Whoever cancels clears up itself.
    if copy.phase() != Phase::Cancelled {
        copy.clear_up();
    }
}
