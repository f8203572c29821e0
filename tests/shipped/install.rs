//! `make install` puts every file where the system looks for it, with the paths of its PREFIX, and `make uninstall` removes
//! all of them again.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kit::programs;

/// Runs scripts/install-files, as make does.
fn make(action: &str, prefix: &str, destination: &Path) {
    let mut command = Command::new(programs::root().join("scripts/install-files"));
    let programs = Path::new(env!("CARGO_BIN_EXE_virtioblkd")).parent().expect("a directory");
    command.arg(action).env("BIN_DIR", programs).env("PREFIX", prefix).env("DESTDIR", destination);
    let output = command.env_remove("SYSCONFDIR").output().expect("bash");
    assert!(output.status.success(), "{action}: {output:?}");
}

/// Every file and symbolic link below `root`, as paths of an installed system.
fn files(root: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() && !path.is_symlink() {
                directories.push(path);
            } else {
                found.insert(Path::new("/").join(path.strip_prefix(root).expect("below it")));
            }
        }
    }
    found
}

#[test]
fn what_is_installed_is_where_the_system_looks_and_is_removed_again() {
    for prefix in ["/usr/local", "/usr"] {
        let root = tempfile::tempdir().expect("room");
        make("install", prefix, root.path());
        let installed = files(root.path());
        let expected = [
            "bin/virtioblkd",
            "bin/virtioblkctl",
            "lib/systemd/system/virtioblkd@.service",
            "lib/systemd/system/virtioblkd-rbd@.service",
            "lib/systemd/system/virtioblkd@.socket",
            "lib/systemd/system/virtioblk-attend@.service",
            "lib/systemd/system/virtioblk-exporter.service",
            "lib/sysusers.d/virtioblkd.conf",
            "lib/tmpfiles.d/virtioblkd.conf",
            "share/qemu/vhost-user/50-virtioblkd.json",
            "share/man/man1/virtioblkd.1",
            "share/man/man1/virtioblkctl-quiesce.1",
            "share/man/man5/virtioblkd.toml.5",
            "share/man/man7/virtioblkd-control.7",
            "share/bash-completion/completions/virtioblkctl",
            "share/zsh/site-functions/_virtioblkd",
            "share/fish/vendor_completions.d/virtioblkctl.fish",
            "share/virtioblkd/selinux/virtioblkd.te",
            "share/doc/virtioblkd/README.md",
            "share/doc/virtioblkd/docs/libvirt.md",
            "share/doc/virtioblkd/qemu-configs/snapshot/README.md",
        ];
        let expected = expected.map(|name| Path::new(prefix).join(name));
        let system =
            ["/etc/libvirt/hooks/qemu.d/50-virtioblkd", "/etc/apparmor.d/abstractions/libvirt-qemu.d/virtioblkd"];
        for path in expected.iter().cloned().chain(system.map(PathBuf::from)) {
            assert!(installed.contains(&path), "{} is missing: {installed:#?}", path.display());
        }
        assert!(root.path().join("etc/virtioblkd").is_dir());
        let hook = fs::read_link(root.path().join("etc/libvirt/hooks/qemu.d/50-virtioblkd")).expect("a link");
        assert_eq!(hook, Path::new(prefix).join("bin/virtioblkctl"));
        names_only_installed_files(&installed, prefix, root.path());
        fs::write(root.path().join("etc/virtioblkd/vda.toml"), "").expect("room");
        make("uninstall", prefix, root.path());
        assert_eq!(files(root.path()), BTreeSet::from(["/etc/virtioblkd/vda.toml".into()]), "{prefix}");
        assert!(!root.path().join(prefix.trim_start_matches('/')).join("share/doc/virtioblkd").exists());
    }
}

/// Checks that units and the descriptor name programs and documents that were installed, and no other prefix.
fn names_only_installed_files(installed: &BTreeSet<PathBuf>, prefix: &str, root: &Path) {
    let mut checked = 0;
    for path in installed
        .iter()
        .filter(|path| path.to_string_lossy().contains("systemd/system") || path.ends_with("50-virtioblkd.json"))
    {
        let text = fs::read_to_string(root.join(path.strip_prefix("/").expect("absolute"))).expect("text");
        assert!(prefix == "/usr/local" || !text.contains("/usr/local"), "{}: {text}", path.display());
        for place in ["/bin/", "/share/doc/"] {
            let start = format!("{prefix}{place}");
            for (at, _) in text.match_indices(&start) {
                let name: String = text[at..].chars().take_while(|c| !"\"\n".contains(*c)).collect();
                let rest = name[prefix.len()..].split(' ').next().expect("a word");
                assert!(installed.contains(Path::new(&format!("{prefix}{rest}"))), "{}: {name}", path.display());
                checked += 1;
            }
        }
    }
    assert!(checked > 10, "only {checked} paths were found");
}

#[test]
fn a_hook_that_an_operator_made_is_not_removed() {
    let root = tempfile::tempdir().expect("room");
    make("install", "/usr", root.path());
    let hook = root.path().join("etc/libvirt/hooks/qemu.d/50-virtioblkd");
    fs::remove_file(&hook).expect("it was installed");
    fs::write(&hook, "#!/bin/sh\n").expect("room");
    make("uninstall", "/usr", root.path());
    assert!(hook.exists());
}
