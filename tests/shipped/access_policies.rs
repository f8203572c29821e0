//! The rules for AppArmor and SELinux are accepted by their compilers. No test enforces them: that needs such a kernel.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use kit::guest::tell;
use kit::programs;

/// Runs a program that may be in a directory that only root has in PATH. `None` if it is not installed.
fn run(name: &str, command: impl Fn(&mut Command) -> std::io::Result<Output>) -> Option<Output> {
    let places = ["", "/sbin/", "/usr/sbin/", "/usr/lib/libvirt/"];
    places.iter().find_map(|place| command(&mut Command::new(format!("{place}{name}"))).ok())
}

#[test]
fn the_apparmor_rule_is_compiled() {
    let rule = programs::root().join("qemu-configs/apparmor/libvirt-qemu.d/virtioblkd");
    let directory = tempfile::tempdir().expect("room");
    let profile = directory.path().join("profile");
    for (text, is_good) in [(format!("include \"{}\"\n", rule.display()), true), ("  /run/x rw\n".to_owned(), false)] {
        fs::write(&profile, format!("profile virtioblkd-test {{\n{text}}}\n")).expect("room");
        // It is compiled, and not loaded into the kernel.
        match run("apparmor_parser", |command| command.args(["-Q", "-K"]).arg(&profile).output()) {
            Some(output) => assert_eq!(output.status.success(), is_good, "{text}: {output:?}"),
            None => return tell("SKIPPED: apparmor_parser is not installed: the rule was not compiled"),
        }
    }
}

/// A copy of this machine's AppArmor rules, with a directory for local ones. `None`: libvirt has none here.
fn copied_rules(lacking: &str) -> Option<tempfile::TempDir> {
    let rules = Path::new("/etc/apparmor.d");
    if !rules.join(lacking).exists() {
        tell(&format!(
            "SKIPPED: this machine has no {}: libvirt's profiles were not compiled",
            rules.join(lacking).display()
        ));
        return None;
    }
    let copy = tempfile::tempdir().expect("room");
    let copied = Command::new("cp").arg("-r").arg(rules.join(".")).arg(copy.path()).status().expect("cp runs");
    assert!(copied.success());
    Some(copy)
}

/// The text of a profile with all that it includes, if the compiler accepts it. `None`, said aloud, where there is no compiler.
fn compiled(rules: &Path, profile: &str) -> Option<String> {
    let parser = |arguments: &[&str]| {
        run("apparmor_parser", |command| {
            command.args(arguments).arg("--base").arg(rules).arg(rules.join(profile)).output()
        })
    };
    let Some(compiled) = parser(&["-Q", "-K"]) else {
        tell("SKIPPED: apparmor_parser is not installed: libvirt's profiles were not compiled");
        return None;
    };
    assert!(compiled.status.success(), "{profile}: {compiled:?}");
    Some(String::from_utf8_lossy(&parser(&["-p"])?.stdout).into_owned())
}

#[test]
fn the_profile_of_a_domain_includes_the_rule_for_its_sockets() {
    let Some(rules) = copied_rules("libvirt/TEMPLATE.qemu") else { return };
    let path = |name: &str| rules.path().join(name);
    // As virt-aa-helper makes the profile of a domain (create_profile).
    let template = fs::read_to_string(path("libvirt/TEMPLATE.qemu")).expect("copied");
    fs::write(path("libvirt/domain"), template.replace("LIBVIRT_TEMPLATE", "libvirt-test")).expect("room");
    let rule = "abstractions/libvirt-qemu.d/virtioblkd";
    let _ = fs::remove_file(path(rule));
    let Some(without) = compiled(rules.path(), "libvirt/domain") else { return };
    fs::create_dir_all(path("abstractions/libvirt-qemu.d")).expect("room");
    fs::copy(programs::root().join("qemu-configs/apparmor/libvirt-qemu.d/virtioblkd"), path(rule)).expect("shipped");
    let with = compiled(rules.path(), "libvirt/domain").expect("as before");
    let allows = |text: &str| text.lines().any(|line| line.trim() == "/run/virtioblkd/*.sock rw,");
    assert!(allows(&with) && !allows(&without), "{with}");
}

#[test]
fn libvirtd_may_execute_the_hook_where_the_page_says_so() {
    let Some(rules) = copied_rules("usr.sbin.libvirtd") else { return };
    let page = fs::read_to_string(programs::root().join("docs/libvirt.md")).expect("shipped");
    let rule = "  /usr/local/bin/virtioblkctl PUx,";
    assert!(page.contains(&format!("`{rule}`")), "the page has the rule");
    let local = rules.path().join("local/usr.sbin.libvirtd");
    let _ = fs::remove_file(&local);
    let Some(without) = compiled(rules.path(), "usr.sbin.libvirtd") else { return };
    fs::create_dir_all(rules.path().join("local")).expect("room");
    fs::write(&local, format!("{rule}\n")).expect("room");
    let with = compiled(rules.path(), "usr.sbin.libvirtd").expect("as before");
    // What the package's program needs is there; of /usr/local no rule lets libvirtd execute anything.
    assert!(without.lines().any(|line| line.trim() == "/usr/bin/* PUx,"), "{without}");
    assert!(!without.contains("/usr/local/bin"), "{without}");
    assert!(with.lines().any(|line| line == rule), "{with}");
}

/// If libvirt made the rule itself, ours would be superfluous.
#[test]
fn libvirt_makes_no_rule_for_the_socket_of_a_disk() {
    let uuid = "0d3b1c52-5d5c-4c69-9f54-4ac3a3d2f1a7";
    let domain = fs::read_to_string(programs::root().join("qemu-configs/libvirt/domain-minimal.xml")).expect("shipped");
    let name = domain.find("<name>").expect("a domain has a name");
    let domain = format!("{}<uuid>{uuid}</uuid>{}", &domain[..name], &domain[name..]);
    let output = run("virt-aa-helper", |command| {
        command.args(["--dryrun", "--replace", "--uuid"]).arg(format!("libvirt-{uuid}"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().expect("piped").write_all(domain.as_bytes())?;
        child.wait_with_output()
    });
    let Some(output) = output else {
        return tell("SKIPPED: virt-aa-helper is not installed: libvirt's own rules were not looked at");
    };
    let rules = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if !rules.contains("monitor.sock") {
        return tell(&format!("SKIPPED: virt-aa-helper shows no rules here: {rules}"));
    }
    assert!(domain.contains("/run/virtioblkd/") && !rules.contains("/run/virtioblkd/"), "{rules}");
}

#[test]
fn the_selinux_module_is_compiled() {
    let source = fs::read_to_string(programs::root().join("qemu-configs/selinux/virtioblkd.te")).expect("shipped");
    let directory = tempfile::tempdir().expect("room");
    let (module, policy) = (directory.path().join("virtioblkd.mod"), directory.path().join("virtioblkd.te"));
    for (text, is_good) in [(source.clone(), true), (source.replace("type svirt_t;", ""), false)] {
        fs::write(&policy, &text).expect("room");
        match run("checkmodule", |command| command.args(["-M", "-m", "-o"]).arg(&module).arg(&policy).output()) {
            Some(output) => assert_eq!(output.status.success(), is_good, "{output:?}"),
            None => return tell("SKIPPED: checkmodule is not installed: the module was not compiled"),
        }
    }
}
