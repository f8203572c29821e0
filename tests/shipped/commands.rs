//! Every command of README and `docs` works as it stands: a shell runs the `sh` blocks of a page in their order, on a disk that
//! the real programs serve. [`OTHERS`] lists the blocks that another test pastes, [`ALIKE`] those of which a test does the same
//! elsewhere, and [`NOT_RUN`] those that nothing runs, each with the reason. The last two lists have a limit.

use kit::documents::{Block, Terminal, blocks, installed, pages, pasted, read};
use kit::programs;
use kit::snapshot::{Agent, Mood, hooks, tell};

/// Blocks that another test pastes: the page, the beginning of the block's first line, and the test's file.
const OTHERS: &[(&str, &str, &str)] = &[
    ("README.md", "mkdir -p run backup", "tests/guest/pages.rs"),
    ("README.md", "qemu-system-x86_64", "tests/guest/pages.rs"),
    ("README.md", "virtioblkctl --control run/vda.ctl quiesce", "tests/guest/pages.rs"),
    ("README.md", "virtioblkctl --control run/vda.ctl upgrade", "tests/guest/pages.rs"),
    ("docs/ceph.md", "mkdir -p run", "tests/ceph/pages.rs"),
    ("docs/ceph.md", "virtioblkctl attend", "tests/ceph/pages.rs"),
    ("docs/libvirt.md", "mkdir -p /etc/libvirt/hooks/qemu.d", "tests/guest/libvirt_systemd.rs"),
    ("docs/libvirt.md", "install -D", "tests/guest/libvirt_systemd.rs"),
    ("docs/libvirt.md", "virsh start", "tests/guest/libvirt_systemd.rs"),
    ("docs/libvirt.md", "virtioblkctl domain", "tests/guest/libvirt_domain.rs"),
    ("docs/libvirt.md", "virtioblkctl domblkstat", "tests/guest/libvirt_domain.rs"),
    ("docs/libvirt.md", "virtioblkctl list", "tests/guest/libvirt_domain.rs"),
    ("docs/libvirt.md", "virtioblkctl --control example:vda", "tests/guest/libvirt_domain.rs"),
    ("docs/libvirt.md", "virtioblkctl --domain example", "tests/guest/libvirt_domain.rs"),
];

/// Blocks of which a test does the same with other paths or hosts, because the block changes the host it runs on: the page, the
/// beginning of the block's first line, and the test's file.
const ALIKE: &[(&str, &str, &str)] = &[
    ("README.md", "sudo virtioblkctl domain convert", "tests/guest/libvirt_domain.rs"),
    ("docs/migration.md", "virsh", "tests/guest/libvirt_moves.rs"),
    ("docs/migration.md", "virtioblkd --socket-path /run/virtioblkd", "tests/guest/libvirt_moves.rs"),
    ("docs/proxmox.md", "ln -s", "tests/daemon/proxmox.rs"),
    ("docs/proxmox.md", "qm set", "tests/daemon/proxmox.rs"),
    (
        "docs/snapshots.md",
        "virtioblkctl snapshot --disk run/vda.ctl --level filesystem --libvirt",
        "tests/guest/libvirt.rs",
    ),
    ("docs/upgrade.md", "virtioblkctl --control /run/virtioblkd", "tests/upgrade/trust.rs"),
];

/// Blocks that no test runs: the page, the beginning of the first line, and the reason. Add one only if nothing can run it.
const NOT_RUN: &[(&str, &str, &str)] = &[
    ("README.md", "make build", "it builds the optimized programs and changes the host"),
    ("docs/stable-writes.md", "echo repair", "it needs an md array and a DRBD device with differences"),
];

/// How many entries [`ALIKE`] and [`NOT_RUN`] may have.
const MOST_ALIKE: usize = 7;
const MOST_NOT_RUN: usize = 2;

/// Programs that a block needs and this host may lack.
const NEEDED: [&str; 4] = ["nbdcopy", "nbdinfo", "qemu-img", "socat"];

fn is_listed(list: &[(&str, &str, &str)], block: &Block) -> bool {
    list.iter().any(|(page, start, _)| *page == block.page && block.first_line().starts_with(start))
}

fn is_ours(block: &Block) -> bool {
    block.language == "sh" && [OTHERS, ALIKE, NOT_RUN].iter().all(|list| !is_listed(list, block))
}

/// What stands in the directory before the first block: two disks with a daemon each, a guest's agent, hooks, an image of
/// another format.
const BEFORE: &str = r#"
mkdir -p backup run
truncate -s 64M disk.img vdb.img
truncate -s 1M disk.qcow2
! command -v qemu-img || qemu-img create -q -f qcow2 disk.qcow2 1M
for disk in disk vdb; do
    name=$disk
    [ $disk = vdb ] || name=vda
    virtioblkd --socket-path run/$name.sock --blk-file $disk.img --control-path run/$name.ctl --copy-dir "$PWD/backup" &
    until [ -S run/$name.ctl ]; do sleep 0.05; done
done
"#;

/// Whether the daemons still serve, and end in order.
const AFTER: &str = "virtioblkctl --control run/vda.ctl quit\nvirtioblkctl --control run/vdb.ctl quit\n";

