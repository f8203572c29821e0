//! What a cache mode asks of librbd, and whether it got it: pools and images may override any option.

use super::super::Errno;
use super::OpenError;
use super::handle::{Cluster, Effective, Image};
use crate::engine::{CacheMode, CachePolicy};

/// The option that keeps librbd from sending a guest's memory while the guest may change it: checksums would fail, and
/// the write would be sent again for ever.
const COPY_WRITES: (&str, &str) = ("rbd_disable_zero_copy_writes", "true");

/// How long a connection waits for a monitor, in seconds. Ceph's default of 300 would hold up a virtual machine's start.
const MOUNT_TIMEOUT: (&str, &str) = ("client_mount_timeout", "30");

/// A mode in librbd's words.
pub(super) fn of_mode(policy: CachePolicy) -> &'static [(&'static str, &'static str)] {
    if policy.opens_direct() {
        &[("rbd_cache", "false")]
    } else if policy.ignores_flush() {
        // No flush is passed on that would end writing through.
        &[("rbd_cache", "true"), ("rbd_cache_policy", "writeback"), ("rbd_cache_writethrough_until_flush", "false")]
    } else if policy.guest_sees_write_cache() {
        // The cache's policy is left to the cluster: writearound, unless somebody chose another.
        &[("rbd_cache", "true"), ("rbd_cache_writethrough_until_flush", "true")]
    } else {
        &[("rbd_cache", "true"), ("rbd_cache_policy", "writethrough")]
    }
}

/// Sets what the mode needs, then what the user wants: what contradicts the mode is found out by [`check`]. Before the
/// connection.
pub(super) fn set(cluster: &Cluster, policy: CachePolicy, user: &[(String, String)]) -> Result<(), OpenError> {
    let ours = [MOUNT_TIMEOUT, COPY_WRITES].into_iter().chain(of_mode(policy).iter().copied());
    for (name, value) in ours {
        cluster.set(name, value).map_err(|errno| OpenError::option(name, value, errno))?;
    }
    for (name, value) in user {
        cluster.set(name, value).map_err(|errno| OpenError::option(name, value, errno))?;
    }
    Ok(())
}

/// The options in force for an open image.
pub(super) struct InForce(Vec<(String, Effective)>);

impl InForce {
    pub(super) fn read(image: &Image) -> Result<Self, Errno> {
        let mut options = image.options()?;
        // Not every version lists every option by image; then none can override it.
        for name in [COPY_WRITES.0, "rbd_cache", "rbd_cache_policy", "rbd_cache_writethrough_until_flush"] {
            if !options.iter().any(|(known, _)| known == name) {
                let value = image.cluster_option(name)?;
                options.push((name.to_string(), Effective { value, overridden_by: None }));
            }
        }
        Ok(InForce(options))
    }

    /// An option's value, if this version has it.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, effective)| effective.value.as_str())
    }

    /// Whether an option has this value. Numbers and truths are compared by what they mean.
    pub(super) fn is(&self, name: &str, value: &str) -> bool {
        self.get(name).is_some_and(|found| same(found, value))
    }

    /// Why the mode is not what it promises: each option with its value, its source, and the mend.
    fn against(&self, policy: CachePolicy) -> Vec<String> {
        let mut wrong = Vec::new();
        for &(name, value) in of_mode(policy) {
            let through = name == "rbd_cache_policy" && value == "writethrough" && self.is("rbd_cache_max_dirty", "0");
            if !self.is(name, value) && !through {
                wrong.push(self.complaint(name, value));
            }
        }
        let persistent = "rbd_persistent_cache_mode";
        if policy.opens_direct() && self.get(persistent).is_some() && !self.is(persistent, "disabled") {
            wrong.push(self.complaint(persistent, "disabled"));
        }
        wrong
    }

    fn complaint(&self, name: &str, value: &str) -> String {
        let found = self.get(name).unwrap_or("missing");
        let source = self.0.iter().find(|(known, _)| known == name).and_then(|(_, option)| option.overridden_by);
        match source {
            Some(place) => format!(
                "the {place} overrides {name} with {found}, and {value} is needed (rbd config {place} remove ... {name})"
            ),
            None => format!("{name} is {found}, and {value} is needed (see --rbd-option and the Ceph configuration)"),
        }
    }
}

