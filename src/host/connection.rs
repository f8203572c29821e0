//! Which libvirt virsh talks to. Daemons and their files are this host's and this user's; a domain of another host's or
//! another user's libvirt may have the same name and the same socket paths, and is another domain.

use super::virsh;

/// Refuses a libvirt of another host.
pub fn check_local() -> Result<(), String> {
    uri().and_then(|uri| check_local_uri(&uri))
}

/// Refuses a libvirt that is known to be another host's. For callers that find out by themselves that libvirt does not answer.
pub fn refuse_remote() -> Result<(), String> {
    uri().map_or(Ok(()), |uri| check_local_uri(&uri))
}

fn check_local_uri(uri: &str) -> Result<(), String> {
    refuse_unless(
        is_local(uri),
        uri,
        "is on another host, and the disks' daemons are on this one: run this command there",
    )
}

/// Refuses a libvirt that is not this host's, or whose QEMU processes and hook do not run as our user.
pub fn check_ours() -> Result<(), String> {
    let uri = uri()?;
    let is_root = rustix::process::geteuid().is_root();
    refuse_unless(
        is_local(&uri),
        &uri,
        "is on another host, and daemons are started on this one: run this command there",
    )?;
    refuse_unless(
        is_of_user(&uri, is_root),
        &uri,
        match is_root {
            true => "is not libvirt's driver for QEMU: unset LIBVIRT_DEFAULT_URI, or set it to qemu:///system",
            false => {
                "is not this user's libvirt, so its QEMU cannot use this user's daemons: run this command as root, or set \
             LIBVIRT_DEFAULT_URI to qemu:///session"
            }
        },
    )
}

fn uri() -> Result<String, String> {
    virsh::run(&["uri"], virsh::QUERY_TIMEOUT).map(|uri| uri.trim().to_owned())
}

fn refuse_unless(is_right: bool, uri: &str, why: &str) -> Result<(), String> {
    if is_right { Ok(()) } else { Err(format!("virsh is connected to '{uri}', which {why}")) }
}

/// `DRIVER[+TRANSPORT]://[USER@][HOST][:PORT]/PATH[?PARAMETERS]` (docs/uri.rst of libvirt).
fn parts(uri: &str) -> (&str, &str, &str) {
    let (scheme, rest) = uri.split_once("://").unwrap_or((uri, ""));
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    (scheme, authority, path)
}

fn is_local(uri: &str) -> bool {
    let (_, authority, _) = parts(uri);
    let host = authority.rsplit('@').next().unwrap_or_default();
    let host = match host.strip_prefix('[') {
        Some(address) => address.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    matches!(host, "" | "localhost" | "127.0.0.1" | "::1")
        || std::fs::read_to_string("/proc/sys/kernel/hostname").is_ok_and(|name| name.trim_end() == host)
}

fn is_of_user(uri: &str, is_root: bool) -> bool {
    let (scheme, _, path) = parts(uri);
    let is_qemu = scheme.split('+').next() == Some("qemu");
    is_qemu && (path == "/session" || is_root && path == "/system")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_libvirt_of_another_host_or_user_is_recognized() {
        let local = ["qemu:///system", "qemu+unix:///system?socket=/a@b/c:d/s", "qemu+ssh://root@localhost:22/system"];
        assert!(local.iter().all(|uri| is_local(uri)));
        assert!(is_local("qemu+tcp://[::1]:16509/system"));
        for other in
            ["qemu+ssh://root@db1/system", "qemu://db1/system", "qemu+tls://db1:16514/system", "qemu://[fe80::1]/s"]
        {
            assert!(!is_local(other), "{other}");
        }
        assert!(is_of_user("qemu:///system", true) && is_of_user("qemu+unix:///session?mode=direct", true));
        assert!(is_of_user("qemu:///session", false) && !is_of_user("qemu:///system", false));
        assert!(!is_of_user("qemu+unix:///system?path=/session", false) && !is_of_user("test:///default", true));
    }
}
