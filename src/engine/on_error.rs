//! PURE. What follows when a transfer fails: its error is the guest's, or the request is kept and the ring stands still until
//! somebody has mended the cause (QEMU's `werror` and `rerror`).
//!
//! A kept request is in flight still: it is neither answered nor forgotten, a quiesce waits for it, and nothing that
//! changes the disk is taken after it; reads go on. A sync that failed is never kept: what it should have covered may be
//! gone, and a second one would claim success.

use std::fmt;
use std::str::FromStr;

use super::{Action, Engine, Errno, Slot, Stage};

/// Which failures of a transfer are kept from the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnError {
    /// None: each is answered with its error.
    Report,
    /// Those for want of space, which somebody can add; others are answered. QEMU's default, too.
    #[default]
    Enospc,
    /// All.
    Stop,
}

impl OnError {
    /// Every choice, as the documentation lists them.
    pub const ALL: [OnError; 3] = [OnError::Enospc, OnError::Report, OnError::Stop];

    /// The choice in QEMU's words.
    pub fn name(self) -> &'static str {
        match self {
            OnError::Report => "report",
            OnError::Enospc => "enospc",
            OnError::Stop => "stop",
        }
    }

    /// Whether a request that failed so is kept. A quota that is exceeded is mended as a full filesystem is.
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
    /// Which failures are kept. Called before the first `offer`. Never called: none.
    pub fn set_on_error(&mut self, on_error: OnError) {
        self.on_error = on_error;
    }

    /// Whether a transfer that fails so now would be kept: the caller then needs it again.
    pub fn keeps(&self, errno: Errno) -> bool {
        self.on_error.keeps(errno)
    }

    /// The requests that are kept, in the order in which they failed.
    pub fn kept(&self) -> &[Slot] {
        &self.kept
    }

    /// Tries again what is kept, in the order in which it failed, and has the ring read again. What fails again is kept
    /// again. Without effect where nothing is kept.
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

    /// Keeps nothing from now on, and tries once more what is kept: its outcome, whatever it is, is the guest's.
    pub fn stop_keeping(&mut self) {
        self.on_error = OnError::Report;
        self.retry();
    }

    /// Nothing is under way but what is kept: the ring may stop, if whoever has it next does that again.
    pub fn rests(&self) -> bool {
        self.reads_in_flight as usize + self.gate.in_flight() as usize == self.kept.len()
            && self.sync_line.is_idle()
            && self.actions.is_empty()
            && self.settled.is_none()
            && !self.resumed
    }

    /// A transfer failed, and is to be tried again some time.
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
    use super::super::{CacheMode, CachePolicy, Kind, Offer, Token};
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
            assert_eq!(engine.offer(slot, kind), Offer::Taken);
        }
        assert_eq!(drain(&mut engine), [data(0, true), data(1, false), data(2, true)]);
        engine.complete(Token::Data(2), Err(EIO));
        engine.complete(Token::Data(1), Err(ENOSPC));
        engine.complete(Token::Data(0), Err(ENOSPC));
        let keep = |slot| Action::Keep { slot, errno: ENOSPC };
        assert_eq!(drain(&mut engine), [Action::Done { slot: 2, result: Err(EIO) }, keep(1), keep(0)]);
        assert!(engine.rests() && !engine.is_idle());
        assert_eq!(engine.offer(2, Kind::Flush), Offer::Held);
        assert_eq!(engine.offer(3, Kind::Read), Offer::Taken);
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
