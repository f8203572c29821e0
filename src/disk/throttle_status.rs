//! The limits of a disk's rates in the status and in the messages of an upgrade, in libvirt's words.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::engine::throttle::{Limits, Words};

/// Limits by libvirt's words, such as `total-iops-sec`. Those that are not set are absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ThrottleStatus(pub BTreeMap<String, u64>);

impl ThrottleStatus {
    /// The words of these limits.
    pub fn of(limits: &Limits) -> Self {
        ThrottleStatus(limits.values(Words::Libvirt).into_iter().collect())
    }

    /// The limits of these words. Those of another version that this one does not know are left out.
    pub fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        for (name, value) in &self.0 {
            limits.set(Words::Libvirt, name, *value);
        }
        limits
    }
}
