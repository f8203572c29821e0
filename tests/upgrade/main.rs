//! Upgrades in place by the real programs: what goes along, what is refused, and what happens when either side dies.

mod front_end;
mod given_up;
mod limits;
mod other_build;
mod take_over;
mod trust;
