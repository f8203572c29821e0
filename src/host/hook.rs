//! libvirt's hook for QEMU domains (docs/hooks.rst, `virHookCall`): starts a domain's daemons before the domain and ends
//! them after it.
//!
//! | libvirt calls | the hook |
//! |---|---|
//! | `prepare begin` | writes each disk's configuration, starts its daemon and waits until it listens; a failure stops the start |
//! | `release end` | ends the daemons that it started for this domain, and no others |
//! | `migrate begin`, `restore begin` | prints the arriving description with this host's socket paths |
//! | `reconnect begin` | starts daemons that are gone; never fails, since libvirt would end the guest |
//!
//! It never calls libvirt, which waits for it. State is files only (`places`): a configuration file stands for a daemon
//! that was started and not ended, whatever became of the hook or of libvirtd meanwhile. After a crash of the host /run is
//! empty; where it is not, no lock is held, and the next call removes what is left.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

pub use super::daemons::Launcher;
use super::daemons::{self, Starting};
use super::domain::{self, Domain};
use super::domain_lock;
use super::image_use;
use super::metadata::{self, DiskOptions};
use super::places::{DiskPlaces, NEW, Places, write_atomically};
use super::units;
use crate::base::{logging, trust};

/// How long all daemons of a domain may take together until they listen.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// How long after `migrate begin` or `restore begin` a `prepare begin` belongs to it.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the description may take to be read. The parser's time grows with the square of some counts, and libvirt waits
/// for the hook without an end.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// How long they may take to drain and sync before libvirt goes on.
pub(super) const END_TIMEOUT: Duration = Duration::from_secs(60);
/// The same after a start that failed. No guest has used these daemons, and one that waits for its storage cannot end.
pub(super) const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(5);
/// Why a domain ends that could not be started (`virDomainShutoffReasonTypeToString`; libvirt says it since 10.5).
const FAILED: &str = "failed";

/// What libvirt calls the hook with: `DOMAIN OPERATION SUB-OPERATION EXTRA`, the XML on standard input.
#[derive(Clone, Debug)]
pub struct Call {
    /// `prepare`, `release`, `migrate`, ...
    pub operation: String,
    /// `begin` or `end`.
    pub sub_operation: String,
    /// Why a domain has ended, at `release end`, or `-`.
    pub reason: String,
}

/// The hook's surroundings.
#[derive(Clone, Debug)]
pub struct Host {
    /// Where the disks' files are.
    pub places: Places,
    /// What starts daemons.
    pub launcher: Launcher,
    /// The group of QEMU's processes, which must reach the sockets; `None`: our own user runs them.
    pub qemu_group: Option<String>,
    /// The user that a daemon becomes if its disk names none; `None`: it stays ours.
    pub daemon_user: Option<&'static str>,
}

/// The user of root's daemons: qemu-configs/systemd/sysusers.d/virtioblkd.conf makes it. Root is for disks that ask for it.
const DAEMON_USER: &str = "virtioblkd";

impl Host {
    /// This host, for our user. `virtioblkd` is the one beside this program.
    pub fn of_this_user() -> Result<Self, String> {
        let own = std::env::current_exe().map_err(|error| format!("cannot find this program's own file: {error}"))?;
        let program = own.with_file_name("virtioblkd");
        if !program.is_file() {
            return Err(format!("{} is missing: install virtioblkd beside virtioblkctl", program.display()));
        }
        let is_root = rustix::process::geteuid().is_root();
        Ok(Host {
            places: Places::of_this_user()?,
            // Another user's libvirt is not systemd's to look after.
            launcher: Launcher { program, has_systemd: is_root && units::has_systemd() },
            qemu_group: if is_root { qemu_group(Path::new("/etc/libvirt/qemu.conf")) } else { None },
            daemon_user: is_root.then_some(DAEMON_USER),
        })
    }
}

