use super::apparmor::MissingRule;
use super::*;

const SHARED: &str = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";

fn domain(more: &str, metadata: &str, disk: &str) -> String {
    format!(
        "<domain><name>vm1</name><uuid>6fd1f7a2-4c0b-4e0f-8a65-1a3c0d2e9b11</uuid>{more}<metadata>\
         <v:disks xmlns:v='urn:virtioblkd:libvirt:1'>{metadata}</v:disks></metadata><devices>{disk}</devices></domain>"
    )
}

fn disk(driver: &str, reconnect: &str) -> String {
    format!(
        "<disk type='vhostuser'><driver name='qemu' {driver}/><source type='unix' path='/run/a.sock'>{reconnect}</source>\
         <target dev='vda'/></disk>"
    )
}

fn good_facts() -> Facts {
    Facts { has_hook: true, qemu: Some((10, 0)), images: vec![("vda".into(), ImageFact::Usable)], ..Facts::default() }
}

fn problems(xml: &str, facts: &Facts) -> Vec<Finding> {
    findings(xml, facts).into_iter().filter(|finding| finding.grade == Grade::Problem).collect()
}

const RECONNECT: &str = "<reconnect enabled='yes' timeout='1'/>";
const OURS: &str = "<v:disk target='vda' file='/a' cache='directsync' queues='2'/>";

#[test]
fn a_good_domain_has_no_problem_and_says_what_the_guest_sees() {
    let xml = domain(SHARED, OURS, &disk("queues='2'", RECONNECT));
    assert_eq!(problems(&xml, &good_facts()), []);
    let all = findings(&xml, &good_facts());
    assert!(all.iter().any(|found| found.what.contains("directsync: the guest sees write through")), "{all:?}");
}

#[test]
fn an_image_that_another_disk_of_the_same_qemu_has_is_a_problem() {
    let with = |more: &str| domain(SHARED, OURS, &(disk("queues='2'", RECONNECT) + more));
    let qemus = |source: &str, more: &str| format!("<disk type='file'>{source}<target dev='sda'/>{more}</disk>");
    let said = |xml: &str, facts: &Facts| problems(xml, facts).iter().map(|one| one.what.clone()).collect::<String>();
    let same = qemus("<source file='/a'/>", "<readonly/>");
    assert!(said(&with(&same), &good_facts()).contains("its image is the one of the disk sda"));
    assert_eq!(said(&with(&qemus("<source file='/b'/>", "")), &good_facts()), "");
    // Another name of the same file, as the host says.
    let identities = ["vda", "sda"].map(|target| (target.to_owned(), "1:2".to_owned())).to_vec();
    let facts = Facts { identities, ..good_facts() };
    assert!(said(&with(&qemus("<source file='/b'/>", "")), &facts).contains("of the disk sda"));
    // Two that only read, and two that are none of ours.
    let reading = with(&same).replace("queues='2'/></v:disks>", "queues='2' readonly='yes'/></v:disks>");
    assert_eq!(said(&reading, &good_facts()), "");
    let others = qemus("<source file='/c'/>", "") + &qemus("<source file='/c'/>", "").replace("sda", "sdb");
    assert_eq!(said(&with(&others), &good_facts()), "");
}

