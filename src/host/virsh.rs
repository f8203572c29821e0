//! libvirt as virsh reaches it, which honours LIBVIRT_DEFAULT_URI. Each call is bounded in time.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::snapshot::child::{Ended, output};

/// How long libvirt may take to answer a question.
pub const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take to change a domain.
pub const CHANGE_TIMEOUT: Duration = Duration::from_secs(60);

/// Runs virsh with these arguments and returns what it printed. The error says what libvirt said.
pub fn run(arguments: &[&str], timeout: Duration) -> Result<String, String> {
    let mut virsh = Command::new("virsh");
    virsh.arg("--quiet").args(arguments).env("LC_ALL", "C");
    let what = arguments.first().copied().unwrap_or_default();
    let (ended, out, err) = output(virsh, Instant::now() + timeout, None).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => "virsh is not installed (Debian: libvirt-clients)".to_owned(),
        _ => format!("virsh cannot be run: {error}"),
    })?;
    match ended {
        Ended::Status(status) if status.success() => Ok(out),
        Ended::Status(status) => Err(match err.lines().find_map(|line| line.trim().strip_prefix("error: ")) {
            // The first line of two is virsh's ("Failed to attach device"), the second libvirt's reason.
            Some(_) => said(&err),
            None => format!("virsh {what} failed ({status})"),
        }),
        Ended::TimedOut | Ended::Stopped => {
            Err(format!("virsh {what} did not end within {} s: does libvirtd answer?", timeout.as_secs()))
        }
    }
}

fn said(err: &str) -> String {
    let lines = err.lines().map(|line| line.trim()).filter(|line| !line.is_empty());
    let parts: Vec<&str> = lines.map(|line| line.strip_prefix("error: ").unwrap_or(line)).collect();
    format!("libvirt: {}", parts.join(": "))
}

/// Calls `act` with the path of a file with this text, which only our user may read: a domain's description has secrets.
pub fn with_file<T>(text: &str, act: impl FnOnce(&str) -> Result<T, String>) -> Result<T, String> {
    let file = PrivateFile::create(text).map_err(|error| format!("cannot write a file for virsh: {error}"))?;
    act(file.0.to_str().ok_or("the directory of temporary files has a name that is no text")?)
}

/// A file that is removed when dropped.
struct PrivateFile(PathBuf);

impl PrivateFile {
    fn create(text: &str) -> io::Result<Self> {
        let directory = std::env::temp_dir();
        for number in 0..1000 {
            let path = directory.join(format!("virtioblkctl-{}-{number}.xml", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
                Ok(mut file) => {
                    let private = PrivateFile(path);
                    file.write_all(text.as_bytes())?;
                    return Ok(private);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }
}

impl Drop for PrivateFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The description of a domain: the one that runs, or `inactive`, the one of its next start.
pub fn describe(domain: &str, inactive: bool) -> Result<String, String> {
    let mut arguments = vec!["dumpxml", "--domain", domain];
    if inactive {
        arguments.push("--inactive");
    }
    run(&arguments, QUERY_TIMEOUT)
}

/// The description of a domain's next start with the secrets in it, which `virsh define` would lose otherwise.
pub fn describe_whole(domain: &str) -> Result<String, String> {
    run(&["dumpxml", "--domain", domain, "--inactive", "--security-info"], QUERY_TIMEOUT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libvirts_reason_is_one_line() {
        let text = "error: Failed to attach device from x.xml\nerror: internal error: no slot\n\n";
        assert_eq!(said(text), "libvirt: Failed to attach device from x.xml: internal error: no slot");
    }
}
