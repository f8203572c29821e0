//! Faults of the engine: each a change of its source, and the oracles of `src/engine/oracle.rs` that must find it.

/// One fault. The old text of each change occurs exactly once in its file.
pub struct Fault {
    pub name: &'static str,
    pub changes: &'static [Change],
    /// Each must find the fault by itself. Empty: the change is legal, and no oracle may fail.
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
        &[engine("(Some(Stage::Changing { then_sync: true, .. }), Ok(())) => self.wait_for_sync(id),", "")],
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
        "a quiesce ends as soon as it is drained",
        &[engine("self.sync_line.join(Waiter::Barrier(self.epoch));", "self.barrier_synced(self.epoch, Ok(()));")],
        &["QuietNotDurable"],
    ),
    fault(
        "a quiesce ends as soon as it is drained, in unsafe only",
        &[engine(
            "self.sync_line.join(Waiter::Barrier(self.epoch));",
            "if self.policy.ignores_flush() {\n                return self.barrier_synced(self.epoch, Ok(()));\n            }\n            \
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
            "Waiter::Request(id) => self.done_with_change(id, result),",
            "Waiter::Request(id) => self.done_with_change(id, Ok(())),",
        )],
        &["FailureAcknowledged"],
    ),
    fault(
        "a quiesce whose sync failed succeeds",
        &[engine(
            "Waiter::Barrier(epoch) => self.barrier_synced(epoch, result),",
            "Waiter::Barrier(epoch) => self.barrier_synced(epoch, Ok(())),",
        )],
        &["QuietNotDurable", "QuietUnsynced"],
    ),
    fault(
        "the error of a transfer is dropped",
        &[engine(
            "match (self.stages.get(usize::from(id)), result) {",
            "let result: Result<(), Errno> = result.or(Ok(()));\n        match (self.stages.get(usize::from(id)), result) {",
        )],
        &["FailureAcknowledged"],
    ),
    fault(
        "the gate is left when the data has arrived, before the sync",
        &[
            engine(
                "self.sync_line.join(Waiter::Request(id));",
                "self.sync_line.join(Waiter::Request(id));\n        self.gate.leave();\n        self.flush_if_drained();",
            ),
            engine(
                "        self.done(id, result);\n        self.gate.leave();",
                "        let stage = self.stages[usize::from(id)];\n        self.done(id, result);\n        \
                 if stage == Stage::Syncing {\n            return;\n        }\n        self.gate.leave();",
            ),
        ],
        &["Miscounted"],
    ),
    fault(
        "the gate is left when the data is submitted",
        &[
            engine(
                "        self.submit(id, durable);\n    }",
                "        self.submit(id, durable);\n        if !through || durable {\n            self.gate.leave();\n        }\n    }",
            ),
            engine(
                "        self.done(id, result);\n        self.gate.leave();",
                "        let stage = self.stages[usize::from(id)];\n        self.done(id, result);\n        \
                 if matches!(stage, Stage::Changing { then_sync: false, .. }) {\n            return;\n        }\n        \
                 self.gate.leave();",
            ),
        ],
        &["QuietInFlight"],
    ),
    fault(
        "the sync of an abandoned quiesce ends the next one",
        &[engine(
            "if self.quiesce != Quiesce::Flushing(epoch) {",
            "let _ = epoch;\n        if !matches!(self.quiesce, Quiesce::Flushing(_)) {",
        )],
        &["QuietNotDurable"],
    ),
    fault(
        "a result that was not taken outlives its quiesce",
        &[engine("self.quiesce_result = None;", "")],
        &["QuietInFlight"],
    ),
    fault(
        "a report of open writes that was not taken outlives the next block",
        &[engine("        self.resumed = false;", "")],
        &["ResumedWithoutReason"],
    ),
    fault(
        "discard and write-zeroes are done when transferred, under write-through too",
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
        "a flush is done at once under write back",
        &[engine("if self.policy.ignores_flush() {", "if true {")],
        &["FlushNotDurable"],
    ),
    fault(
        "every request is done twice",
        &[engine(
            "self.actions.push_back(Action::Done { id, result });",
            "self.actions.push_back(Action::Done { id, result });\n        \
             self.actions.push_back(Action::Done { id, result });",
        )],
        &["DoneTwice"],
    ),
    fault(
        "a sync forgets the last request that it covered",
        &[sync_line("        self.running = false;\n", "        self.running = false;\n        self.covered.pop();\n")],
        &["NeverDone"],
    ),
    fault(
        "a sync ends the wait of those that wait for the next one, too",
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
            "self.retained.is_empty() && self.is_idle_but_for_retained()",
            "self.reads_in_flight == 0 && self.gate.in_flight() == 0 && self.actions.is_empty()",
        )],
        &["IdleWrong"],
    ),
    fault(
        "a quiesce that finds nothing in flight waits for ever",
        &[engine("        self.flush_if_drained();\n        self.resumed = false;", "        self.resumed = false;")],
        &["QuiesceNeverEnds"],
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
            "        if self.gate.in_flight() == 0 && !self.gate.clone().enter() {\n            return Admission::Blocked;\n        }\n        \
             if kind == Kind::Read {\n            self.reads_in_flight += 1;",
        )],
        &["BlockedWithoutReason"],
    ),
    retaining(
        "a change is admitted while another one is retained",
        &[engine("kind != Kind::Read && !self.retained.is_empty()", "false")],
        &["AdmittedWhileBlocked"],
    ),
    retaining(
        "a retained change has left the gate",
        &[on_error(
            "        self.actions.push_back(Action::Retained { id, errno });",
            "        self.actions.push_back(Action::Retained { id, errno });\n        \
             if matches!(self.stages[usize::from(id)], Stage::RetainedChange { .. }) {\n            self.gate.leave();\n            \
             self.flush_if_drained();\n        }",
        )],
        &["QuietInFlight", "Miscounted"],
    ),
    retaining(
        "retained requests are retried in reverse order",
        &[on_error(
            "for id in std::mem::take(&mut self.retained) {",
            "for id in std::mem::take(&mut self.retained).into_iter().rev() {",
        )],
        &["RetriedOutOfOrder"],
    ),
    retaining(
        "one of the retained requests is not retried",
        &[on_error(
            "for id in std::mem::take(&mut self.retained) {",
            "self.retained.pop();\n        for id in std::mem::take(&mut self.retained) {",
        )],
        &["NeverDone"],
    ),
    retaining(
        "a durable write is retried without its flag",
        &[on_error("self.submit(id, durable);", "self.submit(id, durable && false);")],
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
        "a failure is reported to the guest although failures are retained",
        &[on_error(
            "        let stage = &mut self.stages[usize::from(id)];\n        *stage = match *stage {\n            Stage::Changing",
            "        if true {\n            return match self.stages[usize::from(id)] {\n                \
             Stage::Changing { .. } => self.done_with_change(id, Err(errno)),\n                _ => {\n                    \
             self.reads_in_flight -= 1;\n                    self.done(id, Err(errno));\n                }\n            };\n        }\n        \
             let stage = &mut self.stages[usize::from(id)];\n        *stage = match *stage {\n            Stage::Changing",
        )],
        &["RetainedWrongly"],
    ),
    fault(
        "LEGAL: a flush is done at once under write-through, where everything acknowledged is durable",
        &[engine(
            "if self.policy.ignores_flush() {",
            "if self.policy.ignores_flush() || self.policy.syncs_each_write(self.driver_can_flush) {",
        )],
        &[],
    ),
];