/// The group that libvirt's system daemon runs QEMU in: of qemu.conf, else the one that distributions make for it.
fn qemu_group(configuration: &Path) -> Option<String> {
    let text = fs::read_to_string(configuration).unwrap_or_default();
    let value = text.lines().find_map(|line| line.trim_start().strip_prefix("group")?.trim_start().strip_prefix('='));
    let configured = value.map(|value| value.trim().trim_matches('"').trim_start_matches('+').to_owned());
    let exists = |name: &&str| nix::unistd::Group::from_name(name).is_ok_and(|group| group.is_some());
    // Debian's QEMU is in a group of its own and in kvm, as are people who run virtual machines of their own: whoever reaches
    // the socket has the disk. Fedora's and SUSE's QEMU is in qemu.
    configured
        .filter(|group| !group.is_empty())
        .or_else(|| ["libvirt-qemu", "qemu", "kvm"].iter().copied().find(exists).map(str::to_owned))
}

/// Carries out one call. `out`: standard output, which replaces the description where libvirt allows it. The error is what
/// libvirt shows to the user.
pub fn run(call: &Call, host: &Host, input: impl Read, mut out: impl Write) -> Result<(), String> {
    let xml = domain::read_description(input).map_err(|error| format!("the domain's description {error}"))?;
    match (call.operation.as_str(), call.sub_operation.as_str()) {
        ("prepare", "begin") if metadata::is_mentioned(&xml) => prepare(host, &xml),
        ("migrate" | "restore", "begin") if metadata::is_mentioned(&xml) => {
            let arriving = arrive(host, &xml)?;
            out.write_all(arriving.as_bytes())
                .and_then(|()| out.flush())
                .map_err(|error| format!("cannot print: {error}"))
        }
        ("reconnect", "begin") if metadata::is_mentioned(&xml) => {
            if let Err(error) = revive(host, &xml) {
                logging::message(error);
            }
            Ok(())
        }
        // The element may have been removed while the domain ran.
        ("release", "end") => release(host, &xml, if call.reason == FAILED { GIVE_UP_TIMEOUT } else { END_TIMEOUT }),
        _ => Ok(()),
    }
}

/// One disk of ours: what the domain and our element say of it.
pub(super) struct Disk {
    /// The domain's name.
    pub(super) domain: String,
    pub(super) target: String,
    pub(super) socket: PathBuf,
    pub(super) options: DiskOptions,
    pub(super) places: DiskPlaces,
}

impl Disk {
    /// Whether our element gives this option.
    fn has(&self, key: &str) -> bool {
        self.option(key).is_some()
    }

    /// The value of an option that our element gives.
    pub(super) fn option(&self, key: &str) -> Option<&str> {
        self.options.options.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }
}

/// Runs `read` in a thread that is left behind, to end with this process, if it takes longer than `timeout`.
fn within<T: Send + 'static>(
    timeout: Duration,
    read: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let (sender, result) = mpsc::channel();
    let spawned = std::thread::Builder::new().spawn(move || {
        // Nobody waits any more after the timeout.
        let _ = sender.send(read());
    });
    spawned.map_err(|error| format!("no thread to read the domain's description: {error}"))?;
    result.recv_timeout(timeout).unwrap_or_else(|_| {
        Err(format!(
            "the domain's description takes longer than {timeout:?} to read: has it very many disks, or foreign elements \
             with very many attributes?"
        ))
    })
}

fn disks(host: &Host, xml: &str) -> Result<(Domain, Vec<Disk>), String> {
    let (places, xml) = (host.places.clone(), xml.to_owned());
    within(READ_TIMEOUT, move || read_disks(&places, &xml))
}

