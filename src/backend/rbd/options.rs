//! The options of librbd that a cache mode needs, and the check that they are in force: pools and images may override any
//! option.

use super::super::Errno;
use super::OpenError;
use super::handle::{Cluster, EffectiveOption, Image};
use crate::engine::{CacheMode, CachePolicy};

/// The option that makes librbd copy a write before it sends it. Without it the guest may change the memory that is being
/// sent; checksums would then fail, and librbd would send the write again for ever.
const COPY_WRITES: (&str, &str) = ("rbd_disable_zero_copy_writes", "true");

/// How long a connection waits for a monitor, in seconds. Ceph's default of 300 would hold up a virtual machine's start.
const MOUNT_TIMEOUT: (&str, &str) = ("client_mount_timeout", "30");

/// Returns the options that a cache mode needs.
pub(super) fn of_mode(policy: CachePolicy) -> &'static [(&'static str, &'static str)] {
    if policy.opens_direct() {
        &[("rbd_cache", "false")]
    } else if policy.ignores_flush() {
        // No flush reaches librbd that would end its writing through.
        &[("rbd_cache", "true"), ("rbd_cache_policy", "writeback"), ("rbd_cache_writethrough_until_flush", "false")]
    } else if policy.guest_sees_write_cache() {
        // The cluster decides the cache's policy: writearound, unless an administrator chose another.
        &[("rbd_cache", "true"), ("rbd_cache_writethrough_until_flush", "true")]
    } else {
        &[("rbd_cache", "true"), ("rbd_cache_policy", "writethrough")]
    }
}

/// Sets the options that the mode needs, and then the user's. [`check`] finds an option of the user that contradicts the
/// mode. Called before the connection.
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
pub(super) struct EffectiveOptions(Vec<(String, EffectiveOption)>);

impl EffectiveOptions {
    pub(super) fn read(image: &Image) -> Result<Self, Errno> {
        let mut options = image.options()?;
        // Not every version lists every option for an image; an image cannot override an option that is not listed.
        for name in [COPY_WRITES.0, "rbd_cache", "rbd_cache_policy", "rbd_cache_writethrough_until_flush"] {
            if !options.iter().any(|(known, _)| known == name) {
                let value = image.cluster_option(name)?;
                options.push((name.to_string(), EffectiveOption { value, overridden_by: None }));
            }
        }
        Ok(EffectiveOptions(options))
    }

    /// Returns an option's value, if this version of librbd has the option.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, effective)| effective.value.as_str())
    }

    /// Whether an option has this value. Booleans are compared by their meaning.
    pub(super) fn is(&self, name: &str, value: &str) -> bool {
        self.get(name).is_some_and(|found| is_same_value(found, value))
    }

    /// Returns a text for each option that breaks the mode's promise: its value, its source and how to fix it.
    fn violations(&self, policy: CachePolicy) -> Vec<String> {
        let mut wrong = Vec::new();
        for &(name, value) in of_mode(policy) {
            let through = name == "rbd_cache_policy" && value == "writethrough" && self.is("rbd_cache_max_dirty", "0");
            if !self.is(name, value) && !through {
                wrong.push(self.describe_difference(name, value));
            }
        }
        let persistent = "rbd_persistent_cache_mode";
        if policy.opens_direct() && self.get(persistent).is_some() && !self.is(persistent, "disabled") {
            wrong.push(self.describe_difference(persistent, "disabled"));
        }
        wrong
    }

    fn describe_difference(&self, name: &str, value: &str) -> String {
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

/// Checks the options in force. `may_break`: an option that breaks the mode is only a warning.
pub(super) fn check(
    options: &EffectiveOptions,
    mode: CacheMode,
    image: &str,
    may_break: bool,
) -> Result<(), OpenError> {
    let (name, value) = COPY_WRITES;
    if !options.is(name, value) {
        return Err(OpenError::new(format!(
            "{image}: {}; a guest that changes its memory while it is written would hang the disk for ever",
            options.describe_difference(name, value)
        )));
    }
    let wrong = options.violations(mode.into());
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

fn is_same_value(one: &str, other: &str) -> bool {
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

    fn effective(options: &[(&str, &str, Option<&'static str>)]) -> EffectiveOptions {
        EffectiveOptions(
            options
                .iter()
                .map(|&(name, value, overridden_by)| {
                    (name.into(), EffectiveOption { value: value.into(), overridden_by })
                })
                .collect(),
        )
    }

    fn needed_options(mode: CacheMode) -> Vec<(&'static str, &'static str, Option<&'static str>)> {
        let mut options = vec![("rbd_disable_zero_copy_writes", "true", None)];
        options.extend(of_mode(mode.into()).iter().map(|&(name, value)| (name, value, None)));
        options
    }

    #[test]
    fn every_mode_accepts_exactly_the_options_that_it_needs() {
        for mode in CacheMode::ALL {
            let good = needed_options(mode);
            check(&effective(&good), mode, "p/i", false).unwrap();
            for at in 0..good.len() {
                let mut options = good.clone();
                options[at].1 = match options[at].1 {
                    "true" => "false",
                    "false" => "true",
                    _ => "writearound",
                };
                options[at].2 = Some("pool");
                let error = check(&effective(&options), mode, "p/i", false).unwrap_err().to_string();
                for part in ["p/i", options[at].0, "the pool overrides", "rbd config pool"] {
                    assert!(error.contains(part), "{mode}: '{part}' is missing in: {error}");
                }
                // Only the option that copies the guest's memory cannot be overridden.
                assert_eq!(check(&effective(&options), mode, "p/i", true).is_ok(), at > 0, "{mode}: {}", options[at].0);
            }
        }
    }

    #[test]
    fn other_spellings_of_the_same_value_are_accepted() {
        let mut options = needed_options(CacheMode::None);
        options[1].1 = "0";
        check(&effective(&options), CacheMode::None, "p/i", false).unwrap();
        let mut options = needed_options(CacheMode::Writethrough);
        options[2].1 = "writeback";
        options.push(("rbd_cache_max_dirty", "0", None));
        check(&effective(&options), CacheMode::Writethrough, "p/i", false).unwrap();
    }

    #[test]
    fn a_persistent_cache_breaks_a_mode_without_cache() {
        let mut options = needed_options(CacheMode::None);
        options.push(("rbd_persistent_cache_mode", "rwl", Some("image")));
        let error = check(&effective(&options), CacheMode::None, "p/i", false).unwrap_err().to_string();
        assert!(error.contains("the image overrides rbd_persistent_cache_mode with rwl"), "{error}");
        options[2].1 = "disabled";
        check(&effective(&options), CacheMode::None, "p/i", false).unwrap();
        options[1].1 = "true";
        assert!(
            check(&effective(&options), CacheMode::Writeback, "p/i", false).is_err(),
            "these are not the mode's options"
        );
    }
}
