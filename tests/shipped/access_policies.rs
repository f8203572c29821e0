//! The rules for AppArmor and SELinux are accepted by their compilers. No test enforces them: that needs such a kernel.

use std::fs;
use std::io::Write;
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
