//! Handles the disk's events: passes them to the coordinator or reports them to the clients.

use std::time::Instant;

use serde_json::{Value, json};

use super::Service;
use super::replies;
use crate::disk::{Event, EventBatch, FailedRequest};

impl Service {
    /// Handles the disk's events since the last call.
    pub(in crate::control) fn disk_events(&mut self, batch: EventBatch, now: Instant) {
        self.error_events.add_suppressed(batch.dropped);
        for event in batch.events {
            match event {
                Event::HoldSettled { epoch, result } => {
                    self.coordinator.settled(epoch, result, now);
                    self.carry_out(now);
                }
                Event::HoldRefused { epoch } => {
                    self.coordinator.not_ours(epoch, now);
                    self.carry_out(now);
                }
                Event::Connected => self.event("FRONTEND_CONNECTED", json!({})),
                Event::Disconnected(reason) => self.event("FRONTEND_DISCONNECTED", json!({"reason": reason})),
                Event::IoError(failed) => {
                    let data = failed_request(&failed);
                    let admitted = self.error_events.admit(now);
                    self.error_event("IO_ERROR", data, admitted);
                }
                Event::IoStopped(failed) => {
                    self.event("IO_STOPPED", failed_request(&failed));
                    self.refuse_if_stopped(now);
                }
                Event::IoContinued { ring } => self.event("IO_CONTINUED", json!({ "ring": ring })),
                Event::IoStalled { ring, requests, oldest } => {
                    let oldest = oldest.as_millis() as u64;
                    self.event("IO_STALLED", json!({"ring": ring, "requests": requests, "oldest-ms": oldest}));
                }
                Event::IoResumed { ring } => self.event("IO_RESUMED", json!({ "ring": ring })),
                Event::SyncError(errno) => {
                    let data = json!({"errno": errno.0, "message": replies::errno(errno)});
                    let admitted = self.error_events.admit(now);
                    self.error_event("SYNC_ERROR", data, admitted);
                }
                Event::CopyEnded(copy) => {
                    self.copies.ended(&copy.copy);
                    let name = format!("COPY_{}", copy.state.to_uppercase());
                    self.event(&name, json!(copy));
                }
                Event::BufferChanged { offset, len, suppressed } => {
                    self.event("BUFFER_CHANGED", json!({"offset": offset, "length": len, "suppressed": suppressed}));
                }
                Event::ImageState(state) => self.event("IMAGE_STATE", json!(state)),
                Event::ProtocolError(what) => {
                    let admitted = self.guest_error_events.admit(now);
                    self.error_event("PROTOCOL_ERROR", json!({"message": what}), admitted);
                }
            }
        }
    }

    /// Sends an error event if its rate limiter admitted it. `admitted`: the number of suppressed events before it;
    /// `None`: the limiter suppressed this one, too.
    fn error_event(&mut self, name: &str, mut data: Value, admitted: Option<u64>) {
        if let Some(suppressed) = admitted {
            data["suppressed"] = json!(suppressed);
            self.event(name, data);
        }
    }
}

fn failed_request(failed: &FailedRequest) -> Value {
    let FailedRequest { kind, ring, offset, len, errno } = failed;
    json!({
        "operation": kind.name(), "ring": ring, "offset": offset, "length": len,
        "errno": errno.0, "message": replies::errno(*errno),
    })
}