/// Checks the options in force. `may_break`: what breaks the mode is only warned of.
pub(super) fn check(options: &InForce, mode: CacheMode, image: &str, may_break: bool) -> Result<(), OpenError> {
    let (name, value) = COPY_WRITES;
    if !options.is(name, value) {
        return Err(OpenError::new(format!(
            "{image}: {}; a guest that changes its memory while it is written would hang the disk for ever",
            options.complaint(name, value)
        )));
    }
    let wrong = options.against(mode.into());
    if wrong.is_empty() {
        return Ok(());
    }
    let text = wrong.join("; ");
    if may_break {
        log::warn!("{image}: cache mode {mode} is not what it promises: {text}");
        return Ok(());
    }
    Err(OpenError::new(format!(
        "{image}: cache mode {mode} would not be what it promises: {text}; choose another --cache, or accept it with \
         --rbd-allow-override"
    )))
}

fn same(one: &str, other: &str) -> bool {
    let truth = |text: &str| match text {
        "true" | "1" | "yes" | "on" => Some(true),
        "false" | "0" | "no" | "off" => Some(false),
        _ => None,
    };
    one == other || matches!((truth(one), truth(other)), (Some(one), Some(other)) if one == other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_force(options: &[(&str, &str, Option<&'static str>)]) -> InForce {
        InForce(
            options
                .iter()
                .map(|&(name, value, overridden_by)| (name.into(), Effective { value: value.into(), overridden_by }))
                .collect(),
        )
    }

    fn as_asked(mode: CacheMode) -> Vec<(&'static str, &'static str, Option<&'static str>)> {
        let mut options = vec![("rbd_disable_zero_copy_writes", "true", None)];
        options.extend(of_mode(mode.into()).iter().map(|&(name, value)| (name, value, None)));
        options
    }

    #[test]
    fn every_mode_is_content_with_what_it_asked_for_and_with_nothing_else() {
        for mode in CacheMode::ALL {
            let good = as_asked(mode);
            check(&in_force(&good), mode, "p/i", false).unwrap();
            for at in 0..good.len() {
                let mut options = good.clone();
                options[at].1 = match options[at].1 {
                    "true" => "false",
                    "false" => "true",
                    _ => "writearound",
                };
                options[at].2 = Some("pool");
                let error = check(&in_force(&options), mode, "p/i", false).unwrap_err().to_string();
                for part in ["p/i", options[at].0, "the pool overrides", "rbd config pool"] {
                    assert!(error.contains(part), "{mode}: '{part}' is missing in: {error}");
                }
                // Only that the guest's memory is copied is not to be had without.
                assert_eq!(check(&in_force(&options), mode, "p/i", true).is_ok(), at > 0, "{mode}: {}", options[at].0);
            }
        }
    }

    #[test]
    fn other_words_for_the_same_are_the_same() {
        let mut options = as_asked(CacheMode::None);
        options[1].1 = "0";
        check(&in_force(&options), CacheMode::None, "p/i", false).unwrap();
        let mut options = as_asked(CacheMode::Writethrough);
        options[2].1 = "writeback";
        options.push(("rbd_cache_max_dirty", "0", None));
        check(&in_force(&options), CacheMode::Writethrough, "p/i", false).unwrap();
    }

    #[test]
    fn a_persistent_cache_is_a_cache() {
        let mut options = as_asked(CacheMode::None);
        options.push(("rbd_persistent_cache_mode", "rwl", Some("image")));
        let error = check(&in_force(&options), CacheMode::None, "p/i", false).unwrap_err().to_string();
        assert!(error.contains("the image overrides rbd_persistent_cache_mode with rwl"), "{error}");
        options[2].1 = "disabled";
        check(&in_force(&options), CacheMode::None, "p/i", false).unwrap();
        options[1].1 = "true";
        assert!(check(&in_force(&options), CacheMode::Writeback, "p/i", false).is_err(), "not the mode's own options");
    }
}
