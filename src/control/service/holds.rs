//! Carries out what the coordinator decided: gates, replies and events.

use std::time::{Duration, Instant};

use serde_json::json;

use super::Service;
use super::replies;
use crate::base::rate_limit::{COMMAND_LOG, log_limited};
use crate::control::quiesce::{Effect, Hold, Reason, Refusal, RequestId, Who};
use crate::disk::HoldFigures;

impl Service {
    /// Refuses the requests that wait for a hold while a failed change is retained: no hold can succeed before it is
    /// done, so they need not wait for their deadlines.
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
                Effect::CloseGate(epoch) => {
                    self.closed_at = Some(now);
                    self.disk.close_gate(epoch);
                }
                Effect::OpenGate => {
                    self.closed_at = None;
                    self.disk.open_gate();
                }
                Effect::Granted { request, hold, epoch, figures, holders } => {
                    self.granted(request, &hold, epoch, figures, holders);
                }
                Effect::Refused { request, who, why } => self.refused(request, &who, why),
                Effect::Left { hold, reason, held, holders } => self.left(&hold, reason, held, holders),
            }
        }
        self.send_released();
    }

    fn granted(&mut self, request: RequestId, hold: &Hold, epoch: u64, figures: HoldFigures, holders: usize) {
        let microseconds = |time: Duration| time.as_micros() as u64;
        let figures = json!({
            "epoch": epoch,
            "rings": figures.rings,
            "drained": figures.drained,
            "drain-us": microseconds(figures.drain),
            "sync-us": microseconds(figures.sync),
            "bytes-synced": figures.bytes_synced,
            "holders": holders,
        });
        let holder = replies::describe_holder(&hold.who);
        log_limited!(COMMAND_LOG, Info, "quiesced for {holder}, {holders} holder(s): {figures}");
        let mut event = replies::holder_json(hold);
        event["detached"] = json!(hold.detached);
        let lease = hold.until.saturating_duration_since(hold.since).as_millis() as u64;
        event["lease-ms"] = json!(lease);
        let mut reply = json!({"token": hold.token, "lease-ms": lease});
        for part in [&mut event, &mut reply] {
            for (name, value) in figures.as_object().into_iter().flatten() {
                part[name] = value.clone();
            }
        }
        // First, because the store keeps another host's snapshot waiting.
        let is_stores = self.store.granted(request, hold);
        self.event("QUIESCED", event);
        if !is_stores {
            self.reply_later(request, Ok(reply));
        }
    }

    pub(super) fn refused(&mut self, request: RequestId, who: &Who, why: Refusal) {
        let error = replies::refused(why);
        log_limited!(COMMAND_LOG, Warn, "quiesce for {} failed: {}", replies::describe_holder(who), error.desc);
        let mut event = replies::who_json(who);
        event["code"] = json!(error.code);
        self.event("QUIESCE_FAILED", event);
        if !self.store.refused(request, why) {
            self.reply_later(request, Err(error));
        }
    }

    fn left(&mut self, hold: &Hold, reason: Reason, held: Duration, holders: usize) {
        let word = replies::reason(reason);
        let (holder, held) = (replies::describe_holder(&hold.who), held.as_millis());
        if reason == Reason::LeaseExpired {
            let line = format_args!("the lease of {holder} ran out after {held} ms, {holders} holder(s) left");
            COMMAND_LOG.log(log::Level::Warn, line);
            self.event("LEASE_EXPIRED", replies::holder_json(hold));
        } else {
            let line = format_args!("{holder} held for {held} ms, ended by {word}, {holders} holder(s) left");
            COMMAND_LOG.log(log::Level::Info, line);
        }
        let mut data = replies::holder_json(hold);
        data["reason"] = json!(word);
        data["held-ms"] = json!(held as u64);
        data["holders"] = json!(holders);
        self.event("RESUMED", data);
        self.store.hold_ended(hold, reason);
    }
}
