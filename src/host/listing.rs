//! The disks of this host: those that libvirt's hook started, those of the shipped systemd unit, and any other whose
//! control socket lies where these have theirs. A disk has a name, which stands for the path of its control socket.
//!
//! | disk | its name | its control socket |
//! |---|---|---|
//! | of libvirt's hook | `DOMAIN:TARGET` | `/run/virtioblkd/UUID-TARGET.ctl` |
//! | of the unit `virtioblkd@NAME` | `NAME` | `control-path` of `/etc/virtioblkd/NAME.toml` |
//! | other | `NAME` | `/run/virtioblkd/NAME.ctl` |

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::places::Places;
use crate::control::client::{Client, Failure};
use crate::control::protocol::return_types::Status;
use crate::disk::DiskStatus;

/// How long a daemon may take to say how it is.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// So many daemons are asked at a time.
const MAX_ASKED: usize = 64;
/// A configuration file that is longer is none of ours.
const MAX_FILE: u64 = 1 << 20;

/// Where disks are looked for.
#[derive(Clone, Debug, Default)]
pub struct Directories {
    /// The files of libvirt's hook.
    pub hook: Option<PathBuf>,
    /// The configuration files of the shipped unit.
    pub units: Option<PathBuf>,
    /// Control sockets, `NAME.ctl`.
    pub sockets: Option<PathBuf>,
}

impl Directories {
    /// Those of our user.
    pub fn of_this_user() -> Self {
        let units = Some(PathBuf::from("/etc/virtioblkd")).filter(|_| rustix::process::geteuid().is_root());
        match Places::of_this_user() {
            // What root started is everybody's to see; whose sockets may be opened is another question.
            Ok(places) if rustix::process::geteuid().is_root() || has_files(&places.sockets) => {
                Directories { hook: Some(places.run), units, sockets: Some(places.sockets) }
            }
            _ => Directories {
                hook: Some("/run/virtioblkd-libvirt".into()),
                units: Some("/etc/virtioblkd".into()),
                sockets: Some("/run/virtioblkd".into()),
            },
        }
    }

    /// One directory of control sockets alone.
    pub fn sockets(directory: &Path) -> Self {
        Directories { sockets: Some(directory.to_owned()), ..Directories::default() }
    }
}

fn has_files(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some())
}

/// A disk of this host, whose daemon may run or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// The libvirt domain that it belongs to, by name and UUID.
    pub domain: Option<(String, String)>,
    /// The disk's target in that domain.
    pub target: Option<String>,
    /// Its control socket; `None`: its configuration file names none.
    pub control: Option<PathBuf>,
    /// Its vhost-user socket, where its configuration file is known.
    pub socket: Option<PathBuf>,
}

/// All disks of these directories, by name. A directory that does not exist has none.
pub fn find(directories: &Directories) -> io::Result<Vec<Listed>> {
    let sockets = directories.sockets.clone().unwrap_or_default();
    let mut found = Vec::new();
    for stem in stems(directories.hook.as_deref(), "toml")? {
        let run = directories.hook.as_deref().unwrap_or(Path::new(""));
        found.extend(hook_disk(run, &sockets, &stem));
    }
    for stem in stems(directories.units.as_deref(), "toml")? {
        let path = directories.units.as_deref().unwrap_or(Path::new("")).join(format!("{stem}.toml"));
        found.push(unit_disk(&path, &sockets, stem));
    }
    for stem in stems(directories.sockets.as_deref(), "ctl")? {
        let control = sockets.join(format!("{stem}.ctl"));
        let is_known = found
            .iter()
            .filter_map(|disk: &Listed| disk.control.as_deref())
            .any(|known| known == control || same(known, &control));
        if !is_known && is_socket(&control) {
            found.push(Listed { name: stem, domain: None, target: None, control: Some(control), socket: None });
        }
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(found)
}

/// The names of a directory's files with this extension, without it.
fn stems(directory: Option<&Path>, extension: &str) -> io::Result<Vec<String>> {
    let Some(directory) = directory else { return Ok(Vec::new()) };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io::Error::new(error.kind(), format!("{}: {error}", directory.display()))),
    };
    let mut stems = Vec::new();
    for entry in entries {
        let name = PathBuf::from(entry?.file_name());
        if name.extension() == Some(OsStr::new(extension)) {
            stems.extend(name.file_stem().and_then(OsStr::to_str).map(str::to_owned));
        }
    }
    Ok(stems)
}

/// `UUID-TARGET`.
fn hook_disk(run: &Path, sockets: &Path, stem: &str) -> Option<Listed> {
    let (uuid, target) = stem.split_at_checked(36)?;
    let target = target.strip_prefix('-')?;
    let domain = read(&run.join(format!("{stem}.domain"))).ok().filter(|name| !name.is_empty());
    let name = domain.as_ref().map_or_else(|| stem.to_owned(), |domain| format!("{domain}:{target}"));
    Some(Listed {
        name,
        domain: Some((domain.unwrap_or_else(|| uuid.to_owned()), uuid.to_owned())),
        target: Some(target.to_owned()),
        control: Some(sockets.join(format!("{stem}.ctl"))),
        socket: read(&run.join(format!("{stem}.toml"))).ok().and_then(|text| path_in(&text, "socket-path")),
    })
}

