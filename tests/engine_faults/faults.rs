//! Faults of the engine: each a change of its source, and the oracles of `src/engine/model.rs` that must find it.

/// One fault. The old text of each change occurs exactly once in its file.
pub struct Fault {
    pub name: &'static str,
    pub changes: &'static [Change],
    /// Each must find the fault by itself. Empty: the change is legal, and no oracle may speak.
    pub oracles: &'static [&'static str],
    /// The oracles are asked where failures are retained (`--on-error stop`); elsewhere nothing is seen of the fault.
    pub failures_are_retained: bool,
}

/// A change of one file under `src/engine`.
pub struct Change {
    pub file: &'static str,
    pub old: &'static str,
    pub new: &'static str,
}

const fn fault(name: &'static str, changes: &'static [Change], oracles: &'static [&'static str]) -> Fault {
    Fault { name, changes, oracles, failures_are_retained: false }
}

/// A fault that only shows where failures are retained.
const fn retaining(name: &'static str, changes: &'static [Change], oracles: &'static [&'static str]) -> Fault {
    Fault { name, changes, oracles, failures_are_retained: true }
}

const fn engine(old: &'static str, new: &'static str) -> Change {
    Change { file: "mod.rs", old, new }
}

const fn gate(old: &'static str, new: &'static str) -> Change {
    Change { file: "gate.rs", old, new }
}

const fn sync_line(old: &'static str, new: &'static str) -> Change {
    Change { file: "sync_line.rs", old, new }
}

const fn on_error(old: &'static str, new: &'static str) -> Change {
    Change { file: "on_error.rs", old, new }
}

