//! Tells systemd what the daemon is at (sd_notify(3)), where it asked to be told (`Type=notify`).

use crate::base::rate_limit::{HOST_LOG, log_limited};
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::OnceLock;

/// Connected; `None`: systemd did not ask, or cannot be reached.
static SOCKET: OnceLock<Option<UnixDatagram>> = OnceLock::new();

/// Connects to systemd, if it asked to be told. Before the sandbox is entered, in which no socket is made.
pub(crate) fn connect() {
    SOCKET.get_or_init(|| {
        let address = std::env::var_os("NOTIFY_SOCKET")?;
        match connect_to(&address) {
            Ok(socket) => Some(socket),
            Err(error) => {
                log::warn!("cannot reach systemd on NOTIFY_SOCKET {}: {error}; it is told nothing", address.display());
                None
            }
        }
    });
}

/// Whether a state that is sent reaches systemd's socket.
pub(crate) fn is_connected() -> bool {
    SOCKET.get().is_some_and(Option::is_some)
}

/// Sends one state, such as `READY=1`. A failure costs no guest its disk: it is logged.
pub(crate) fn systemd(state: &str) {
    connect();
    if let Some(Some(socket)) = SOCKET.get()
        && let Err(error) = socket.send(state.as_bytes())
    {
        log_limited!(HOST_LOG, Warn, "cannot tell {state} to systemd on its NOTIFY_SOCKET: {error}");
    }
}

fn connect_to(address: &OsStr) -> io::Result<UnixDatagram> {
    let address = match address.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    // A full queue must not keep the front-ends waiting.
    socket.set_nonblocking(true)?;
    socket.connect_addr(&address)?;
    Ok(socket)
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
            connect_to(&variable).unwrap().send(b"READY=1").unwrap();
            let mut text = [0; 32];
            let length = systemd.recv(&mut text).unwrap();
            assert_eq!(&text[..length], b"READY=1");
        }
        assert!(connect_to(OsStr::new("/does/not/exist")).is_err());
    }
}
