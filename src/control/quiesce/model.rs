//! Random scripts against simple invariants: the gate is closed exactly while somebody holds or waits, each request is
//! answered exactly once unless its connection ended, epochs are never reused, a grant only follows the disk's good answer
//! for the current closing, a hold ends exactly once and for the reason that occurred, and with a bound writes never wait
//! for longer, whoever holds.

use std::collections::{HashMap, HashSet};

use super::*;
use crate::base::prng::Prng;

/// What an observer of the effects knows.
#[derive(Default)]
struct World {
    closed: Option<u64>,
    /// The current closing has settled well.
    quiet: bool,
    epochs: HashSet<u64>,
    waiting: HashMap<RequestId, (PeerId, Instant)>,
    holding: HashMap<String, (PeerId, bool, Instant)>,
    answered: HashSet<RequestId>,
    /// Since when writes wait, and when they were let go last.
    waited_since: Option<Instant>,
    opened: Option<Instant>,
}

impl World {
    fn apply(&mut self, coordinator: &mut Coordinator, now: Instant) {
        for effect in coordinator.effects() {
            match effect {
                HoldEffect::CloseGate(epoch) => {
                    assert!(self.closed.is_none(), "closed twice");
                    assert!(self.epochs.insert(epoch), "epoch {epoch} reused");
                    (self.closed, self.quiet) = (Some(epoch), false);
                    if self.opened.is_none_or(|opened| now - opened >= Duration::from_millis(100)) {
                        self.waited_since = Some(now);
                    }
                    self.opened = None;
                }
                HoldEffect::OpenGate => {
                    assert!(self.closed.take().is_some(), "opened twice");
                    self.opened = Some(now);
                }
                HoldEffect::Granted { request, hold, epoch, holders, .. } => {
                    assert!(self.quiet && self.closed == Some(epoch), "granted without the disk's answer");
                    assert!(self.answered.insert(request), "answered twice");
                    let (owner, _) = self.waiting.remove(&request).expect("an answer to nobody");
                    assert_eq!(owner, hold.owner);
                    assert!(hold.until >= now);
                    self.holding.insert(hold.token, (owner, hold.detached, hold.until));
                    assert!(holders >= self.holding.len());
                }
                HoldEffect::Refused { request, why, .. } => {
                    assert!(self.answered.insert(request), "answered twice");
                    let (_, deadline) = self.waiting.remove(&request).expect("an answer to nobody");
                    let bound = coordinator.max_hold().zip(self.waited_since).map(|(max, since)| since + max);
                    let deadline = bound.map_or(deadline, |bound| bound.min(deadline));
                    assert!(why != Refusal::Timeout || deadline <= now, "a timeout before its time");
                    assert!(why != Refusal::MaxHold || bound.is_some_and(|bound| bound <= now), "refused early");
                }
                HoldEffect::Ended { hold, reason, .. } => {
                    let (_, detached, until) = self.holding.remove(&hold.token).expect("left twice or never held");
                    assert!(reason != EndReason::LeaseExpired || until <= now, "a lease that ended early");
                    assert!(reason != EndReason::ConnectionClosed || !detached);
                }
            }
        }
        assert_eq!(coordinator.holds().len(), self.holding.len());
        assert_eq!(coordinator.waiting(), self.waiting.len());
        let somebody = !self.waiting.is_empty() || !self.holding.is_empty();
        assert_eq!(self.closed.is_some(), somebody, "the gate is closed exactly while somebody holds or waits");
        assert_eq!(coordinator.next_deadline().is_some(), somebody, "nobody holds for ever");
        assert!(self.holding.is_empty() || self.quiet, "a holder of a disk that is not quiet");
        if let (Some(max), Some(since), Some(_)) = (coordinator.max_hold(), self.waited_since, self.closed) {
            let next = coordinator.next_deadline().expect("somebody holds or waits");
            assert!(next <= since + max, "writes may wait for longer than the bound");
        }
    }
}

fn one_script(seed: u64, steps: u32) {
    let random = &mut Prng::new(seed);
    let max_hold = (random.below(2) == 0).then(|| Duration::from_millis(500 + random.below(9000)));
    let (mut coordinator, mut world) = (Coordinator::new(max_hold), World::default());
    let mut now = Instant::now();
    let mut next_request = 0;
    for _ in 0..steps {
        let peer = random.below(4);
        let token = format!("t{}", next_request.max(8) - 1 - random.below(8));
        match random.below(13) {
            0..=2 => {
                next_request += 1;
                let second = Duration::from_secs(1);
                let (timeout, lease) = (second * (1 + random.below(9) as u32), second * (1 + random.below(9) as u32));
                let request = HoldRequest {
                    id: next_request,
                    token: format!("t{next_request}"),
                    owner: peer,
                    timeout,
                    lease,
                    detached: random.below(2) == 0,
                    who: ClientIdentity::default(),
                };
                world.waiting.insert(next_request, (peer, now + timeout));
                coordinator.quiesce(request, now);
            }
            // The disk answers: for the closing under way, or late, for one given up; well or badly.
            3..=5 => {
                let Some(current) = coordinator.last_epoch.checked_sub(random.below(3)) else { continue };
                let result = if random.below(4) == 0 { Err(Errno(5)) } else { Ok(HoldFigures::default()) };
                world.quiet |= world.closed == Some(current) && result.is_ok() && !world.waiting.is_empty();
                coordinator.settled(current, result, now);
            }
            6 => {
                let known = world.holding.contains_key(&token);
                assert_eq!(coordinator.resume(&token, now).is_ok(), known);
            }
            7 => {
                let renewed = coordinator.renew(&token, Duration::from_secs(4), now);
                assert_eq!(renewed.is_ok(), world.holding.contains_key(&token));
                if let (Ok(lease), Some((.., until))) = (renewed, world.holding.get_mut(&token)) {
                    assert!(lease <= Duration::from_secs(4));
                    *until = now + lease;
                }
            }
            8 => {
                world.waiting.retain(|_, (owner, _)| *owner != peer);
                coordinator.peer_gone(peer, now);
                world.apply(&mut coordinator, now);
                assert!(world.holding.values().all(|(owner, detached, _)| *owner != peer || *detached));
            }
            9 if random.below(8) == 0 => {
                coordinator.resume_all(now);
            }
            10 if random.below(8) == 0 => coordinator.shutdown(now),
            11 => coordinator.cancel(next_request.saturating_sub(random.below(4)), now),
            _ => {
                now += Duration::from_millis(random.below(2500));
                coordinator.tick(now);
                world.apply(&mut coordinator, now);
                assert!(coordinator.next_deadline().is_none_or(|deadline| deadline > now));
            }
        }
        world.apply(&mut coordinator, now);
    }
    // Whatever happened, time alone opens the gate.
    coordinator.tick(now + Duration::from_secs(3600));
    world.apply(&mut coordinator, now + Duration::from_secs(3600));
    assert_eq!(coordinator.state(), "open");
    assert!(world.closed.is_none());
}

#[test]
fn random_scripts_keep_the_invariants() {
    for seed in 0..20_000 {
        one_script(seed, 60);
    }
}
