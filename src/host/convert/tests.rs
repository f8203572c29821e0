use std::path::Path;

use roxmltree::{Document, Node};

use super::*;
use crate::host::domain::{self, Domain, document};
use crate::host::metadata;

const UUID: &str = "6fd1f7a2-4c0b-4e0f-8a65-1a3c0d2e9b11";

/// As `virsh dumpxml --inactive` prints it.
fn described(more: &str, disks: &str) -> String {
    format!(
        "<domain type='kvm' id='3'>\n  <name>vm1</name>\n  <uuid>{UUID}</uuid>\n{more}  <memory unit='KiB'>1048576</memory>\n  \
         <devices>\n    <emulator>/usr/bin/qemu</emulator>\n{disks}    <interface type='user'>\n      <mac address='52:54:00:00:00:01'/>\n    \
         </interface>\n  </devices>\n  <!-- kept -->\n</domain>\n"
    )
}

const FILE: &str = "    <disk type='file' device='disk' snapshot='external'>
      <driver name='qemu' type='raw' cache='writethrough' error_policy='stop' io='threads' discard='unmap' queues='4'/>
      <source file='/images/it&apos;s &amp; a.raw'>
        <seclabel model='selinux' relabel='no'/>
      </source>
      <backingStore/>
      <target dev='vda' bus='virtio'/>
      <serial>root</serial>
      <readonly/>
      <blockio logical_block_size='4096' discard_granularity='32768'/>
      <boot order='1'/>
      <alias name='ua-root'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>
";

const PLAIN: &str =
    "    <disk type='block'>\n      <source dev='/dev/vg/b'/>\n      <target dev='vdb'/>\n    </disk>\n";

const RBD: &str = "    <disk type='network' device='disk'>
      <driver name='qemu' type='raw' cache='writeback'/>
      <auth username='libvirt'>
        <secret type='ceph' uuid='2a5b08e4-3b6b-4f1a-9d1c-0a7b6b6f0001'/>
      </auth>
      <source protocol='rbd' name='volumes/tenant/db'>
        <host name='mon1' port='6789'/>
        <host name='fd00::2' port='3300'/>
        <config file='/etc/ceph/other.conf'/>
      </source>
      <target dev='vdc' bus='virtio'/>
    </disk>
";

/// What a document says, whatever the order of attributes and elements, the quotes and the white space.
fn meaning(node: Node<'_, '_>) -> String {
    let mut attributes: Vec<String> =
        node.attributes().map(|one| format!("{}={:?}", one.name(), one.value())).collect();
    attributes.sort();
    let mut children: Vec<String> = node.children().filter(Node::is_element).map(meaning).collect();
    children.sort();
    let text = match children.is_empty() {
        true => domain::content(node),
        false => String::new(),
    };
    format!("<{} {attributes:?} {text:?} {children:?}>", node.tag_name().name())
}

fn means(xml: &str) -> String {
    meaning(Document::parse(xml).unwrap().root_element())
}

fn there(xml: &str, target: &str, cache: Option<&str>) -> Converted {
    to_vhost_user(xml, target, cache, Path::new("/run/virtioblkd")).unwrap_or_else(|error| panic!("{error}\n{xml}"))
}

fn back(xml: &str, target: &str) -> Converted {
    to_qemu(xml, target).unwrap_or_else(|error| panic!("{error}\n{xml}"))
}

fn options(xml: &str) -> Vec<(String, String)> {
    metadata::read(&document(xml).unwrap()).unwrap().remove(0).options
}

#[test]
fn a_disk_that_went_there_and_came_back_is_what_it_was() {
    let osinfo = "  <metadata>\n    <l:os xmlns:l='urn:libosinfo'/>\n  </metadata>\n";
    let shared = "  <memoryBacking><hugepages/></memoryBacking>\n";
    for more in ["", osinfo, "  <metadata/>\n", shared, "  <memoryBacking><locked/></memoryBacking>\n"] {
        for (disk, target) in [(FILE, "vda"), (PLAIN, "vdb"), (RBD, "vdc")] {
            let original = described(more, disk);
            let converted = there(&original, target, None).xml;
            assert!(Domain::parse(&converted).unwrap().has_shared_memory, "{converted}");
            let returned = back(&converted, target).xml;
            // An empty <metadata/> says nothing.
            let without = |xml: &str| means(&xml.replace("  <metadata/>\n", ""));
            assert_eq!(without(&returned), without(&original), "{converted}\n{returned}");
        }
    }
}

