//! Talks to a guest agent whose channel libvirt has, through virsh, which honours LIBVIRT_DEFAULT_URI and its own
//! configuration. libvirt synchronizes with the agent before each command.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::agent::{AgentChannel, AgentError, answer, request};
use super::child::{CommandEnd, output};
use super::wait::CancelFd;

/// How much longer virsh may take than the agent.
const VIRSH_MARGIN: Duration = Duration::from_secs(5);

/// The agent of a libvirt domain.
pub struct Domain {
    name: String,
}

impl Domain {
    /// Creates the channel to a domain's agent. `name`: the domain's name, id or UUID, as virsh accepts it.
    pub fn new(name: &str) -> Self {
        Domain { name: name.to_owned() }
    }
}

impl AgentChannel for Domain {
    fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        timeout: Duration,
        cancel: CancelFd<'_>,
    ) -> Result<Value, AgentError> {
        let who = format!("the guest agent of libvirt's domain '{}'", self.name);
        let request = request(command, arguments);
        let seconds = timeout.as_secs().max(1).to_string();
        let mut virsh = Command::new("virsh");
        virsh.args(["--quiet", "qemu-agent-command", "--timeout", &seconds, "--domain", &self.name]);
        // `failed` matches virsh's messages.
        virsh.arg(request.to_string()).env("LC_ALL", "C");
        let (ended, out, err) = output(virsh, Instant::now() + timeout + VIRSH_MARGIN, cancel).map_err(|error| {
            AgentError::Lost(format!("virsh cannot be run: {error}; --libvirt needs it (Debian: libvirt-clients)"))
        })?;
        match ended {
            CommandEnd::Status(status) if status.success() => answer(&who, command, out.trim().as_bytes()),
            CommandEnd::Status(_) => Err(failed(&who, command, err.trim())),
            CommandEnd::TimedOut => Err(AgentError::Silent(format!(
                "{who}: virsh does not end; see whether libvirtd works (systemctl status libvirtd)"
            ))),
            CommandEnd::Cancelled => Err(AgentError::Cancelled),
        }
    }
}

/// Classifies an error message of virsh.
fn failed(who: &str, command: &str, message: &str) -> AgentError {
    let message = message.trim_start_matches("error: ").replace('\n', "; ");
    let text = format!("{who}: {command}: {message}");
    if message.contains("unable to execute QEMU agent command") {
        AgentError::Refused(text)
    } else if message.contains("not responding")
        || message.contains("not available for now")
        || message.contains("timed out")
    {
        AgentError::Silent(format!("{text}. See that qemu-guest-agent runs in the guest, and that it is not paused"))
    } else {
        AgentError::Lost(format!("{text}{}", fix(&message)))
    }
}

/// Returns the fix for an error message of virsh with the punctuation before it, or nothing if none is known.
pub fn fix(message: &str) -> &'static str {
    const FIXES: [(&str, &str); 4] = [
        (
            "ailed to connect to the hypervisor",
            "; start libvirt's daemon (systemctl start libvirtd, or virtqemud), or name another one in LIBVIRT_DEFAULT_URI",
        ),
        ("failed to get domain", "; 'virsh list --all' shows the domains that libvirt has"),
        ("domain is not running", "; start it first"),
        (
            "guest agent is not configured",
            "; add the channel org.qemu.guest_agent.0 to the domain, and start qemu-guest-agent in the guest",
        ),
    ];
    FIXES.iter().find(|(part, _)| message.contains(part)).map_or("", |(_, fix)| fix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_libvirt_that_has_a_fix_names_it() {
        let refused = "error: failed to connect to the hypervisor\nerror: Failed to connect socket to '/run/x'";
        assert!(fix(refused).contains("systemctl start libvirtd") && fix(refused).contains("LIBVIRT_DEFAULT_URI"));
        assert!(
            fix("error: argument unsupported: QEMU guest agent is not configured").contains("org.qemu.guest_agent.0")
        );
        assert_eq!(fix("error: internal error"), "");
    }

    #[test]
    fn the_messages_of_virsh_are_classified() {
        let refused = "error: internal error: unable to execute QEMU agent command 'guest-fsfreeze-freeze': disabled";
        assert!(matches!(failed("it", "c", refused), AgentError::Refused(_)));
        let silent = "error: Guest agent is not responding: Guest agent not available for now";
        assert!(matches!(failed("it", "c", silent), AgentError::Silent(_)));
        let lost = "error: failed to get domain 'x'\nerror: Domain not found";
        let AgentError::Lost(text) = failed("it", "c", lost) else { panic!("not lost") };
        assert!(text.contains("Domain not found") && !text.contains('\n'), "{text}");
        assert!(text.contains("virsh list --all"), "{text}");
    }
}