fn unit_disk(path: &Path, sockets: &Path, name: String) -> Listed {
    let (control, socket) = match read(path) {
        Ok(text) => (path_in(&text, "control-path"), path_in(&text, "socket-path")),
        // Not ours to read; its example has the socket here.
        Err(_) => (Some(sockets.join(format!("{name}.ctl"))), None),
    };
    Listed { name, domain: None, target: None, control, socket }
}

fn path_in(text: &str, key: &str) -> Option<PathBuf> {
    let table: toml::Table = text.parse().ok()?;
    table.get(key)?.as_str().map(PathBuf::from)
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text.trim_end_matches('\n').to_owned())
}

fn is_socket(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// The control socket that `text` means: a disk's name, or a path. `Err`: both, of two different sockets, or a disk
/// without a control socket.
pub fn resolve(text: &Path, directories: &Directories) -> Result<PathBuf, Failure> {
    let Some(name) = text.to_str().filter(|text| !text.contains('/')) else { return Ok(text.to_owned()) };
    // A directory that cannot be read has no disk with this name.
    let found = find(directories).unwrap_or_default();
    let named: Vec<&Listed> = found.iter().filter(|disk| disk.name == name).collect();
    let refuse = |why: String| Err(Failure::new("no-daemon", why));
    match named.as_slice() {
        [] if text.exists() => Ok(text.to_owned()),
        [] => refuse(format!(
            "'{name}' is no disk of this host and no socket's path: 'virtioblkctl list' shows the disks' names"
        )),
        [disk] => match &disk.control {
            None => refuse(format!("the disk '{name}' has no control socket: give its daemon a control-path")),
            Some(control) if is_socket(text) && !same(control, text) => refuse(format!(
                "'{name}' is a disk's name and a socket in this directory: give the path, ./{name} or {}",
                control.display()
            )),
            Some(control) => Ok(control.clone()),
        },
        _ => refuse(format!("several disks are called '{name}': give the path that 'virtioblkctl list' shows")),
    }
}

fn same(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

/// How a disk is.
#[derive(Clone, Debug)]
pub struct State {
    /// One word of these: `in-use`, `idle` (no front-end), `held`, `stopped` (a failed request waits for `continue`),
    /// `trouble`, `no-answer` (also: the reply is no status), `stale` (a socket without a daemon), `not-running`,
    /// `no-permission`, `no-control-socket`.
    pub word: &'static str,
    /// The status that the daemon reports. `None`: it reported none, and `word` says why.
    pub status: Option<Box<Status>>,
}

impl State {
    /// Returns a text of the disk's status. `None`: there is no status, or the daemon's version does not report this text.
    pub fn text<'a>(&'a self, member: impl Fn(&'a DiskStatus) -> &'a str) -> Option<&'a str> {
        self.status.as_ref().map(|status| member(&status.disk)).filter(|text| !text.is_empty())
    }

    /// Returns the path of the vhost-user socket, as the daemon reports it.
    pub fn vhost_socket(&self) -> Option<&Path> {
        let socket = &self.status.as_ref()?.daemon.vhost_socket;
        (!socket.is_empty()).then(|| Path::new(socket))
    }
}

/// Asks the daemons of all these disks at once. A daemon that does not answer within a second is given up.
pub fn states(disks: &[Listed]) -> Vec<State> {
    each(disks, |disk| state_and(disk, |_, _| Ok(())).0)
}

/// Calls `ask` for each disk, for [`MAX_ASKED`] disks at a time.
pub(super) fn each<T: Send>(disks: &[Listed], ask: impl Fn(&Listed) -> T + Sync) -> Vec<T> {
    let mut replies = Vec::new();
    for some in disks.chunks(MAX_ASKED) {
        thread::scope(|scope| {
            let asked: Vec<_> = some.iter().map(|disk| scope.spawn(|| ask(disk))).collect();
            let ended = asked.into_iter().map(|one| one.join().expect("asking does not panic"));
            replies.extend(ended);
        });
    }
    replies
}

/// Asks a disk's daemon how it is, and then `more`, which gets the connection and the time that is left. A daemon that does
/// not answer all of it in time counts as one that does not answer.
pub(super) fn state_and<T>(
    disk: &Listed,
    more: impl FnOnce(&mut Client, &dyn Fn() -> Duration) -> Result<T, Failure>,
) -> (State, Option<T>) {
    let without = |word| (State { word, status: None }, None);
    let Some(control) = &disk.control else { return without("no-control-socket") };
    match ask(control, more) {
        Ok((status, more)) => (State { word: word(&status), status: Some(Box::new(status)) }, Some(more)),
        Err(failure) => without(match failure.code.as_str() {
            "no-permission" => "no-permission",
            "no-daemon" if is_socket(control) => "stale",
            "no-daemon" => "not-running",
            _ => "no-answer",
        }),
    }
}

fn ask<T>(
    control: &Path,
    more: impl FnOnce(&mut Client, &dyn Fn() -> Duration) -> Result<T, Failure>,
) -> Result<(Status, T), Failure> {
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    let left = || deadline.saturating_duration_since(Instant::now());
    let mut client = Client::connect_within(control, ANSWER_TIMEOUT)?;
    let status = client.query_status(left())?;
    Ok((status, more(&mut client, &left)?))
}

fn word(Status { disk, quiesce, .. }: &Status) -> &'static str {
    if disk.stopped.is_some() {
        "stopped"
    } else if disk.image_status.trouble.is_some() || disk.sync_failed {
        "trouble"
    } else if !matches!(quiesce.state.as_str(), "" | "open") {
        "held"
    } else if disk.connected {
        "in-use"
    } else {
        "idle"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    const UUID: &str = "6fd1f7a2-4c0b-4e0f-8a65-1a3c0d2e9b11";

    #[test]
    fn disks_of_the_hook_of_units_and_others_have_names() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["hook", "units", "sockets"] {
            fs::create_dir(path(name)).unwrap();
        }
        let write = |name: &str, text: &str| fs::write(path(name), text).unwrap();
        write(&format!("hook/{UUID}-vda.toml"), "socket-path = '/run/a.sock'");
        write(&format!("hook/{UUID}-vda.domain"), "vm1");
        write(&format!("hook/{UUID}-vdb.toml"), "");
        write("units/db.toml", "control-path = '/elsewhere/db.ctl'\nsocket-path = '/run/db.sock'\n");
        write("units/plain.toml", "");
        // As /var/run for /run.
        std::os::unix::fs::symlink(path("sockets"), path("link")).unwrap();
        let linked = path("link/linked.ctl");
        write("units/linked.toml", &format!("control-path = '{}'", linked.display()));
        let _linked = UnixListener::bind(&linked).unwrap();
        write("sockets/file.ctl", "no socket");
        let _other = UnixListener::bind(path("sockets/other.ctl")).unwrap();
        let _hooks = UnixListener::bind(path(&format!("sockets/{UUID}-vda.ctl"))).unwrap();
        let directories =
            Directories { hook: Some(path("hook")), units: Some(path("units")), sockets: Some(path("sockets")) };
        let found = find(&directories).unwrap();
        let names: Vec<&str> = found.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, [&format!("{UUID}-vdb"), "db", "linked", "other", "plain", "vm1:vda"]);
        assert_eq!(found[5].domain, Some(("vm1".into(), UUID.into())));
        assert_eq!((found[1].control.as_deref(), &found[4].control), (Some(Path::new("/elsewhere/db.ctl")), &None));

        let resolved = |name: &str| resolve(Path::new(name), &directories).map_err(|failure| failure.message);
        assert_eq!(resolved("db"), Ok("/elsewhere/db.ctl".into()));
        assert_eq!(resolved("vm1:vda"), Ok(path(&format!("sockets/{UUID}-vda.ctl"))));
        assert_eq!(resolved("./db"), Ok("./db".into()));
        assert!(resolved("nothing").unwrap_err().contains("virtioblkctl list"));
        assert!(resolved("plain").unwrap_err().contains("no control socket"));
        assert_eq!(find(&Directories::sockets(&path("none"))).unwrap(), []);
    }

    #[test]
    fn a_status_of_another_version_is_read() {
        let read = |status: serde_json::Value| serde_json::from_value::<Status>(status).unwrap();
        let state = |status| State { word: word(&status), status: Some(Box::new(status)) };
        let old = state(read(serde_json::json!({"image": "/a.raw", "quiesce": {"state": "settling"}, "new": [1]})));
        assert_eq!((old.word, old.text(|disk| &disk.image)), ("held", Some("/a.raw")));
        assert_eq!((old.text(|disk| &disk.guest_sees), old.vhost_socket()), (None, None));
        assert_eq!(state(read(serde_json::json!({"trouble": "fenced", "connected": true}))).word, "trouble");
        assert_eq!(state(read(serde_json::json!({"connected": true}))).word, "in-use");
        assert_eq!(state(read(serde_json::json!({}))).word, "idle");
    }

    #[test]
    fn a_daemon_that_does_not_answer_is_given_up_and_a_stale_socket_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        // It listens and never accepts.
        let _silent = UnixListener::bind(path("silent.ctl")).unwrap();
        drop(UnixListener::bind(path("stale.ctl")).unwrap());
        // A program that another test starts has a copy of the socket until its exec.
        let end = Instant::now() + Duration::from_secs(60);
        while std::os::unix::net::UnixStream::connect(path("stale.ctl")).is_ok() && Instant::now() < end {}
        let mut disks = find(&Directories::sockets(directory.path())).unwrap();
        disks.push(Listed { name: "gone".into(), control: Some(path("gone.ctl")), ..disks[0].clone() });
        let began = Instant::now();
        let words: Vec<&str> = states(&disks).iter().map(|state| state.word).collect();
        assert_eq!(words, ["no-answer", "stale", "not-running"]);
        assert!(began.elapsed() < Duration::from_secs(30));
    }
}
