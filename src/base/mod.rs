//! What every other folder may use, and that uses none of them: hand-off between threads, system calls, signals, Unix
//! sockets, the pid file, the log, rate limits.
//!
//! | file | what |
//! |---|---|
//! | `sync` | a mutex, channels and an event notifier, with which threads hand work to each other |
//! | `syscalls` | system calls that no safe wrapper has (unsafe) |
//! | `signals` | signals as events that the main thread waits for |
//! | `systemd` | sd_notify(3) |
//! | `unix_listener` | a Unix socket that replaces a dead server's and refuses to replace a living one's |
//! | `pid_file` | the pid file and its lock |
//! | `logging` | the log on standard error |
//! | `rate_limit` | how often something may be logged |
//! | `text` | text of other programs, made safe for a terminal and a log |
//! | `publish` | gives a finished file its name, and replaces none |
//! | `wait` | one wait with a deadline for several descriptors |
//! | `trust` | refuses files that other users can change |
//! | `version` | the version, with the git revision |
//! | `units`, `figures` | times and sizes as people write them; sizes and counts as they read them |
//! | `prng` | pseudo-random numbers, for the RAM disk and for tests |

pub mod figures;
pub mod logging;
pub mod pid_file;
pub(crate) mod prng;
pub(crate) mod publish;
pub(crate) mod rate_limit;
pub mod signals;
pub(crate) mod sync;
pub(crate) mod syscalls;
pub(crate) mod systemd;
pub mod text;
pub(crate) mod trust;
pub mod units;
pub mod unix_listener;
pub mod version;
pub mod wait;
