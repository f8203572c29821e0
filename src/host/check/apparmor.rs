//! What AppArmor's rules on this host let QEMU and libvirtd do. Read from the files of the rules, since the kernel shows only
//! their names.

use std::fs;
use std::path::{Path, PathBuf};

/// Where rules are.
pub(super) const RULES: &str = "/etc/apparmor.d";
/// The profiles of libvirt's daemons (src/security/apparmor/usr.sbin.libvirtd.in). Each includes a file of this name in `local`.
const PROFILES: [&str; 2] = ["usr.sbin.libvirtd", "usr.sbin.virtqemud"];
/// Directories whose programs these profiles let the daemon execute, unconfined.
const ALLOWED: [&str; 4] = ["/bin", "/sbin", "/usr/bin", "/usr/sbin"];

/// A rule that a profile lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingRule {
    /// The program that the profile does not let libvirt's daemon execute.
    pub program: PathBuf,
    /// The file of local rules that the profile includes.
    pub local: PathBuf,
    /// The profile's file.
    pub profile: PathBuf,
}

/// Whether the kernel has AppArmor, and it is on.
pub(super) fn is_on() -> bool {
    fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.trim() == "Y")
}

/// Whether the rule for the disks' sockets is installed. `None`: libvirt has no rules for QEMU here.
pub(super) fn has_socket_rule(rules: &Path) -> Option<bool> {
    let abstractions = rules.join("abstractions");
    let of_libvirt = abstractions.join("libvirt-qemu").exists();
    of_libvirt.then(|| abstractions.join("libvirt-qemu.d/virtioblkd").exists())
}

/// The rule without which libvirt's daemon cannot execute its hook, `program`: AppArmor judges the program that a link leads to.
pub(super) fn missing_hook_rule(rules: &Path, program: &Path) -> Option<MissingRule> {
    if program.parent().is_some_and(|parent| ALLOWED.iter().any(|allowed| parent == Path::new(allowed))) {
        return None;
    }
    let rule = |name: &str| MissingRule {
        program: program.to_owned(),
        local: rules.join("local").join(name),
        profile: rules.join(name),
    };
    PROFILES.iter().map(|name| rule(name)).find(|rule| {
        let is_disabled = rules.join("disable").join(rule.profile.file_name().unwrap_or_default()).exists();
        rule.profile.exists() && !is_disabled && !names(&rule.profile, program) && !names(&rule.local, program)
    })
}

/// Whether a rule in this file names the program.
fn names(file: &Path, program: &Path) -> bool {
    let text = fs::read_to_string(file).unwrap_or_default();
    let program = program.display().to_string();
    text.lines().filter(|line| !line.trim_start().starts_with('#')).any(|line| line.contains(&program))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_outside_the_systems_directories_needs_a_rule() {
        let rules = tempfile::tempdir().unwrap();
        let path = |name: &str| rules.path().join(name);
        let missing = |program: &str| missing_hook_rule(rules.path(), Path::new(program)).map(|rule| rule.local);
        let program = "/usr/local/bin/virtioblkctl";
        assert_eq!(missing(program), None, "no profile confines libvirt's daemon");
        for directory in ["local", "disable"] {
            fs::create_dir(path(directory)).unwrap();
        }
        fs::write(path("usr.sbin.libvirtd"), "/usr/bin/* PUx,\n").unwrap();
        assert_eq!((missing(program), missing("/usr/bin/virtioblkctl")), (Some(path("local/usr.sbin.libvirtd")), None));
        fs::write(path("local/usr.sbin.libvirtd"), format!("# {program} PUx,\n")).unwrap();
        assert!(missing(program).is_some(), "a comment is no rule");
        fs::write(path("local/usr.sbin.libvirtd"), format!("  {program} PUx,\n")).unwrap();
        assert_eq!(missing(program), None);
        fs::write(path("usr.sbin.virtqemud"), "").unwrap();
        assert_eq!(missing(program), Some(path("local/usr.sbin.virtqemud")));
        fs::write(path("disable/usr.sbin.virtqemud"), "").unwrap();
        assert_eq!(missing(program), None, "a disabled profile confines nothing");
    }

    #[test]
    fn the_rule_for_sockets_is_found_where_libvirt_has_rules() {
        let rules = tempfile::tempdir().unwrap();
        assert_eq!(has_socket_rule(rules.path()), None);
        fs::create_dir_all(rules.path().join("abstractions/libvirt-qemu.d")).unwrap();
        fs::write(rules.path().join("abstractions/libvirt-qemu"), "").unwrap();
        assert_eq!(has_socket_rule(rules.path()), Some(false));
        fs::write(rules.path().join("abstractions/libvirt-qemu.d/virtioblkd"), "").unwrap();
        assert_eq!(has_socket_rule(rules.path()), Some(true));
    }
}