#[test]
fn each_problem_is_named_with_its_fix() {
    let good = || disk("", RECONNECT);
    let image = |fact: ImageFact| Facts { images: vec![("vda".into(), fact)], ..good_facts() };
    let cases = [
        (domain("", OURS, &good()), good_facts(), "not shared", "mode='shared'"),
        (domain(SHARED, OURS, &disk("", "")), good_facts(), "does not connect again", "<reconnect"),
        (domain(SHARED, OURS, &disk("queues='4'", RECONNECT)), good_facts(), "more queues", "queues='2'"),
        (
            domain(SHARED, "<v:disk target='vda' file='/a'/>", &disk("queues='300'", RECONNECT)),
            good_facts(),
            "more queues than the daemon has (256)",
            "set queues='256' in <driver>",
        ),
        (
            domain(&format!("<vcpu>4</vcpu>{SHARED}"), OURS, &good()),
            good_facts(),
            "each of the 4 virtual CPUs",
            "queues='2' in <driver>",
        ),
        (
            domain(SHARED, "<v:disk target='vda' file='/a' queue_size='256'/>", &disk("queue_size='1024'", RECONNECT)),
            good_facts(),
            "queues of 1024 descriptors",
            "queue_size='256' in <driver>",
        ),
        (
            domain(SHARED, "<v:disk target='vda' file='/a' queue_size='64'/>", &good()),
            good_facts(),
            "queues of 128 descriptors",
            "queue_size='64' in <driver>",
        ),
        (
            domain(SHARED, OURS, &disk("iommu='on'", RECONNECT)),
            good_facts(),
            "iommu='on'> is impossible",
            "remove iommu",
        ),
        (domain(SHARED, OURS, &disk("packed='on'", RECONNECT)), good_facts(), "packed='on'> is impossible", "packed"),
        (domain(SHARED, OURS, &good().replace("/run/a", "a")), good_facts(), "no absolute path", "begin with /"),
        (
            domain(SHARED, OURS, &good().replace("/run/a", &format!("/{}", "a".repeat(108)))),
            good_facts(),
            "more than 107 bytes",
            "shorten path=",
        ),
        (
            domain(SHARED, OURS, &good().replace("/run/a", "/no such/a")),
            Facts { missing_directories: vec!["/no such".into()], ..good_facts() },
            "directory of its socket does not exist: /no such",
            "mkdir -p '/no such'",
        ),
        (domain(SHARED, OURS, &good()), image(ImageFact::NoUser("nosuch".into())), "no user 'nosuch'", "correct user="),
        (
            domain(SHARED, OURS, &good()),
            image(ImageFact::Unsuitable { path: "/a".into(), why: "is empty".into(), fix: "truncate".into() }),
            "image /a cannot be served: it is empty",
            "truncate",
        ),
        (domain(SHARED, OURS, ""), good_facts(), "no vhostuser disk", "<metadata>"),
        (
            domain(SHARED, OURS, "<disk type='file'><target dev='vda'/></disk>"),
            good_facts(),
            "no vhostuser disk",
            "domain convert vm1 vda",
        ),
        (domain(SHARED, "", &good()), good_facts(), "no daemon of this host listens on /run/a.sock", "hangs"),
        (
            domain(SHARED, "<v:disk target='vda' file='/a' cahce='none'/>", &good()),
            good_facts(),
            "'cache'",
            "virsh edit",
        ),
        (domain(SHARED, OURS, &good()), image(ImageFact::Missing("/a".into())), "no image /a", "truncate"),
        (
            domain(SHARED, OURS, &good()),
            image(ImageFact::NotUsable { path: "/a".into(), user: "virtioblkd".into() }),
            "cannot open the image /a",
            "setfacl -m u:virtioblkd:rw /a",
        ),
        (
            domain(SHARED, OURS, &good()),
            image(ImageFact::OfAnotherFormat { path: "/a".into(), format: "qcow2".into() }),
            "format qcow2",
            "qemu-img",
        ),
        (domain(SHARED, OURS, &good()), Facts { has_hook: false, ..good_facts() }, "not installed", "hooks/qemu.d"),
        (
            domain(SHARED, OURS, &good()),
            Facts { missing_user: Some("virtioblkd".into()), ..good_facts() },
            "no user virtioblkd",
            "systemd-sysusers",
        ),
        (
            domain(SHARED, OURS, &good()),
            Facts { apparmor_rule: Some(false), ..good_facts() },
            "AppArmor",
            "libvirt-qemu.d",
        ),
        (
            domain(SHARED, OURS, &good()),
            Facts {
                apparmor_hook: Some(MissingRule {
                    program: "/usr/local/bin/virtioblkctl".into(),
                    local: "/rules/local/usr.sbin.libvirtd".into(),
                    profile: "/rules/usr.sbin.libvirtd".into(),
                }),
                ..good_facts()
            },
            "AppArmor does not let libvirt execute its hook, /usr/local/bin/virtioblkctl",
            "echo '  /usr/local/bin/virtioblkctl PUx,' >> /rules/local/usr.sbin.libvirtd",
        ),
        (
            domain(SHARED, OURS, &good()),
            Facts { selinux_label: Some("system_u:object_r:var_run_t:s0".into()), ..good_facts() },
            "var_run_t",
            "svirt_image_t",
        ),
        (domain(SHARED, OURS, &good()), Facts { qemu: Some((4, 1)), ..good_facts() }, "QEMU 4.1", "4.2"),
    ];
    for (xml, facts, what, fix) in cases {
        let found = problems(&xml, &facts);
        assert_eq!(found.len(), 1, "{what}: {found:?}");
        assert!(!found[0].fix.contains("queues='300'"), "{found:?}");
        assert!(found[0].what.contains(what) && found[0].fix.contains(fix), "{what}, {fix}: {found:?}");
    }
}