fn read_disks(places: &Places, xml: &str) -> Result<(Domain, Vec<Disk>), String> {
    let document = domain::document(xml).map_err(|error| error.to_string())?;
    let domain = Domain::of(&document).map_err(|error| error.to_string())?;
    let described = metadata::read(&document).map_err(|error| error.to_string())?;
    let mut disks = Vec::new();
    for options in described {
        let target = options.target.clone();
        let Some(disk) = domain.disk(&target) else {
            let name = &domain.name;
            let why = match domain.other_targets.contains(&target) {
                true => "is no vhostuser disk: make it <disk type='vhostuser'>",
                false => "does not exist: add a <disk type='vhostuser'> with this target, or remove the element",
            };
            return Err(format!("domain {name}: <metadata> describes the disk {target}, which {why}"));
        };
        let places = places.disk(&domain, &target);
        let socket = PathBuf::from(&disk.socket);
        if !socket.is_absolute() {
            return Err(format!("domain {}: disk {target}: path='{}' is no absolute path", domain.name, disk.socket));
        }
        disks.push(Disk { domain: domain.name.clone(), socket, options, places, target });
    }
    Ok((domain, disks))
}

fn prepare(host: &Host, xml: &str) -> Result<(), String> {
    let (domain, disks) = disks(host, xml)?;
    if disks.is_empty() {
        return Ok(());
    }
    if !domain.has_shared_memory {
        return Err(format!(
            "domain {}: its memory is not shared, so virtioblkd cannot reach the guest's buffers: add \
             <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
            domain.name
        ));
    }
    let arrival = host.places.arrival(&domain);
    let arrives = is_recent(&arrival);
    forget(&arrival);
    start_disks(host, &disks, arrives).map_err(|error| format!("domain {}: {error}", domain.name))
}

/// Starts the daemons of all disks of a machine, and returns when they listen; none is left if one fails. `arrives`: the guest
/// runs elsewhere, where another daemon has each image.
pub(super) fn start_disks(host: &Host, disks: &[Disk], arrives: bool) -> Result<(), String> {
    check_user(host, disks)?;
    make_directories(&host.places)?;
    let deadline = Instant::now() + START_TIMEOUT;
    let mut started = Vec::new();
    let result = start_all(host, disks, deadline, &mut started).and_then(|()| match arrives {
        // Another host's daemon still has the image.
        true => Ok(()),
        false => all_unused(host, disks, deadline),
    });
    if result.is_err() {
        let deadline = Instant::now() + GIVE_UP_TIMEOUT;
        for disk in started {
            if let Err(error) = daemons::end(disk, deadline) {
                logging::message(error);
            }
        }
    }
    result
}

/// Whether the mark of an arrival is of the start that goes on now: libvirt calls `prepare` right after `migrate` and
/// `restore`. An older one is of an arrival that came to nothing, and would let an image be used twice.
fn is_recent(arrival: &Path) -> bool {
    let modified = fs::symlink_metadata(arrival).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age < ARRIVAL_TIMEOUT))
}

/// Starts the daemon of one disk and waits until it listens. The disk is not in use then, and nothing is left if it fails.
pub(super) fn start_one(host: &Host, disk: &Disk) -> Result<(), String> {
    check_user(host, std::slice::from_ref(disk))?;
    make_directories(&host.places)?;
    if daemons::is_alive(&disk.places) {
        return Err(format!(
            "a daemon of the disk {target} runs already, of an attach that was interrupted or of a disk that the guest has \
             released late: 'virtioblkctl domain detach {} {target}' ends it; then attach again",
            disk.domain,
            target = disk.target
        ));
    }
    let deadline = Instant::now() + START_TIMEOUT;
    let started = begin(host, disk, deadline).map_err(|error| format!("disk {}: {error}", disk.target))?;
    let ready = started.wait(&disk.places, deadline).map_err(|error| format!("disk {}: {error}", disk.target));
    let result = ready.and_then(|()| all_unused(host, std::slice::from_ref(disk), deadline));
    if result.is_err() {
        let _ = daemons::end(&disk.places, Instant::now() + GIVE_UP_TIMEOUT);
    }
    result
}

