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
fn each_problem_is_named_with_its_fix() {
    let good = || disk("", RECONNECT);
    let image = |fact: ImageFact| Facts { images: vec![("vda".into(), fact)], ..good_facts() };
    let cases = [
        (domain("", OURS, &good()), good_facts(), "not shared", "mode='shared'"),
        (domain(SHARED, OURS, &disk("", "")), good_facts(), "does not connect again", "<reconnect"),
        (domain(SHARED, OURS, &disk("queues='4'", RECONNECT)), good_facts(), "more queues", "queues='2'"),
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
            Facts { selinux_label: Some("system_u:object_r:var_run_t:s0".into()), ..good_facts() },
            "var_run_t",
            "svirt_image_t",
        ),
        (domain(SHARED, OURS, &good()), Facts { qemu: Some((4, 1)), ..good_facts() }, "QEMU 4.1", "4.2"),
    ];
    for (xml, facts, what, fix) in cases {
        let found = problems(&xml, &facts);
        assert_eq!(found.len(), 1, "{what}: {found:?}");
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