#[test]
fn every_mode_says_what_the_guest_sees() {
    let said: Vec<String> = CacheMode::ALL.map(|mode| format!("{mode}: {}", what_the_guest_sees(mode))).into();
    let expected = [
        "none: the guest sees write back, a write is acknowledged when the host's device has it, its flush makes writes durable",
        "directsync: the guest sees write through, a write is acknowledged when it is durable, it has no need to flush",
        "writeback: the guest sees write back, a write is acknowledged when the host's cache has it, its flush makes writes durable",
        "writethrough: the guest sees write through, a write is acknowledged when it is durable, it has no need to flush",
        "unsafe: the guest sees write back, a write is acknowledged when the host's cache has it, its flushes are ignored",
    ];
    assert_eq!(said, expected);
}

fn two_disks(ours: [&str; 2], sockets: [&str; 2]) -> String {
    let one = disk("", RECONNECT).replace("/run/a.sock", sockets[0]);
    let other = disk("", RECONNECT).replace("vda", "vdb").replace("/run/a.sock", sockets[1]);
    let ours = format!("<v:disk target='vda' {}/><v:disk target='vdb' {}/>", ours[0], ours[1]);
    domain(SHARED, &ours, &[one, other].concat())
}

#[test]
fn two_disks_with_one_socket_or_one_image_are_a_problem() {
    let sockets = ["/run/a.sock", "/run/b.sock"];
    let about = |xml: &str, facts: &Facts| {
        let found = problems(xml, facts);
        found.iter().map(|one| format!("{}: {}", one.about, one.what)).collect::<Vec<_>>().join("; ")
    };
    let good = two_disks(["file='/a'", "file='/b'"], sockets);
    assert_eq!(about(&good, &good_facts()), "");
    let found = about(&two_disks(["file='/a'", "file='/b'"], ["/run/a.sock"; 2]), &good_facts());
    assert_eq!(found, "vdb: it has the socket of the disk vda: /run/a.sock");
    for ours in [["file='/a'", "file='/a'"], ["rbd='p/i'", "rbd='p/i' readonly='yes'"]] {
        let found = about(&two_disks(ours, sockets), &good_facts());
        assert!(found.starts_with("vdb: its image is the one of the disk vda"), "{found}");
    }
    let same = ["vda", "vdb"].map(|target| (target.to_owned(), "1:2".to_owned())).to_vec();
    let found = about(&good, &Facts { identities: same, ..good_facts() });
    assert!(found.starts_with("vdb: its image is the one of the disk vda"), "{found}");
    assert_eq!(about(&two_disks(["file='/a' readonly='yes'"; 2], sockets), &good_facts()), "");
}

#[test]
fn virtual_cpus_share_a_queue_only_with_an_old_qemu_or_machine() {
    let shares = |more: &str, qemu: Option<(u32, u32)>| {
        let xml = domain(&format!("{more}{SHARED}"), OURS, &disk("", RECONNECT));
        let found = findings(&xml, &Facts { qemu, ..good_facts() });
        found.iter().any(|one| one.what.contains("share one queue"))
    };
    let machine = |kind: &str| format!("<vcpu>2</vcpu><os><type machine='{kind}'>hvm</type></os>");
    assert!(!shares("<vcpu>2</vcpu>", Some((10, 0))));
    assert!(!shares(&machine("pc-q35-5.2"), Some((10, 0))));
    assert!(!shares(&machine("pc-q35-rhel9.4.0"), Some((9, 0))));
    assert!(shares(&machine("pc-q35-5.1"), Some((10, 0))));
    assert!(shares("<vcpu>2</vcpu>", Some((5, 1))));
    assert!(!shares("<vcpu current='1'>2</vcpu>", Some((5, 1))));
}

#[test]
fn names_in_a_fix_are_one_word_for_the_shell() {
    let xml = domain("", "", "<disk type='file'><target dev='sda'/></disk>");
    let fix = |name: &str| findings(&xml.replace("<name>vm1", &format!("<name>{name}")), &good_facts()).remove(0).fix;
    assert_eq!(fix("vm1"), "virtioblkctl domain convert vm1 sda");
    assert_eq!(fix("a;touch /tmp/x $(id)"), "virtioblkctl domain convert 'a;touch /tmp/x $(id)' sda");
    assert_eq!(fix("it's"), "virtioblkctl domain convert 'it'\\''s' sda");
    assert_eq!(fix("-x"), "virtioblkctl domain convert -- -x sda");
    assert!(fix("~root").ends_with("'~root' sda"));
}