#[test]
fn the_daemon_is_told_what_qemu_was() {
    let converted = there(&described("", FILE), "vda", None).xml;
    let expected = [
        ("blk-file", "/images/it's & a.raw"),
        ("cache", "writethrough"),
        ("discard", "unmap"),
        ("on-error", "stop"),
        ("serial", "root"),
        ("read-only", "true"),
        ("logical-block-size", "4096"),
        ("discard-granularity", "32768"),
    ];
    assert_eq!(options(&converted), expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
    let disk = &Domain::parse(&converted).unwrap().disks[0];
    assert_eq!(disk.socket, format!("/run/virtioblkd/{UUID}-vda.sock"));
    assert_eq!((disk.queues, disk.reconnects), (Some(4), true));
    for kept in ["<boot order='1'/>", "<alias name='ua-root'/>", "bus='0x04'", "<!-- kept -->"] {
        assert!(converted.contains(kept), "{converted}");
    }
    // What QEMU does where nothing is said is said.
    let plain = options(&there(&described("", PLAIN), "vdb", None).xml);
    let expected = [("blk-file", "/dev/vg/b"), ("cache", "writeback"), ("discard", "ignore")];
    assert_eq!(plain, expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
}

#[test]
fn an_rbd_image_keeps_its_monitors_and_its_user_and_the_key_is_asked_for() {
    let converted = there(&described("", RBD), "vdc", Some("none"));
    let expected = [
        ("rbd", "volumes/tenant/db"),
        ("ceph-user", "libvirt"),
        ("ceph-conf", "/etc/ceph/other.conf"),
        ("cache", "none"),
        ("discard", "ignore"),
        ("rbd-option", "mon_host=mon1:6789,[fd00::2]:3300"),
    ];
    assert_eq!(options(&converted.xml), expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
    assert!(converted.notes[0].contains("ceph.client.libvirt.keyring"), "{:?}", converted.notes);
    assert!(back(&converted.xml, "vdc").xml.contains("cache='none'"));
}

#[test]
fn every_other_byte_stays() {
    let original = described("", FILE);
    let converted = there(&original, "vda", None).xml;
    let (before, after) = (original.find("  <memory unit").unwrap(), original.find("    <interface").unwrap());
    assert!(converted.ends_with(&original[after..]));
    assert!(converted.starts_with(&original[..original.find("</uuid>").unwrap()]));
    assert!(converted.contains(&original[before..original.find("  <devices>").unwrap()]));
}

#[test]
fn the_last_disk_takes_the_shared_memory_with_it() {
    let original = described("", &[FILE, PLAIN].concat());
    let both = there(&there(&original, "vda", None).xml, "vdb", None).xml;
    let one = back(&both, "vda").xml;
    assert!(Domain::parse(&one).unwrap().has_shared_memory, "{one}");
    assert_eq!(means(&back(&one, "vdb").xml), means(&original));
    let shared = "  <memoryBacking>\n    <source type='memfd'/>\n    <access mode='shared'/>\n  </memoryBacking>\n";
    let original = described(shared, FILE);
    assert_eq!(means(&back(&there(&original, "vda", None).xml, "vda").xml), means(&original));
}

#[test]
fn what_was_changed_meanwhile_reaches_qemus_disk() {
    let converted = there(&described("", FILE), "vda", None).xml;
    let changed = converted
        .replace(
            "cache='writethrough' discard='unmap' error_policy='stop' serial='root' readonly='yes'",
            "cache='none' max_hold='30s' serial='other'",
        )
        .replacen(
            "<v:disk target='vda' file='/images/it&apos;s &amp; a.raw'",
            "<v:disk target='vda' file='/images/b.raw'",
            1,
        );
    let returned = back(&changed, "vda");
    let xml = &returned.xml;
    for new in
        ["<source file='/images/b.raw'>", "cache='none'", "<serial>other</serial>", "io='threads'", "discard='unmap'"]
    {
        assert!(xml.contains(new), "'{new}': {xml}");
    }
    assert!(!xml.contains("<readonly/>") && !xml.contains("writethrough"), "{xml}");
    assert!(returned.notes.concat().contains("max_hold"), "{:?}", returned.notes);
    // A disk that was never QEMU's.
    let start = converted.find("<v:qemu_disk").unwrap();
    let end = converted.find("</v:qemu_disk>").unwrap() + "</v:qemu_disk>".len();
    let written = [&converted[..start], &converted[end..]].concat();
    let xml = back(&written, "vda").xml;
    for new in
        ["<disk type='file'", "type='raw'", "cache='writethrough'", "error_policy='stop'", "<readonly/>", "queues='4'"]
    {
        assert!(xml.contains(new), "'{new}': {xml}");
    }
}

#[test]
fn limits_go_there_and_come_back_as_they_are_then() {
    let limits = "<iotune>\n<total_iops_sec>500</total_iops_sec>\n<size_iops_sec>4096</size_iops_sec>\n</iotune>";
    let original = described("", &FILE.replace("<readonly/>", limits));
    let converted = there(&original, "vda", None).xml;
    let given: Vec<_> = options(&converted).into_iter().filter(|(name, _)| name == "throttle").collect();
    let expected = ["total-iops-sec=500", "size-iops-sec=4096"].map(|value| ("throttle".to_owned(), value.to_owned()));
    assert_eq!(given, expected);
    assert_eq!(means(&back(&converted, "vda").xml), means(&original));
    let ours = "<v:total_iops_sec>500</v:total_iops_sec>";
    let changed = back(&converted.replace(ours, &ours.replace("500", "7")), "vda").xml;
    assert!(changed.contains("<iotune><total_iops_sec>7</total_iops_sec><size_iops_sec>4096</size_iops_sec></iotune>"));
    let (start, end) = (converted.find("<v:iotune>").unwrap(), converted.find("</v:iotune>").unwrap());
    let lifted = [&converted[..start], &converted[end + "</v:iotune>".len()..]].concat();
    assert!(!back(&lifted, "vda").xml.contains("iotune"));
}

/// Why the disk with `to` in the place of `from` is not converted.
fn refusal(disk: &str, target: &str, from: &str, to: &str) -> String {
    let changed = disk.replace(from, to);
    assert_ne!(changed, disk, "{from}");
    to_vhost_user(&described("", &changed), target, None, Path::new("/run")).unwrap_err().to_string()
}

#[test]
fn more_virtual_cpus_than_queues_need_a_limit_on_the_queues() {
    let convert = |vcpus: &str, disk: &str| {
        let xml = described(&format!("  {vcpus}\n"), disk);
        to_vhost_user(&xml, "vda", None, Path::new("/run")).map(|converted| converted.xml)
    };
    let automatic = FILE.replace(" queues='4'", "");
    let error = convert("<vcpu>300</vcpu>", &automatic).unwrap_err().to_string();
    assert!(error.contains("300 virtual CPUs") && error.contains("queues='256'"), "{error}");
    assert!(convert("<vcpu>300</vcpu>", FILE).is_ok());
    assert!(convert("<vcpu current='256'>300</vcpu>", &automatic).is_ok());
}

#[test]
fn what_would_mean_something_else_is_refused_by_name() {
    let cases = [
        ("type='raw'", "type='qcow2'", "qemu-img"),
        ("type='file'", "type='volume'", "its type is 'volume'"),
        ("device='disk'", "device='cdrom'", "cdrom"),
        ("bus='virtio'", "bus='sata'", "'sata'"),
        ("queues='4'", "queues='257'", "at most 256"),
        ("queues='4'", "iommu='on'", "no equivalent of <driver iommu='on'>"),
        ("queues='4'", "packed='on'", "no equivalent of <driver packed='on'>"),
        ("<source file=", "<source fdgroup='a' file=", "no equivalent of <source fdgroup='a'>"),
        ("<source file=", "<source new='a' file=", "no equivalent of <source new='a'>"),
        ("<source file=", "<source dev=", "no equivalent of <source dev="),
        ("io='threads'", "detect_zeroes='unmap'", "detect_zeroes='unmap'"),
        ("io='threads'", "copy_on_read='on'", "copy_on_read"),
        ("error_policy='stop'", "error_policy='ignore'", "refuses"),
        ("error_policy='stop'", "error_policy='stop' rerror_policy='report'", "rerror_policy='report'"),
        ("<readonly/>", "<shareable/>", "<shareable/>"),
        ("<readonly/>", "<transient/>", "<transient>"),
        ("<readonly/>", "<encryption format='luks'/>", "<encryption>"),
        ("<readonly/>", "<iotune><group_name>a</group_name></iotune>", "not built yet"),
        ("<readonly/>", "<throttlefilters/>", "give the disk an <iotune>"),
        ("<backingStore/>", "<backingStore><source/></backingStore>", "<backingStore>"),
        ("logical_block_size='4096'", "physical_block_size='4096'", "physical_block_size"),
        ("<seclabel model='selinux' relabel='no'/>", "<slices/>", "<slices>"),
        ("<source file=", "<source startupPolicy='optional' file=", "startupPolicy='optional'"),
        ("cache='writethrough'", "cache='odd'", "odd"),
    ];
    for (from, to, reason) in cases {
        let error = refusal(FILE, "vda", from, to);
        assert!(error.contains(reason) && error.contains("disk vda"), "{to}: {error}");
    }
    let cases = [
        ("<host name='mon1'", "<host transport='unix' socket='/a' name='mon1'", "<host transport='unix'>"),
        ("<host name='mon1'", "<host new='a' name='mon1'", "<host new='a'>"),
        ("protocol='rbd'", "protocol='nbd'", "only rbd"),
        ("protocol='rbd'", "protocol='rbd' tls='yes'", "<source tls='yes'>"),
    ];
    for (from, to, reason) in cases {
        let error = refusal(RBD, "vdc", from, to);
        assert!(error.contains(reason) && error.contains("disk vdc"), "{to}: {error}");
    }
    let sda = PLAIN.replace("vdb", "sda");
    let error = to_vhost_user(&described("", &sda), "sda", None, Path::new("/run")).unwrap_err().to_string();
    assert!(error.contains("no bus='virtio'"), "{error}");
    let error = to_vhost_user(&described("", FILE), "vdx", None, Path::new("/run")).unwrap_err().to_string();
    assert!(error.contains("the disks are vda"), "{error}");
    let private = "  <memoryBacking><access mode='private'/></memoryBacking>\n";
    let error = to_vhost_user(&described(private, FILE), "vda", None, Path::new("/run")).unwrap_err().to_string();
    assert!(error.contains("mode='private'"), "{error}");
    let error = to_qemu(&described("", FILE), "vda").unwrap_err().to_string();
    assert!(error.contains("no vhostuser disk"), "{error}");
}

/// Descriptions that libvirt accepts, and what the daemon must be told besides.
fn unusual() -> Vec<(String, &'static str)> {
    let file = |from: &str, to: &str| {
        let disk = FILE.replace(from, to);
        assert_ne!(disk, FILE, "{from}");
        (described("", &disk), "vda")
    };
    let default_namespace = "  <metadata><disks xmlns='urn:virtioblkd:libvirt:1'/></metadata>\n";
    let both_namespaces = "  <metadata><v:disks xmlns='urn:virtioblkd:libvirt:1' \
                           xmlns:v='urn:virtioblkd:libvirt:1'></v:disks></metadata>\n";
    let stale = "  <metadata><v:disks xmlns:v='urn:virtioblkd:libvirt:1' shared_memory_added='access'/></metadata>\n";
    let comment = "  <metadata><!-- owner: a --></metadata>\n";
    let mut all = vec![
        file("it&apos;s &amp; a.raw", "vm@1.raw"),
        file("it&apos;s &amp; a.raw", "@disk v: {} %s &lt;@v>&quot;"),
        file("it&apos;s &amp; a.raw", "a&#10;b&#9;c&#13;d  e"),
        file("<serial>root", "<serial>a@b"),
        file("<serial>root", "<serial> a  b "),
        file("<serial>root</serial>", "<serial>ab<!-- x -->cd</serial>"),
        file("<serial>root</serial>", "<serial><![CDATA[a<b]]></serial>"),
        file("<serial>root</serial>", "<serial/>"),
        file("<disk type='file' ", "<disk "),
        file(
            "queues='4'/>",
            "queues='4'>\n<iothreads>\n<iothread id='1'>\n<queue id='0'/></iothread></iothreads></driver>",
        ),
        file("queues='4'", "queues='4' packed='off' iommu='off' event_idx='off' queue_size='256' ats='off'"),
        file("bus='virtio'", "bus=\"virtio\" "),
        (described("", FILE).replace('\n', "\r\n"), "vda"),
        (described("", FILE).replace("<devices>", "<devices><!-- <disk> @ -->"), "vda"),
        (described("", FILE).replace(UUID, &UUID.replace('-', "")), "vda"),
        (described("", &RBD.replace("tenant/db", "tenant/db@snap")), "vdc"),
        (described("", &RBD.replace("<host name='mon1' port='6789'/>", "<host name='v1' transport='tcp'/>")), "vdc"),
    ];
    for metadata in [default_namespace, both_namespaces, stale, comment] {
        all.push((described(metadata, FILE), "vda"));
    }
    all
}

#[test]
fn every_setting_of_an_unusual_disk_goes_there_and_comes_back() {
    for (original, target) in unusual() {
        let converted = there(&original, target, None).xml;
        let said = Document::parse(&original).unwrap();
        let then = settings::Settings::of_qemu_disk(disk(said.root_element(), target).unwrap()).unwrap();
        let described = metadata::of_xml(&converted).unwrap();
        let (now, others) = settings::Settings::of_options(&described[0]);
        assert_eq!((now, others), (then, Vec::new()), "{converted}");
        let returned = back(&converted, target);
        assert_eq!(returned.notes, Vec::<String>::new(), "{converted}");
        // An element of ours without disks says nothing.
        let says = |xml: &str| {
            let parsed = Document::parse(xml).unwrap();
            let devices = parsed.descendants().find(|node| node.has_tag_name("devices")).unwrap();
            means(&xml[devices.range()])
        };
        let typed = |xml: &str| xml.replace("<disk device='disk'", "<disk type='file' device='disk'");
        assert_eq!(says(&typed(&returned.xml)), says(&typed(&original)), "{converted}\n{}", returned.xml);
        assert_eq!(returned.xml.contains("owner: a"), original.contains("owner: a"));
    }
}

#[test]
fn the_disks_own_tag_gives_the_prefix_and_takes_the_mark() {
    for (xml, _) in unusual().into_iter().filter(|(xml, _)| xml.contains("<disks xmlns=")) {
        let converted = there(&xml, "vda", None).xml;
        assert!(converted.contains("<disks shared_memory_added='memoryBacking' xmlns="), "{converted}");
    }
}

#[test]
fn another_image_keeps_what_was_not_the_images_and_a_note_names_the_rest() {
    let changed = |from: &str, to: &str, disk: &str, target: &str| {
        let converted = there(&described("", disk), target, None).xml;
        let element = converted.find("<v:disk ").unwrap();
        let (before, after) = converted.split_at(element);
        assert!(after.contains(from), "{from}: {after}");
        back(&format!("{before}{}", after.replacen(from, to, 1)), target)
    };
    let image = "rbd='volumes/tenant/db'";
    let moved = changed(image, "rbd='p/j'", RBD, "vdc");
    for kept in
        ["name='p/j'", "<host name='mon1' port='6789'/>", "<host name='fd00::2' port='3300'/>", "<auth", "other.conf"]
    {
        assert!(moved.xml.contains(kept), "{kept}: {}", moved.xml);
    }
    assert_eq!(moved.notes, Vec::<String>::new());
    let moved = changed("mon1:6789,[fd00::2]:3300", "[v2:10.0.0.1:3300,v1:10.0.0.1:6789]", RBD, "vdc");
    assert!(moved.notes.concat().contains("mon_host='[v2:") && !moved.xml.contains("<host"), "{moved:?}");
    let moved = changed("ceph_user='libvirt'", "ceph_user='other'", RBD, "vdc");
    assert!(moved.notes.concat().contains("client.other") && !moved.xml.contains("<auth"), "{moved:?}");
    let moved = changed("file='/images/it&apos;s &amp; a.raw'", "file='/dev/b'", FILE, "vda");
    assert!(moved.xml.contains("<source dev='/dev/b'><seclabel model='selinux' relabel='no'/></source>"), "{moved:?}");
    assert!(moved.notes.concat().contains("<seclabel>"), "{moved:?}");
    let moved = changed("file='/images/it&apos;s &amp; a.raw'", "rbd='p/i'", FILE, "vda");
    assert!(
        moved.notes.concat().contains("<seclabel> in its <source> was for the old image, and is left out"),
        "{moved:?}"
    );
}

#[test]
fn a_disk_that_was_converted_with_a_setting_that_is_refused_today_comes_back() {
    let converted = there(&described("", FILE), "vda", None).xml;
    let old =
        converted.replace("io='threads'", "io='threads' iommu='on'").replace("relabel='no'/>", "relabel='no'/><x/>");
    assert!(back(&old, "vda").xml.contains("io='threads'"));
}
