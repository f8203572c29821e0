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
        rule.profile.exists() && !is_disabled && !allows(&[&rule.profile, &rule.local], program)
    })
}

/// Whether the rules in these files let their profile execute the program. A rule that denies it wins.
fn allows(files: &[&Path], program: &Path) -> bool {
    let texts = files.iter().map(|file| fs::read_to_string(file).unwrap_or_default());
    let text = texts.collect::<Vec<_>>().join("\n");
    let program = program.as_os_str().as_encoded_bytes();
    let mut rules = text.lines().filter_map(ExecuteRule::parse).filter(|rule| matches(rule.path.as_bytes(), program));
    let first = rules.next();
    first.is_some_and(|first| !first.denies && rules.all(|rule| !rule.denies))
}

/// A rule of a profile about the execution of a program (apparmor.d(5), "FILE RULE").
struct ExecuteRule<'a> {
    /// The program's path, which may have wildcards.
    path: &'a str,
    denies: bool,
}

impl<'a> ExecuteRule<'a> {
    /// The rule in this line. `None`: the line is something else.
    fn parse(line: &'a str) -> Option<Self> {
        let line = line.trim();
        let line = line.split_once(" #").map_or(line, |(rule, _comment)| rule);
        // A profile's name may follow.
        let line = line.split_once("->").map_or(line, |(rule, _)| rule).trim_end().trim_end_matches(',');
        let words = || line.split_whitespace();
        let path = match line.split('"').nth(1) {
            Some(quoted) => quoted,
            None => words().find(|word| word.starts_with(['/', '{']))?,
        };
        let is_mode = |word: &str| word.contains('x') && word.chars().all(|letter| "rwalkmixpPcCuU".contains(letter));
        let is_rule = !line.starts_with('#') && words().any(is_mode);
        is_rule.then(|| ExecuteRule { path, denies: words().any(|word| word == "deny") })
    }
}

/// Whether a path matches a pattern of AppArmor (apparmor.d(5), "Globbing"). A pattern with a variable matches nothing, since
/// its values are in other files.
fn matches(pattern: &[u8], path: &[u8]) -> bool {
    let first_is = |is_so: &dyn Fn(u8) -> bool| path.first().is_some_and(|first| is_so(*first));
    match pattern {
        [] => path.is_empty(),
        [b'*', b'*', rest @ ..] => (0..=path.len()).any(|at| matches(rest, &path[at..])),
        [b'*', rest @ ..] => {
            let most = path.iter().position(|byte| *byte == b'/').unwrap_or(path.len());
            (0..=most).any(|at| matches(rest, &path[at..]))
        }
        [b'?', rest @ ..] => first_is(&|first| first != b'/') && matches(rest, &path[1..]),
        [b'\\', literal, rest @ ..] => first_is(&|first| first == *literal) && matches(rest, &path[1..]),
        [b'{', inner @ ..] => match alternatives(inner) {
            Some((alternatives, rest)) => alternatives.iter().any(|one| matches(&[one, rest].concat(), path)),
            None => false,
        },
        [b'[', inner @ ..] => match inner.iter().position(|byte| *byte == b']') {
            Some(end) => first_is(&|first| in_class(&inner[..end], first)) && matches(&inner[end + 1..], &path[1..]),
            None => false,
        },
        [literal, rest @ ..] => first_is(&|first| first == *literal) && matches(rest, &path[1..]),
    }
}

/// The alternatives of `{A,B}` and what is behind it. `inner`: what is behind the `{`.
fn alternatives(inner: &[u8]) -> Option<(Vec<&[u8]>, &[u8])> {
    let (mut found, mut start, mut depth) = (Vec::new(), 0, 0_usize);
    for (at, byte) in inner.iter().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth > 0 => depth -= 1,
            b',' | b'}' if depth == 0 => {
                found.push(&inner[start..at]);
                start = at + 1;
                if *byte == b'}' {
                    return Some((found, &inner[start..]));
                }
            }
            _ => {}
        }
    }
    None
}

/// Whether `[CLASS]` has the byte.
fn in_class(class: &[u8], byte: u8) -> bool {
    let (class, is_negated) = class.strip_prefix(b"^").map_or((class, false), |rest| (rest, true));
    let is_in_range = class.windows(3).any(|range| range[1] == b'-' && (range[0]..=range[2]).contains(&byte));
    (class.contains(&byte) || is_in_range) != is_negated
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
    fn a_rule_allows_the_program_only_if_it_is_about_it() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("rules");
        let program = Path::new("/usr/local/bin/virtioblkctl");
        let allowed = |rules: &str| {
            fs::write(&file, rules).unwrap();
            allows(&[&file, Path::new("/does/not/exist")], program)
        };
        for rules in [
            "/usr/local/bin/* PUx,",
            "/usr/{,local/}{bin,sbin}/virtioblkctl ix, # ours",
            "  audit /usr/** rpix -> other,",
            "\"/usr/local/bin/virtioblkctl\" Ux,",
            "rix /usr/local/bin/virtioblkct[a-m],",
            "/usr/local/bin/v?rtioblk[^x]tl Cx,",
            "/usr/bin/a ix,\n/usr/local/bin/virtioblkctl PUx,",
        ] {
            assert!(allowed(rules), "{rules}");
        }
        for rules in [
            "",
            "deny /usr/local/bin/virtioblkctl x,",
            "/usr/local/bin/* PUx,\naudit deny /usr/local/bin/virtioblk* x,",
            "/usr/local/bin/virtioblkctl-old PUx,",
            "/opt/usr/local/bin/virtioblkctl PUx,",
            "/usr/local/bin/virtioblkctl r,",
            "/usr/local/* PUx,",
            "/usr/bin/a PUx, # as /usr/local/bin/virtioblkctl",
            "#include </usr/local/bin/virtioblkctl> PUx",
            "/usr/{local PUx,",
            "/usr/[ PUx,",
        ] {
            assert!(!allowed(rules), "{rules}");
        }
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