/// A host without our user is an error: root would be more than the domain's description asks for.
fn check_user(host: &Host, disks: &[Disk]) -> Result<(), String> {
    let Some(user) = host.daemon_user else { return Ok(()) };
    let Some(disk) = disks.iter().find(|disk| !disk.has("user")) else { return Ok(()) };
    match nix::unistd::User::from_name(user) {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(format!(
            "disk {}: this host has no user '{user}', which its daemon runs as: make it (copy sysusers.d/virtioblkd.conf to \
             /etc/sysusers.d and run systemd-sysusers), or name another one, as in user='root'",
            disk.target
        )),
        Err(errno) => Err(format!("disk {}: cannot look up the user '{user}': {errno}", disk.target)),
    }
}

/// All begin before the first is waited for. `started`: those that must be ended if one fails.
fn start_all<'a>(
    host: &Host,
    disks: &'a [Disk],
    deadline: Instant,
    started: &mut Vec<&'a DiskPlaces>,
) -> Result<(), String> {
    let mut starting: Vec<(&Disk, Starting)> = Vec::new();
    let mut result = Ok(());
    for disk in disks {
        match begin(host, disk, deadline) {
            Ok(one) => {
                started.push(&disk.places);
                starting.push((disk, one));
            }
            Err(error) => {
                result = Err(format!("disk {}: {error}", disk.target));
                break;
            }
        }
    }
    let mut deadline = deadline;
    for (disk, one) in starting {
        if result.is_err() {
            deadline = deadline.min(Instant::now() + GIVE_UP_TIMEOUT);
        }
        let ready = one.wait(&disk.places, deadline).map_err(|error| format!("disk {}: {error}", disk.target));
        result = result.and(ready);
    }
    result
}

fn begin(host: &Host, disk: &Disk, deadline: Instant) -> Result<Starting, String> {
    // Of a start that was interrupted, of a domain that ended while no hook ran, or from before a crash of the host.
    daemons::end(&disk.places, deadline)?;
    let path = &disk.places.configuration;
    write_atomically(path, &configuration(host, disk), 0o600)
        .and_then(|()| write_atomically(&disk.places.domain_name, &disk.domain, 0o644))
        .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    let started = daemons::start(&disk.places, &host.launcher, &disk.domain);
    started.inspect_err(|_| {
        // Another hook may have started the daemon meanwhile, whose files these are then.
        if !daemons::is_alive(&disk.places) {
            let _ = disk.places.remove_files();
        }
    })
}

/// A file image that another process uses is refused before the guest starts. The daemon itself takes QEMU's locks only
/// once the guest's rings run, so that a guest can migrate between two daemons of one image.
fn all_unused(host: &Host, disks: &[Disk], deadline: Instant) -> Result<(), String> {
    // The daemons may have taken nearly all of the time.
    let deadline = deadline.max(Instant::now() + GIVE_UP_TIMEOUT);
    let program = host.launcher.program.with_file_name("virtioblkctl");
    disks.iter().try_for_each(|disk| {
        let (Some(path), None) = (disk.option("blk-file"), disk.option("locking")) else { return Ok(()) };
        let is_read_only = disk.option("read-only") == Some("true");
        image_use::check(&program, path, is_read_only, deadline)
            .map_err(|error| format!("disk {}: {error}", disk.target))
    })
}

/// The daemon's configuration file.
pub(super) fn configuration(host: &Host, disk: &Disk) -> String {
    let text = |path: &Path| path.display().to_string();
    let mut own = vec![
        ("socket-path".to_owned(), text(&disk.socket)),
        ("control-path".to_owned(), text(&disk.places.control)),
        ("pid-file".to_owned(), text(&disk.places.pid_file)),
    ];
    if let (Some(group), false) = (&host.qemu_group, disk.has("socket-group")) {
        own.push(("socket-group".to_owned(), group.clone()));
    }
    if let (Some(user), false) = (host.daemon_user, disk.has("user")) {
        own.push(("user".to_owned(), user.to_owned()));
    }
    if disk.has("blk-file") && !disk.has("locking") {
        own.push(("locking".to_owned(), "in-use".to_owned()));
    }
    let mut table = toml::Table::new();
    for (key, value) in own.into_iter().chain(disk.options.options.iter().cloned()) {
        if metadata::is_repeated(&key) {
            let list = table.entry(key).or_insert_with(|| toml::Value::Array(Vec::new()));
            list.as_array_mut().expect("made as one").push(value.into());
        } else {
            table.insert(key, value.into());
        }
    }
    format!("# Written by libvirt's hook from the domain's <metadata>, which is the place to change it.\n{table}")
}

