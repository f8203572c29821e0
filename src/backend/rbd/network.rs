//! Whether this process can reach a cluster at all. Without this check librados would wait for its timeout and blame the
//! monitors.

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::open::OpenError;

/// Checks that this process may open sockets for the network. Warns if it has no network device.
pub(super) fn check() -> Result<(), OpenError> {
    let open = |family| socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).map(drop);
    may_open(open(AddressFamily::INET), open(AddressFamily::INET6))?;
    // If the file cannot be read, the connection shows what is wrong.
    if std::fs::read_to_string("/proc/self/net/dev").is_ok_and(|devices| has_loopback_alone(&devices)) {
        log::warn!(
            "this process has no network device but the loopback one (PrivateNetwork=yes in the systemd unit?): only a cluster \
             on this host can be reached; start the disk as virtioblkd-rbd@NAME"
        );
    }
    Ok(())
}

/// The results of opening a socket for IPv4 and for IPv6. One is enough.
fn may_open(inet: Result<(), Errno>, inet6: Result<(), Errno>) -> Result<(), OpenError> {
    match (inet, inet6) {
        (Err(errno), Err(_)) if matches!(errno, Errno::AFNOSUPPORT | Errno::PERM | Errno::ACCESS) => {
            Err(OpenError::new(format!(
                "this process may not open AF_INET sockets ({errno}), and a Ceph cluster is reached by them: start the disk as \
             virtioblkd-rbd@NAME instead of virtioblkd@NAME, or allow them in the service's unit \
             (RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK, PrivateNetwork=no)"
            )))
        }
        _ => Ok(()),
    }
}

/// Whether `devices`, the text of /proc/net/dev, names the loopback device alone.
fn has_loopback_alone(devices: &str) -> bool {
    let names = devices.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim());
    names.clone().count() > 0 && names.into_iter().all(|name| name == "lo")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_internet_sockets_is_refused_with_the_unit_that_has_them() {
        for errno in [Errno::AFNOSUPPORT, Errno::PERM, Errno::ACCESS] {
            let error = may_open(Err(errno), Err(errno)).unwrap_err().to_string();
            assert!(error.contains("may not open AF_INET sockets") && error.contains("virtioblkd-rbd@"), "{error}");
        }
        assert!(may_open(Err(Errno::AFNOSUPPORT), Ok(())).is_ok(), "a host with IPv6 alone");
        assert!(may_open(Ok(()), Err(Errno::AFNOSUPPORT)).is_ok(), "a host with IPv4 alone");
        assert!(may_open(Err(Errno::MFILE), Err(Errno::MFILE)).is_ok(), "another cause is reported where it matters");
    }

    #[test]
    fn a_loopback_device_alone_is_found() {
        let head = "Inter-|   Receive\n face |bytes    packets\n";
        assert!(has_loopback_alone(&format!("{head}    lo:   84  1 0 0\n")));
        assert!(!has_loopback_alone(&format!("{head}    lo:   84  1 0 0\n  eth0: 84 1 0\n")));
        assert!(!has_loopback_alone(""), "a text that says nothing");
    }
}
