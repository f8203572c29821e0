//! PURE. What follows when a transfer fails: the guest gets the error, or the request is retained and the virtqueue takes no
//! further change until an operator has fixed the cause (QEMU's `werror` and `rerror`).
//!
//! A retained request is still in flight: it is not completed, a quiesce waits for it, and no request that changes the disk
//! is admitted after it; reads continue. (Those that the worker popped before go when a hold, a pause or a stop begins, or
//! when limits are lifted: [`Engine::offer_taken`].) A failed sync is never retained: the data that it should have covered
//! may be gone, and a second sync would report success.

use std::fmt;
use std::str::FromStr;

use super::{Action, Engine, Errno, RequestId, Stage};

/// Which failed transfers are retained instead of reported to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnError {
    /// None: the guest gets every error.
    Report,
    /// Those for want of space, which an operator can add; the guest gets other errors. This is QEMU's default, too.
    #[default]
    Enospc,
    /// All failed transfers.
    Stop,
}

impl OnError {
    /// Every choice, as the documentation lists them.
    pub const ALL: [OnError; 3] = [OnError::Enospc, OnError::Report, OnError::Stop];

    /// The name of the choice, as QEMU spells it.
    pub fn name(self) -> &'static str {
        match self {
            OnError::Report => "report",
            OnError::Enospc => "enospc",
            OnError::Stop => "stop",
        }
    }

    /// Whether a request that failed with `errno` is retained. An exceeded quota is fixed as a full filesystem is.
    pub fn retains(self, errno: Errno) -> bool {
        const ENOSPC: Errno = Errno(28);
        const EDQUOT: Errno = Errno(122);
        match self {
            OnError::Report => false,
            OnError::Enospc => errno == ENOSPC || errno == EDQUOT,
            OnError::Stop => true,
        }
    }
}

impl fmt::Display for OnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for OnError {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        OnError::ALL.into_iter().find(|how| how.name() == text).ok_or_else(|| "use enospc, report or stop".to_owned())
    }
}

impl Engine {
    /// Sets which failures are retained. The worker calls it before the first `offer`; until then none is.
    pub fn set_on_error(&mut self, on_error: OnError) {
        self.on_error = on_error;
    }

    /// Whether a transfer that fails with `errno` now would be retained. The caller must then store the op for the retry.
    pub fn retains(&self, errno: Errno) -> bool {
        self.on_error.retains(errno)
    }

    /// The retained requests, in the order in which they failed.
    pub fn retained(&self) -> &[RequestId] {
        &self.retained
    }

    /// Retries the retained requests in the order in which they failed, and has the worker read its virtqueue again. A
    /// request that fails again is retained again. Does nothing when no request is retained.
    pub fn retry(&mut self) {
        if self.retained.is_empty() {
            return;
        }
        for id in std::mem::take(&mut self.retained) {
            let stage = &mut self.stages[usize::from(id)];
            let durable = match *stage {
                Stage::RetainedChange { then_sync, durable } => {
                    *stage = Stage::Changing { then_sync, durable };
                    durable
                }
                _ => {
                    *stage = Stage::Reading;
                    false
                }
            };
            self.submit(id, durable);
        }
        self.resumed |= !self.gate.is_closed();
    }

    /// Retains no request from now on, and retries those that are retained once more. The guest gets their results,
    /// whatever they are.
    pub fn stop_retaining(&mut self) {
        self.on_error = OnError::Report;
        self.retry();
    }

    /// Whether nothing is in progress but retained requests. The worker may then stop, if the next owner of the virtqueue
    /// does those requests again.
    pub fn is_idle_but_for_retained(&self) -> bool {
        self.reads_in_flight as usize + self.gate.in_flight() as usize == self.retained.len()
            && self.sync_line.is_idle()
            && self.actions.is_empty()
            && self.quiesce_result.is_none()
            && !self.resumed
    }

    /// Retains the request whose transfer failed.
    pub(super) fn retain(&mut self, id: RequestId, errno: Errno) {
        let stage = &mut self.stages[usize::from(id)];
        *stage = match *stage {
            Stage::Changing { then_sync, durable } => Stage::RetainedChange { then_sync, durable },
            _ => Stage::RetainedRead,
        };
        self.retained.push(id);
        self.actions.push_back(Action::Retained { id, errno });
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Admission, CacheMode, CachePolicy, Kind, Token};
    use super::*;

    const ENOSPC: Errno = Errno(28);
    const EIO: Errno = Errno(5);

    fn drain(engine: &mut Engine) -> Vec<Action> {
        std::iter::from_fn(|| engine.next_action()).collect()
    }

    fn data(id: RequestId, durable: bool) -> Action {
        Action::Submit { token: Token::Data(id), durable }
    }

    #[test]
    fn names_are_qemus() {
        for how in OnError::ALL {
            assert_eq!(how.to_string().parse(), Ok(how));
        }
        assert!("ignore".parse::<OnError>().unwrap_err().contains("stop"));
        let retained = OnError::ALL.map(|how| [ENOSPC, Errno(122), EIO].map(|errno| how.retains(errno)));
        assert_eq!(retained, [[true, true, false], [false; 3], [true; 3]]);
    }

    #[test]
    fn a_retained_request_is_retried_as_it_was_and_reads_go_on() {
        let mut engine = Engine::new(CachePolicy::from(CacheMode::Directsync), true);
        engine.set_on_error(OnError::Enospc);
        for (id, kind) in [(0, Kind::Write), (1, Kind::Discard), (2, Kind::Write)] {
            assert_eq!(engine.offer(id, kind), Admission::Admitted);
        }
        assert_eq!(drain(&mut engine), [data(0, true), data(1, false), data(2, true)]);
        engine.complete(Token::Data(2), Err(EIO));
        engine.complete(Token::Data(1), Err(ENOSPC));
        engine.complete(Token::Data(0), Err(ENOSPC));
        let retained = |id| Action::Retained { id, errno: ENOSPC };
        assert_eq!(drain(&mut engine), [Action::Done { id: 2, result: Err(EIO) }, retained(1), retained(0)]);
        assert!(engine.is_idle_but_for_retained() && !engine.is_idle());
        assert_eq!(engine.offer(2, Kind::Flush), Admission::Blocked);
        assert_eq!(engine.offer(3, Kind::Read), Admission::Admitted);
        assert_eq!(drain(&mut engine), [data(3, false)]);
        assert!(!engine.is_idle_but_for_retained());
        engine.retry();
        assert_eq!(drain(&mut engine), [data(1, false), data(0, true), Action::Resumed]);
        engine.complete(Token::Data(0), Err(ENOSPC));
        assert_eq!(drain(&mut engine), [retained(0)]);
        engine.stop_retaining();
        engine.complete(Token::Data(0), Err(ENOSPC));
        assert_eq!(drain(&mut engine), [data(0, true), Action::Done { id: 0, result: Err(ENOSPC) }, Action::Resumed]);
    }
}
