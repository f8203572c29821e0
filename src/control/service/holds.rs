//! Carries out the coordinator's decisions: opens and closes the gate, and sends replies and events.

use std::time::{Duration, Instant};

use serde_json::json;

use super::Service;
use super::replies;
use crate::base::figures::count;
use crate::base::rate_limit::{COMMAND_LOG, log_limited};
use crate::control::protocol::return_types::{HoldEnded, QuiesceFigures, Quiesced};
use crate::control::quiesce::{ClientIdentity, EndReason, Hold, HoldEffect, Refusal, RequestId};
use crate::disk::HoldFigures;

impl Service {
    /// Refuses the requests that wait for a hold while a failed change is retained. No hold can succeed before that
    /// change is done, so they need not wait for their deadlines.
    pub(super) fn refuse_if_stopped(&mut self, now: Instant) {
        if let Some(failed) = self.disk.stopped_change() {
            self.coordinator.stopped(failed.errno, now);
            self.carry_out(now);
        }
    }

    /// Carries out the coordinator's effects, in order.
    pub(super) fn carry_out(&mut self, now: Instant) {
        for effect in self.coordinator.effects() {
            match effect {
                HoldEffect::CloseGate(epoch) => {
                    self.closed_at = Some(now);
                    self.disk.close_gate(epoch);
                }
                HoldEffect::OpenGate => {
                    self.closed_at = None;
                    self.disk.open_gate();
                }
                HoldEffect::Granted { request, hold, epoch, figures, holders } => {
                    self.granted(request, &hold, epoch, figures, holders);
                }
                HoldEffect::Refused { request, who, why } => self.refused(request, &who, why),
                HoldEffect::Ended { hold, reason, held, holders } => self.left(&hold, reason, held, holders),
            }
        }
        self.send_releases();
    }

    fn granted(&mut self, request: RequestId, hold: &Hold, epoch: u64, figures: HoldFigures, holders: usize) {
        let microseconds = |time: Duration| time.as_micros() as u64;
        let figures = QuiesceFigures {
            epoch,
            rings: figures.rings,
            drained: figures.drained,
            drain_us: microseconds(figures.drain),
            sync_us: microseconds(figures.sync),
            bytes_synced: figures.bytes_synced,
            holders,
        };
        log_limited!(
            COMMAND_LOG,
            Info,
            "quiesced for {}: {} requests drained in {} us, {} bytes synced in {} us; holders now: {holders}",
            replies::describe_holder(&hold.who),
            figures.drained,
            figures.drain_us,
            figures.bytes_synced,
            figures.sync_us
        );
        let lease_ms = hold.until.saturating_duration_since(hold.since).as_millis() as u64;
        let reply = json!(Quiesced { token: hold.token.clone(), lease_ms, figures });
        // The event has the members of the reply, and the holder.
        let mut event = reply.clone();
        event["detached"] = json!(hold.detached);
        for (name, value) in replies::holder_json(hold).as_object().into_iter().flatten() {
            event[name] = value.clone();
        }
        // Before the events, because another host's snapshot waits for the store's consent.
        let is_stores = self.store.granted(request, hold);
        self.event("QUIESCED", event);
        if !is_stores {
            self.reply_later(request, Ok(reply));
        }
    }

    pub(super) fn refused(&mut self, request: RequestId, who: &ClientIdentity, why: Refusal) {
        let error = replies::refused(why);
        log_limited!(COMMAND_LOG, Warn, "quiesce for {} failed: {}", replies::describe_holder(who), error.desc);
        let mut event = replies::who_json(who);
        event["code"] = json!(error.code);
        self.event("QUIESCE_FAILED", event);
        if !self.store.refused(request, why) {
            self.reply_later(request, Err(error));
        }
    }

    fn left(&mut self, hold: &Hold, reason: EndReason, held: Duration, holders: usize) {
        let word = replies::reason(reason);
        let (holder, held) = (replies::describe_holder(&hold.who), held.as_millis());
        let left = count(holders as u64, "holder");
        if reason == EndReason::LeaseExpired {
            let line = format_args!("the lease of {holder} ran out after {held} ms, {left} left");
            COMMAND_LOG.log(log::Level::Warn, line);
            self.event("LEASE_EXPIRED", replies::holder_json(hold));
        } else {
            let line = format_args!("{holder} held for {held} ms, ended by {word}, {left} left");
            COMMAND_LOG.log(log::Level::Info, line);
        }
        let ended = HoldEnded {
            requester: replies::requester(&hold.who),
            token: hold.token.clone(),
            reason: word.to_owned(),
            held_ms: held as u64,
            holders,
        };
        self.event("RESUMED", json!(ended));
        self.store.hold_ended(hold, reason);
    }
}
