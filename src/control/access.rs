//! PURE. Decides by a client's user which commands the client may use.
//!
//! Root and the daemon's own user may use all of them. Other users reach the socket only where the operator widened its
//! mode (`--control-mode`), and `--control-access` sets what they may do. They may never take the guest over, end the
//! daemon or shrink the guest's disk: the right to hold a disk still does not include that.

use std::fmt;
use std::str::FromStr;

use super::creds::Credentials;

/// The commands that a client may use. Each value includes those before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Queries and events.
    ReadOnly,
    /// Queries and events, and all commands that hold, copy, snapshot, continue or grow the disk.
    #[default]
    Operate,
    /// All commands, also `hand-over`, `query-command-line`, `quit`, `block_set_io_throttle`, `resize` with `force`, and `getfd` and `export-prepare`,
    /// for which the client passes descriptors.
    All,
}

/// The user that stands for every user which our user namespace does not map (/proc/sys/kernel/overflowuid; the kernel's
/// default). It may be any user, so it never counts as the daemon's user, even if the daemon runs as `nobody`.
const OVERFLOW_UID: u32 = 65534;

impl Access {
    /// Returns the access of a client. `daemon`: the daemon's effective user; `others`: the access of users other than
    /// root and that one.
    pub fn of(client: Credentials, daemon: u32, others: Access) -> Access {
        if is_trusted(client.uid, daemon) { Access::All } else { others.min(Access::Operate) }
    }
}

/// Whether `uid` is certainly root or `own`; the overflow user (`OVERFLOW_UID`) is not.
pub fn is_trusted(uid: u32, own: u32) -> bool {
    uid == 0 || (uid == own && uid != OVERFLOW_UID)
}

impl FromStr for Access {
    type Err = String;

    /// Parses a value of `--control-access`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "read-only" => Ok(Access::ReadOnly),
            "operate" => Ok(Access::Operate),
            _ => Err("use operate or read-only".into()),
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Access::ReadOnly => "read-only",
            Access::Operate => "operate",
            Access::All => "all",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_the_daemons_user_may_use_all_commands_and_others_never_may() {
        let cases = [
            (0, 0, Access::All),
            (0, 1000, Access::All),
            (1000, 1000, Access::All),
            (1001, 1000, Access::Operate),
            (1001, 0, Access::Operate),
            // A user of another user namespace; and the daemon's user where it cannot be told from one.
            (65534, 0, Access::Operate),
            (65534, 65534, Access::Operate),
        ];
        for (uid, daemon, access) in cases {
            let client = Credentials { pid: 1, uid };
            assert_eq!(Access::of(client, daemon, Access::Operate), access, "{uid} of {daemon}");
            assert_eq!(Access::of(client, daemon, Access::All), access, "{uid} of {daemon}");
            let least = if access == Access::All { Access::All } else { Access::ReadOnly };
            assert_eq!(Access::of(client, daemon, Access::ReadOnly), least, "{uid} of {daemon}");
        }
    }

    #[test]
    fn all_is_not_accepted_as_a_value_of_the_option() {
        for access in [Access::ReadOnly, Access::Operate] {
            assert_eq!(access.to_string().parse(), Ok(access));
        }
        assert!("all".parse::<Access>().is_err());
    }
}