#[test]
fn every_command_of_the_pages_works_as_it_stands() {
    let mut run = 0;
    for page in pages() {
        let blocks: Vec<Block> = blocks(&page).into_iter().filter(is_ours).collect();
        let (blocks, lacking): (Vec<Block>, Vec<Block>) = blocks.into_iter().partition(|block| {
            let lacks = |program: &str| block.text.contains(program) && installed(program).is_none();
            !NEEDED.iter().any(|program| lacks(program))
        });
        for block in lacking {
            tell(&format!("SKIPPED: {}:{}: one of {NEEDED:?} is not installed", block.page, block.line));
        }
        if blocks.is_empty() {
            continue;
        }
        let mut terminal = Terminal::default();
        let controls = ["run/vda.ctl", "run/vdb.ctl"].map(|name| terminal.dir().join(name));
        let agent = Agent::start(Mood::Good, &controls);
        std::os::unix::fs::symlink(&agent.path, terminal.dir().join("agent.sock")).expect("room");
        hooks(terminal.dir(), "true", "true");
        let script: String = blocks.iter().map(pasted).collect();
        terminal.run_ok(&format!("{BEFORE}{script}{AFTER}"), &[]);
        run += blocks.len();
    }
    assert!(run > 8, "only {run} blocks were run");
}

#[test]
fn every_block_has_a_language_and_every_shell_block_is_run_or_listed() {
    let all: Vec<Block> = pages().iter().flat_map(|page| blocks(page)).collect();
    for block in &all {
        let known = ["sh", "qmp", "json", "toml", "xml", "ini", "text"].contains(&block.language.as_str());
        assert!(known, "{}:{}: '{}' is no language of ours", block.page, block.line, block.language);
        // A block in another language has no commands of ours.
        let commands =
            block.text.lines().any(|line| line.starts_with("virtioblkctl ") || line.starts_with("virtioblkd "));
        assert!(block.language == "sh" || !commands, "{}:{}: make it a block in sh", block.page, block.line);
    }
    for (page, start, test) in OTHERS.iter().chain(ALIKE) {
        assert!(programs::root().join(test).exists(), "{page}: there is no {test}");
        let is_pasted =
            is_listed(OTHERS, &Block { page: (*page).into(), line: 0, language: "sh".into(), text: (*start).into() });
        assert!(!is_pasted || read(test).contains(page), "{test} does not read {page}");
        let exists = all.iter().any(|block| is_listed(&[(page, start, test)], block));
        assert!(exists, "{page} has no block that begins with '{start}'");
    }
    for (page, start, reason) in NOT_RUN {
        let exists = all.iter().any(|block| is_listed(&[(page, start, reason)], block));
        assert!(exists, "{page} has no block that begins with '{start}'");
        assert!(reason.len() > 20, "{page}: say why nothing runs '{start}'");
    }
    assert!(NOT_RUN.len() <= MOST_NOT_RUN && ALIKE.len() <= MOST_ALIKE, "let a test paste the new block instead");
    let lists = |block: &&Block| [OTHERS, ALIKE, NOT_RUN].iter().filter(|list| is_listed(list, block)).count();
    let twice = all.iter().find(|block| lists(block) > 1);
    assert!(twice.is_none(), "{twice:?} is in several lists");
}

/// A user who pastes README's first commands sees no warning of what those commands could do better, and finds no dead socket
/// afterwards. As root the daemon rightly warns that it stays root, and on an old kernel of what the kernel lacks.
#[test]
fn readmes_first_disk_starts_without_a_warning_and_leaves_no_socket() {
    let start = "mkdir -p run backup";
    let first = blocks("README.md").into_iter().find(|block| block.first_line().starts_with(start));
    let first = first.unwrap_or_else(|| panic!("README.md has no block that begins with '{start}'"));
    let mut terminal = Terminal::default();
    let run = terminal.dir().join("run");
    terminal.run_ok(&format!("{}virtioblkctl --control run/vda.ctl quit\nwait\n", pasted(&first)), &[]);
    let output = terminal.output();
    let warnings = output.lines().filter(|line| line.contains(" warn: "));
    let of_the_host = ["this daemon stays root", "this kernel", "system calls cannot be filtered"];
    let ours: Vec<&str> = warnings.filter(|line| !of_the_host.iter().any(|known| line.contains(known))).collect();
    assert!(ours.is_empty(), "{ours:#?}");
    assert_eq!(std::fs::read_dir(run).expect("run").count(), 0, "{output}");
}

/// A page whose command fails, and one that nothing lists, are found.
#[test]
fn a_command_that_fails_is_found() {
    let block = |text: &str| Block { page: "docs/x.md".into(), line: 1, language: "sh".into(), text: text.into() };
    let mut terminal = Terminal::default();
    assert!(terminal.run(&pasted(&block("virtioblkctl --control nothing.ctl status\n")), &[]).code() == Some(1));
    assert!(terminal.output().contains("nothing.ctl"), "{}", terminal.output());
    assert!(is_ours(&block("virtioblkctl list\n")));
}
