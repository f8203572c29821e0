//! A set of claims that seldom has more than one member.

use std::collections::BTreeSet;
use std::ops::Range;

use super::claims::ClaimId;

/// Claims in the order of their arrival. The first one needs no allocation.
#[derive(Default)]
pub(super) enum ClaimSet {
    #[default]
    Empty,
    One(ClaimId),
    Many(BTreeSet<ClaimId>),
}

impl ClaimSet {
    /// Adds a claim. Returns `false` when it was in the set already.
    pub(super) fn insert(&mut self, id: ClaimId) -> bool {
        match self {
            ClaimSet::Empty => *self = ClaimSet::One(id),
            ClaimSet::One(first) if *first == id => return false,
            ClaimSet::One(first) => *self = ClaimSet::Many([*first, id].into()),
            ClaimSet::Many(all) => return all.insert(id),
        }
        true
    }

    /// Removes a claim. If it was the earliest, returns the number of the next, or the highest number if there is none.
    pub(super) fn remove(&mut self, id: ClaimId) -> Option<ClaimId> {
        let was_first = self.first() == Some(id);
        match self {
            ClaimSet::One(first) if *first == id => *self = ClaimSet::Empty,
            ClaimSet::Empty | ClaimSet::One(_) => {}
            ClaimSet::Many(all) => {
                all.remove(&id);
                if all.is_empty() {
                    *self = ClaimSet::Empty;
                }
            }
        }
        was_first.then(|| self.first().unwrap_or(ClaimId::MAX))
    }

    pub(super) fn first(&self) -> Option<ClaimId> {
        match self {
            ClaimSet::Empty => None,
            ClaimSet::One(first) => Some(*first),
            ClaimSet::Many(all) => all.first().copied(),
        }
    }

    /// Whether there are two or more.
    pub(super) fn has_more_than_one(&self) -> bool {
        matches!(self, ClaimSet::Many(all) if all.len() > 1)
    }

    pub(super) fn is_empty(&self) -> bool {
        matches!(self, ClaimSet::Empty)
    }

    /// The claims with these numbers, in their order.
    pub(super) fn range(&self, ids: Range<ClaimId>) -> impl Iterator<Item = ClaimId> {
        let (one, many) = match self {
            ClaimSet::Empty => (None, None),
            ClaimSet::One(first) => (Some(*first).filter(|first| ids.contains(first)), None),
            ClaimSet::Many(all) => (None, Some(all.range(ids).copied())),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }
}