pub const FAULTS: &[Fault] = &[
    fault(
        "the gate lets every request through while it is closed",
        &[gate("if self.blockers > 0 {\n            return false;", "if false {\n            return false;")],
        &["AdmittedWhileBlocked"],
    ),
    fault(
        "the first unblock opens the gate for all holders",
        &[gate(
            "debug_assert!(self.blockers > 0, \"unblock without block\");",
            "return std::mem::take(&mut self.blockers) > 0;",
        )],
        &["AdmittedWhileBlocked"],
    ),
    fault(
        "a write under write-through is acknowledged before its sync",
        &[engine("(Some(Stage::Changing { then_sync: true, .. }), Ok(())) => self.wait_for_sync(slot),", "")],
        &["ThroughNotDurable"],
    ),
    fault(
        "a waiter joins the sync that is running",
        &[sync_line(
            "self.waiting.push(waiter);",
            "if self.running { self.covered.push(waiter) } else { self.waiting.push(waiter) }",
        )],
        &["FlushNotDurable"],
    ),
    fault(
        "a second sync starts while one runs",
        &[sync_line(
            "if self.running || self.waiting.is_empty() {",
            "if self.running {\n            return !self.waiting.is_empty();\n        }\n        if self.waiting.is_empty() {",
        )],
        &["TwoSyncs"],
    ),
    fault(
        "a quiesce is answered as soon as it is drained",
        &[engine("self.sync_line.join(Waiter::Barrier(self.epoch));", "self.settle(self.epoch, Ok(()));")],
        &["QuietNotDurable"],
    ),
    fault(
        "a quiesce is answered as soon as it is drained, in unsafe only",
        &[engine(
            "self.sync_line.join(Waiter::Barrier(self.epoch));",
            "if self.policy.ignores_flush() {\n                return self.settle(self.epoch, Ok(()));\n            }\n            \
             self.sync_line.join(Waiter::Barrier(self.epoch));",
        )],
        &["QuietNotDurable"],
    ),
    fault(
        "the last unblock does not report that writes are open",
        &[engine("self.resumed = true;", "")],
        &["ResumedLost"],
    ),
    fault(
        "requests that a failed sync covered are acknowledged",
        &[engine(
            "Waiter::Request(slot) => self.done_with_change(slot, result),",
            "Waiter::Request(slot) => self.done_with_change(slot, Ok(())),",
        )],
        &["FailureAcknowledged"],
    ),
    fault(
        "a quiesce whose sync failed succeeds",
        &[engine(
            "Waiter::Barrier(epoch) => self.settle(epoch, result),",
            "Waiter::Barrier(epoch) => self.settle(epoch, Ok(())),",
        )],
        &["QuietNotDurable", "QuietUnsynced"],
    ),
    fault(
        "the error of a transfer is dropped",
        &[engine(
            "match (self.stages.get(usize::from(slot)), result) {",
            "let result: Result<(), Errno> = result.or(Ok(()));\n        match (self.stages.get(usize::from(slot)), result) {",
        )],
        &["FailureAcknowledged"],
    ),
    fault(
        "the gate is left when the data has arrived, before the sync",
        &[
            engine(
                "self.sync_line.join(Waiter::Request(slot));",
                "self.sync_line.join(Waiter::Request(slot));\n        self.gate.leave();\n        self.flush_if_drained();",
            ),
            engine(
                "        self.done(slot, result);\n        self.gate.leave();",
                "        let stage = self.stages[usize::from(slot)];\n        self.done(slot, result);\n        \
                 if stage == Stage::Syncing {\n            return;\n        }\n        self.gate.leave();",
            ),
        ],
        &["Miscounted"],
    ),
    fault(
        "the gate is left when the data is submitted",
        &[
            engine(
                "        self.submit(slot, durable);\n    }",
                "        self.submit(slot, durable);\n        if !through || durable {\n            self.gate.leave();\n        }\n    }",
            ),
            engine(
                "        self.done(slot, result);\n        self.gate.leave();",
                "        let stage = self.stages[usize::from(slot)];\n        self.done(slot, result);\n        \
                 if matches!(stage, Stage::Changing { then_sync: false, .. }) {\n            return;\n        }\n        \
                 self.gate.leave();",
            ),
        ],
        &["QuietInFlight"],
    ),
    fault(
        "the sync of an abandoned quiesce answers the next one",
        &[engine(
            "if self.quiesce != Quiesce::Flushing(epoch) {",
            "let _ = epoch;\n        if !matches!(self.quiesce, Quiesce::Flushing(_)) {",
        )],
        &["QuietNotDurable"],
    ),
    fault(
        "an answer that was not taken outlives its quiesce",
        &[engine("self.settled = None;", "")],
        &["QuietInFlight"],
    ),
    fault(
        "a report of open writes that was not taken outlives the next block",
        &[engine("        self.resumed = false;", "")],
        &["ResumedWithoutReason"],
    ),
    fault(
        "discard and write-zeroes are answered when transferred, under write-through too",
        &[engine(
            "let through = self.policy.syncs_each_write(self.driver_can_flush);",
            "let through = self.policy.syncs_each_write(self.driver_can_flush) && kind == Kind::Write;",
        )],
        &["ThroughNotDurable"],
    ),
    fault(
        "discard and write-zeroes get the durable flag instead of a sync",
        &[engine(
            "let durable = through && self.durable_writes && kind == Kind::Write;",
            "let _ = kind;\n        let durable = through && self.durable_writes;",
        )],
        &["DurableFlagMisused"],
    ),
    fault(
        "the durable flag is set whatever the back-end has",
        &[engine(
            "let durable = through && self.durable_writes && kind == Kind::Write;",
            "let durable = through && kind == Kind::Write;",
        )],
        &["DurableFlagMisused"],
    ),
    fault(
        "a driver without FLUSH is served write back",
        &[engine(
            "let through = self.policy.syncs_each_write(self.driver_can_flush);",
            "let through = self.policy.syncs_each_write(true);",
        )],
        &["ThroughNotDurable"],
    ),
    fault(
        "a flush is answered at once under write back",
        &[engine("if self.policy.ignores_flush() {", "if true {")],
        &["FlushNotDurable"],
    ),
    fault(
        "every request is answered twice",
        &[engine(
            "self.actions.push_back(Action::Done { slot, result });",
            "self.actions.push_back(Action::Done { slot, result });\n        \
             self.actions.push_back(Action::Done { slot, result });",
        )],
        &["AnsweredTwice"],
    ),
    fault(
        "a sync forgets the last request that it covered",
        &[sync_line("        self.running = false;\n", "        self.running = false;\n        self.covered.pop();\n")],
        &["Unanswered"],
    ),
    fault(
        "a sync settles those that wait for the next one, too",
        &[sync_line(
            "        self.running = false;\n",
            "        self.running = false;\n        self.covered.append(&mut self.waiting);\n",
        )],
        &["FailedWithoutReason", "FlushNotDurable"],
    ),
    fault(
        "a quiesce joins the sync line before it is drained",
        &[engine(
            "self.quiesce = Quiesce::Draining;",
            "self.quiesce = Quiesce::Flushing(self.epoch);\n        self.sync_line.join(Waiter::Barrier(self.epoch));",
        )],
        &["QuietUnsynced", "QuietInFlight"],
    ),
    fault(
        "a sync that runs does not count as work",
        &[engine(
            "self.kept.is_empty() && self.rests()",
            "self.reads_in_flight == 0 && self.gate.in_flight() == 0 && self.actions.is_empty()",
        )],
        &["IdleWrong"],
    ),
    fault(
        "a quiesce that finds nothing in flight waits for ever",
        &[engine("        self.flush_if_drained();\n        self.resumed = false;", "        self.resumed = false;")],
        &["QuiesceUnanswered"],
    ),
    fault(
        "a nested block begins the quiesce anew",
        &[engine("if !self.gate.block() {", "self.gate.block();\n        if false {")],
        &["QuiescedTwice"],
    ),
    fault(
        "reads pass the gate, too",
        &[engine(
            "        if kind == Kind::Read {\n            self.reads_in_flight += 1;",
            "        if self.gate.in_flight() == 0 && !self.gate.clone().enter() {\n            return Admission::Held;\n        }\n        \
             if kind == Kind::Read {\n            self.reads_in_flight += 1;",
        )],
        &["HeldWithoutReason"],
    ),
    retaining(
        "a change is taken while another one is retained",
        &[engine("if !self.kept.is_empty() || !self.gate.enter() {", "if !self.gate.enter() {")],
        &["AdmittedWhileBlocked"],
    ),
    retaining(
        "a retained change has left the gate",
        &[on_error(
            "        self.actions.push_back(Action::Keep { slot, errno });",
            "        self.actions.push_back(Action::Keep { slot, errno });\n        \
             if matches!(self.stages[usize::from(slot)], Stage::KeptChange { .. }) {\n            self.gate.leave();\n            \
             self.flush_if_drained();\n        }",
        )],
        &["QuietInFlight", "Miscounted"],
    ),
    retaining(
        "retained requests are retried in reverse order",
        &[on_error(
            "for slot in std::mem::take(&mut self.kept) {",
            "for slot in std::mem::take(&mut self.kept).into_iter().rev() {",
        )],
        &["RetriedOutOfOrder"],
    ),
    retaining(
        "one of the retained requests is not retried",
        &[on_error(
            "for slot in std::mem::take(&mut self.kept) {",
            "self.kept.pop();\n        for slot in std::mem::take(&mut self.kept) {",
        )],
        &["Unanswered"],
    ),
    retaining(
        "a durable write is retried without its flag",
        &[on_error("self.submit(slot, durable);", "self.submit(slot, durable && false);")],
        &["ThroughNotDurable"],
    ),
    retaining(
        "a failed sync is retried where failures are retained",
        &[engine(
            "        for &waiter in &covered {",
            "        if self.on_error == OnError::Stop && result.is_err() {\n            \
             return covered.iter().for_each(|&waiter| self.sync_line.join(waiter));\n        }\n        \
             for &waiter in &covered {",
        )],
        &["FailureAcknowledged"],
    ),
    retaining(
        "a failure is answered although failures are retained",
        &[on_error(
            "        let stage = &mut self.stages[usize::from(slot)];\n        *stage = match *stage {\n            Stage::Changing",
            "        if true {\n            return match self.stages[usize::from(slot)] {\n                \
             Stage::Changing { .. } => self.done_with_change(slot, Err(errno)),\n                _ => {\n                    \
             self.reads_in_flight -= 1;\n                    self.done(slot, Err(errno));\n                }\n            };\n        }\n        \
             let stage = &mut self.stages[usize::from(slot)];\n        *stage = match *stage {\n            Stage::Changing",
        )],
        &["KeptWrong"],
    ),
    fault(
        "LEGAL: a flush is answered at once under write-through, where everything acknowledged is durable",
        &[engine(
            "if self.policy.ignores_flush() {",
            "if self.policy.ignores_flush() || self.policy.syncs_each_write(self.driver_can_flush) {",
        )],
        &[],
    ),
];
