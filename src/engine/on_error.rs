//! PURE. What follows when a transfer fails: the guest gets the error, or the request is retained and the virtqueue takes no
//! further change until an operator has fixed the cause (QEMU's `werror` and `rerror`).
//!
//! A retained request is still in flight: it is not completed, a quiesce waits for it, and no request that changes the disk
//! is taken after it; reads go on. A failed sync is never retained: the data that it should have covered may be gone, and a
//! second sync would report success.

use std::fmt;
use std::str::FromStr;

use super::{Action, Engine, Errno, Slot, Stage};

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

    /// Whether a request that failed with `errno` is retained. An exceeded quota is fixed as a full file system is.
    pub fn keeps(self, errno: Errno) -> bool {
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

    /// Whether a transfer that fails with `errno` now would be retained. The caller must then keep the op for the retry.
    pub fn keeps(&self, errno: Errno) -> bool {
        self.on_error.keeps(errno)
    }

    /// The retained requests, in the order in which they failed.
    pub fn kept(&self) -> &[Slot] {
        &self.kept
    }

    /// Retries the retained requests in the order in which they failed, and has the worker read its virtqueue again. A
    /// request that fails again is retained again. Does nothing when no request is retained.
    pub fn retry(&mut self) {
        if self.kept.is_empty() {
            return;
        }
        for slot in std::mem::take(&mut self.kept) {
            let stage = &mut self.stages[usize::from(slot)];
            let durable = match *stage {
                Stage::KeptChange { then_sync, durable } => {
                    *stage = Stage::Changing { then_sync, durable };
                    durable
                }
                _ => {
                    *stage = Stage::Reading;
                    false
                }
            };
            self.submit(slot, durable);
        }
        self.resumed |= !self.gate.is_closed();
    }

    /// Retains no request from now on, and retries those that are retained once more. The guest gets their results,
    /// whatever they are.
    pub fn stop_keeping(&mut self) {
        self.on_error = OnError::Report;
        self.retry();
    }

    /// Whether nothing is in progress but retained requests. The worker may then stop, if the next owner of the virtqueue
    /// does those requests again.
    pub fn rests(&self) -> bool {
        self.reads_in_flight as usize + self.gate.in_flight() as usize == self.kept.len()
            && self.sync_line.is_idle()
            && self.actions.is_empty()
            && self.settled.is_none()
            && !self.resumed
    }

    /// Retains the request whose transfer failed.
    pub(super) fn keep(&mut self, slot: Slot, errno: Errno) {
        let stage = &mut self.stages[usize::from(slot)];
        *stage = match *stage {
            Stage::Changing { then_sync, durable } => Stage::KeptChange { then_sync, durable },
            _ => Stage::KeptRead,
        };
        self.kept.push(slot);
        self.actions.push_back(Action::Keep { slot, errno });
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

    fn data(slot: Slot, durable: bool) -> Action {
        Action::Submit { token: Token::Data(slot), durable }
    }

    #[test]
    fn names_are_qemus() {
        for how in OnError::ALL {
            assert_eq!(how.to_string().parse(), Ok(how));
        }
        assert!("ignore".parse::<OnError>().unwrap_err().contains("stop"));
        let kept = OnError::ALL.map(|how| [ENOSPC, Errno(122), EIO].map(|errno| how.keeps(errno)));
        assert_eq!(kept, [[true, true, false], [false; 3], [true; 3]]);
    }

    #[test]
    fn what_is_kept_is_tried_again_as_it_was_and_reads_go_on() {
        let mut engine = Engine::new(CachePolicy::from(CacheMode::Directsync), true);
        engine.set_on_error(OnError::Enospc);
        for (slot, kind) in [(0, Kind::Write), (1, Kind::Discard), (2, Kind::Write)] {
            assert_eq!(engine.offer(slot, kind), Admission::Taken);
        }
        assert_eq!(drain(&mut engine), [data(0, true), data(1, false), data(2, true)]);
        engine.complete(Token::Data(2), Err(EIO));
        engine.complete(Token::Data(1), Err(ENOSPC));
        engine.complete(Token::Data(0), Err(ENOSPC));
        let keep = |slot| Action::Keep { slot, errno: ENOSPC };
        assert_eq!(drain(&mut engine), [Action::Done { slot: 2, result: Err(EIO) }, keep(1), keep(0)]);
        assert!(engine.rests() && !engine.is_idle());
        assert_eq!(engine.offer(2, Kind::Flush), Admission::Held);
        assert_eq!(engine.offer(3, Kind::Read), Admission::Taken);
        assert_eq!(drain(&mut engine), [data(3, false)]);
        assert!(!engine.rests());
        engine.retry();
        assert_eq!(drain(&mut engine), [data(1, false), data(0, true), Action::Resumed]);
        engine.complete(Token::Data(0), Err(ENOSPC));
        assert_eq!(drain(&mut engine), [keep(0)]);
        engine.stop_keeping();
        engine.complete(Token::Data(0), Err(ENOSPC));
        assert_eq!(drain(&mut engine), [data(0, true), Action::Done { slot: 0, result: Err(ENOSPC) }, Action::Resumed]);
    }
}
