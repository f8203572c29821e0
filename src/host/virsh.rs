//! libvirt as virsh reaches it, which honours LIBVIRT_DEFAULT_URI. Each call is bounded in time.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::snapshot::child::{CommandEnd, MAX_OUTPUT, output};
use crate::snapshot::libvirt;

/// How long libvirt may take to answer a question.
pub const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take to change a domain.
pub const CHANGE_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a command of virsh failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirshError {
    /// What libvirt or virsh said.
    pub message: String,
    /// The command has failed. `false`: virsh was given up or killed, and libvirt may carry the command out yet.
    pub is_answer: bool,
}

impl VirshError {
    /// A command that has failed.
    pub fn answer(message: String) -> Self {
        VirshError { message, is_answer: true }
    }
}

/// Runs virsh with these arguments and returns what it printed. The error says what libvirt said.
pub fn run(arguments: &[&str], timeout: Duration) -> Result<String, String> {
    attempt(arguments, timeout).map_err(|error| error.message)
}

/// The same, for callers that must know whether an error is libvirt's answer.
pub fn attempt(arguments: &[&str], timeout: Duration) -> Result<String, VirshError> {
    let mut virsh = Command::new("virsh");
    virsh.arg("--quiet").args(arguments).env("LC_ALL", "C");
    let what = arguments.first().copied().unwrap_or_default();
    let (ended, out, err) = output(virsh, Instant::now() + timeout, None).map_err(|error| {
        VirshError::answer(match error.kind() {
            io::ErrorKind::NotFound => "virsh is not installed (Debian: libvirt-clients)".to_owned(),
            _ => format!("virsh cannot be run: {error}"),
        })
    })?;
    let is_answer = matches!(ended, CommandEnd::Status(status) if status.code().is_some());
    let result = match ended {
        CommandEnd::Status(status) if status.success() => whole(what, out),
        CommandEnd::Status(status) => Err(match err.lines().find_map(|line| line.trim().strip_prefix("error: ")) {
            // The first line of two is virsh's ("Failed to attach device"), the second libvirt's reason.
            Some(_) => said(&err),
            None => format!("virsh {what} failed ({status}) and did not say why: run it by hand"),
        }),
        CommandEnd::TimedOut | CommandEnd::Cancelled => Err(format!(
            "virsh {what} did not end within {} s: see whether libvirtd works (systemctl status libvirtd)",
            timeout.as_secs()
        )),
    };
    result.map_err(|message| VirshError { message, is_answer })
}

/// What virsh printed, unless it was cut.
fn whole(what: &str, out: String) -> Result<String, String> {
    match out.len() as u64 >= MAX_OUTPUT {
        true => Err(format!("virsh {what} printed more than {} MiB, which is too much to read", MAX_OUTPUT >> 20)),
        false => Ok(out),
    }
}

fn said(err: &str) -> String {
    let lines = err.lines().map(|line| line.trim()).filter(|line| !line.is_empty());
    let parts: Vec<&str> = lines.map(|line| line.strip_prefix("error: ").unwrap_or(line)).collect();
    format!("libvirt: {}{}", parts.join(": "), libvirt::fix(err))
}

/// Calls `act` with the path of a file with this text. A domain's description has secrets: the file is only in memory,
/// other users may not read it, and it ends with the processes that use it, however they end.
pub fn with_file<T>(text: &str, act: impl FnOnce(&str) -> Result<T, String>) -> Result<T, String> {
    let file = memory_file(text).map_err(|error| format!("cannot make a file for virsh: {error}"))?;
    act(&format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()))
}

fn memory_file(text: &str) -> io::Result<File> {
    let mut file = File::from(memfd_create("domain.xml", MemfdFlags::CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    Ok(file)
}

/// The description of a domain: the one that runs, or `inactive`, the one of its next start.
pub fn describe(domain: &str, inactive: bool) -> Result<String, String> {
    let mut arguments = vec!["dumpxml", "--domain", domain];
    if inactive {
        arguments.push("--inactive");
    }
    not_empty(run(&arguments, QUERY_TIMEOUT)?)
}

/// The description of a domain's next start with the secrets in it, which `virsh define` would lose otherwise.
pub fn describe_whole(domain: &str) -> Result<String, String> {
    not_empty(run(&["dumpxml", "--domain", domain, "--inactive", "--security-info"], QUERY_TIMEOUT)?)
}

/// Lets libvirt take this description for the domain's next start.
pub fn define(xml: &str) -> Result<(), String> {
    with_file(xml, |file| run(&["define", "--file", file], CHANGE_TIMEOUT)).map(drop)
}

fn not_empty(xml: String) -> Result<String, String> {
    match xml.trim().is_empty() {
        true => Err("virsh dumpxml succeeded and printed nothing: run it by hand".into()),
        false => Ok(xml),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libvirts_reason_is_one_line() {
        let text = "error: Failed to attach device from x.xml\nerror: internal error: no slot\n\n";
        assert_eq!(said(text), "libvirt: Failed to attach device from x.xml: internal error: no slot");
    }

    #[test]
    fn a_description_for_virsh_is_in_no_directory_and_another_process_can_read_it() {
        let read = |path: &str| {
            let target = std::fs::read_link(path).unwrap();
            assert!(target.to_string_lossy().starts_with("/memfd:"), "{target:?}");
            let cat = Command::new("cat").args([path, path]).output().unwrap();
            String::from_utf8(cat.stdout).map_err(|error| error.to_string())
        };
        assert_eq!(with_file("<domain/>", read), Ok("<domain/><domain/>".into()));
    }

    #[test]
    fn an_output_that_was_cut_and_an_empty_description_are_errors() {
        let cut = "x".repeat(usize::try_from(MAX_OUTPUT).unwrap());
        assert!(whole("dumpxml", cut).unwrap_err().contains("more than 4 MiB"));
        assert_eq!(whole("dumpxml", "<a/>".into()), Ok("<a/>".into()));
        assert!(not_empty("\n".into()).unwrap_err().contains("printed nothing"));
    }
}