fn release(host: &Host, xml: &str, timeout: Duration) -> Result<(), String> {
    let xml = xml.to_owned();
    let domain = within(READ_TIMEOUT, move || Domain::parse(&xml).map_err(|error| error.to_string()))?;
    forget(&host.places.arrival(&domain));
    domain_lock::remove_unused(&host.places.changes(&domain));
    let socket = |target: &str| domain.disk(target).map(|disk| PathBuf::from(&disk.socket));
    end_disks(host, &domain, socket, timeout)
}

/// Removes the mark of an arrival.
fn forget(arrival: &Path) {
    for path in [arrival, &arrival.with_extension(NEW)] {
        let _ = fs::remove_file(path);
    }
}

/// Ends the daemons that were started for the machine, and no others, and removes all that they left. `socket`: the
/// vhost-user socket of a target, for a disk whose configuration file is lost.
pub(super) fn end_disks(
    host: &Host,
    domain: &Domain,
    socket: impl Fn(&str) -> Option<PathBuf>,
    timeout: Duration,
) -> Result<(), String> {
    let started = host.places.started(domain).map_err(|error| format!("cannot look for daemons to end: {error}"))?;
    let deadline = Instant::now() + timeout;
    let mut result = Ok(());
    for disk in started {
        let ended = daemons::end(&disk, deadline);
        if let (Ok(()), Some(socket)) = (&ended, socket(disk.target())) {
            daemons::remove_socket(&disk, &socket);
        }
        result = result.and(ended);
    }
    result
}

/// The description of a domain that comes from another host or from a file: each of our disks gets this host's socket.
fn arrive(host: &Host, xml: &str) -> Result<String, String> {
    let (domain, disks) = disks(host, xml)?;
    make_directories(&host.places)?;
    let arrival = host.places.arrival(&domain);
    write_atomically(&arrival, "", 0o600).map_err(|error| format!("cannot write {}: {error}", arrival.display()))?;
    let mut changed = xml.to_owned();
    let mut ranges: Vec<_> = disks.iter().filter_map(|disk| domain.disk(&disk.target)).collect();
    ranges.sort_by_key(|disk| disk.socket_range.start);
    for disk in ranges.into_iter().rev() {
        let socket = host.places.socket(&domain, &disk.target);
        let escaped = socket.display().to_string().replace('&', "&amp;").replace('<', "&lt;").replace(['\'', '"'], "");
        changed.replace_range(disk.socket_range.clone(), &escaped);
    }
    Ok(changed)
}

/// libvirtd was started again: a daemon that ended meanwhile is started again, so that QEMU finds it when it connects
/// anew.
fn revive(host: &Host, xml: &str) -> Result<(), String> {
    let (_, disks) = disks(host, xml)?;
    let deadline = Instant::now() + START_TIMEOUT;
    let gone = disks.iter().filter(|disk| disk.places.configuration.exists());
    for disk in gone.filter(|disk| !daemons::is_alive(&disk.places) && !units::is_changing(&disk.places)) {
        units::end(&disk.places, deadline)?;
        daemons::start(&disk.places, &host.launcher, &disk.domain)?.wait(&disk.places, deadline)?;
    }
    Ok(())
}

pub(super) fn make_directories(places: &Places) -> Result<(), String> {
    for path in [&places.run, &places.sockets, &places.log] {
        let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(path);
        made.map_err(|error| format!("cannot make the directory {}: {error}", path.display()))?;
    }
    // What daemons are started with is read from the first, and what they say is written below the second. The sockets'
    // directory may be the daemons' user's, as systemd makes it: sockets are bound and found with that in mind.
    [&places.run, &places.log].into_iter().try_for_each(|path| trust::check(path))
}
