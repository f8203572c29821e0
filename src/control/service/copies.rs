//! Carries out the commands for point-in-time copies, and cancels the copies of a connection that ends. The copies
//! themselves are made behind [`crate::disk::Copies`].

use crate::base::rate_limit::{COPY_LOG, log_limited};
use crate::control::protocol::CopyCommand;
use std::collections::HashMap;

use serde_json::{Value, json};

use crate::control::protocol::Error;
use crate::control::quiesce::PeerId;
use crate::disk::{Copies, CopyError, Disk};

/// The connections that prepared copies.
#[derive(Default)]
pub(in crate::control) struct CopyOwners {
    /// For each copy, by its name: the connection, and whether the copy outlives it once it runs.
    owners: HashMap<String, (PeerId, bool)>,
}

impl CopyOwners {
    /// Carries a command out. `is_held`: whether a hold with this token exists.
    pub(in crate::control) fn execute(
        &mut self,
        disk: &dyn Disk,
        peer: PeerId,
        command: CopyCommand,
        is_held: impl FnOnce(&str) -> bool,
    ) -> Result<Value, Error> {
        let Some(copies) = disk.copies() else {
            return match command {
                CopyCommand::Query => Ok(json!([])),
                _ => Err(Error::new("no-copies", "this disk's daemon makes no copies: take the snapshot another way")),
            };
        };
        match command {
            CopyCommand::Prepare { options, detached } => {
                let copy = copies.prepare(&options).map_err(refused)?;
                self.own(&copy, peer, detached);
                return Ok(json!({"copy": copy}));
            }
            CopyCommand::Start { copy, token } => {
                if !is_held(&token) {
                    return Err(Error::new(
                        "not-held",
                        "the hold of this token is not granted, or has ended: quiesce, and start before its lease ends",
                    ));
                }
                copies.start(&copy)
            }
            CopyCommand::Cancel { copy } => copies.cancel(&copy),
            CopyCommand::Bandwidth { copy, bandwidth } => copies.set_bandwidth(&copy, bandwidth),
            CopyCommand::Query => return Ok(json!(copies.status())),
        }
        .map(|()| json!({}))
        .map_err(refused)
    }

    /// A connection has prepared a copy or an export.
    pub(super) fn own(&mut self, copy: &str, peer: PeerId, detached: bool) {
        self.owners.insert(copy.to_owned(), (peer, detached));
    }

    /// Whether a copy may end with a connection.
    pub(super) fn owns_some(&self, peer: PeerId) -> bool {
        self.owners.values().any(|&(owner, _)| owner == peer)
    }

    /// Cancels the copies of a connection that ended, except those that run and are detached.
    pub(in crate::control) fn peer_gone(&mut self, disk: &dyn Disk, peer: PeerId) {
        let Some(copies) = disk.copies() else { return };
        self.owners.retain(|copy, &mut (owner, detached)| {
            if owner != peer {
                return true;
            }
            if !detached || is_prepared(copies, copy) {
                log_limited!(COPY_LOG, Info, "{copy} is cancelled: the connection that asked for it ended");
                // The copy may have ended meanwhile; its event gives the result.
                if let Err(error) = copies.cancel(copy) {
                    log::debug!("{copy}: {}", error.message);
                }
            }
            false
        });
    }

    /// Forgets a copy that ended.
    pub(in crate::control) fn ended(&mut self, copy: &str) {
        self.owners.remove(copy);
    }
}

fn is_prepared(copies: &dyn Copies, copy: &str) -> bool {
    copies.status().iter().any(|status| status.copy == copy && status.state == "prepared")
}

fn refused(error: CopyError) -> Error {
    Error::new(error.code, error.message)
}
