//! Tells systemd what the daemon is at (sd_notify(3)), where it asked to be told (`Type=notify`).

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Sends one state, such as `READY=1`. A failure costs no guest its disk: it is logged.
pub(crate) fn systemd(state: &str) {
    let Some(address) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    if let Err(error) = send(&address, state) {
        log::warn!("cannot tell {state} to systemd on NOTIFY_SOCKET {}: {error}", address.display());
    }
}

fn send(address: &OsStr, state: &str) -> io::Result<()> {
    let address = match address.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    // A full queue must not keep the front-ends waiting.
    socket.set_nonblocking(true)?;
    socket.send_to_addr(state.as_bytes(), &address).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_and_an_abstract_name_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let abstract_name = format!("virtioblkd-test-{}", std::process::id());
        let addresses = [
            (SocketAddr::from_pathname(&path).unwrap(), path.into_os_string()),
            (SocketAddr::from_abstract_name(&abstract_name).unwrap(), format!("@{abstract_name}").into()),
        ];
        for (address, variable) in addresses {
            let systemd = UnixDatagram::bind_addr(&address).unwrap();
            send(&variable, "READY=1").unwrap();
            let mut text = [0; 32];
            let length = systemd.recv(&mut text).unwrap();
            assert_eq!(&text[..length], b"READY=1");
        }
        assert!(send(OsStr::new("/does/not/exist"), "READY=1").is_err());
    }
}
