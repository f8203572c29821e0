//! The system call filter (seccomp(2)): what the daemon uses, and nothing that starts a program, reaches another
//! process or asks for more rights. Found by tracing every test that runs the daemon, and completed with what the C
//! library, Rust's and librados may use instead on other machines.
//!
//! One set for all threads: they share their memory, so an intruder who controls one controls what the others do. The
//! kernel caches the answer of each call that is allowed whatever its arguments (Linux 5.11), so those cost nothing.
//!
//! Operations of io_uring pass no such filter, and half of them escape the rules on paths, too (sockets, attributes).
//! So the io_urings are restricted to reads, writes and syncs when they are made, all of them before the filter, and
//! io_uring_setup(2) is stopped: `backend/uring/prepared.rs`. Sockets are not made either: what the daemon speaks to it
//! is connected to already, or it comes from accept(2). An image that is reached over a network makes Internet sockets.

use std::collections::BTreeMap;

use libc::{c_int, c_long};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};

use super::permissions::ImageNeeds;

macro_rules! calls {
    ($($name:ident)*) => { [$((libc::$name, stringify!($name))),*] };
}

/// Allowed with any arguments.
const ALLOWED: &[(c_long, &str)] = &calls! {
    // Data.
    SYS_read SYS_write SYS_readv SYS_writev SYS_pread64 SYS_pwrite64 SYS_preadv SYS_pwritev SYS_preadv2 SYS_pwritev2
    SYS_lseek SYS_fsync SYS_fdatasync SYS_fallocate SYS_ftruncate SYS_fadvise64 SYS_copy_file_range
    // Files: which ones is for the rules on paths to say.
    SYS_openat SYS_close SYS_close_range SYS_dup SYS_dup3 SYS_flock SYS_fstat SYS_newfstatat SYS_statx SYS_statfs
    SYS_fstatfs SYS_readlinkat SYS_faccessat SYS_faccessat2 SYS_getdents64 SYS_unlinkat SYS_linkat
    SYS_renameat2 SYS_getcwd SYS_umask SYS_memfd_create
    // Waiting and waking.
    SYS_ppoll SYS_pselect6 SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_eventfd2 SYS_signalfd4 SYS_timerfd_create
    SYS_timerfd_settime SYS_timerfd_gettime SYS_pipe2 SYS_futex SYS_nanosleep SYS_clock_nanosleep SYS_sched_yield
    SYS_restart_syscall
    // Sockets that are there already, and their clients.
    SYS_accept4 SYS_accept SYS_recvfrom SYS_sendmsg SYS_recvmsg SYS_shutdown SYS_getsockopt SYS_setsockopt
    SYS_getsockname SYS_getpeername
    // Memory.
    SYS_brk SYS_munmap SYS_mremap SYS_madvise SYS_mlock SYS_munlock SYS_membarrier SYS_mincore
    // Threads, and what they ask about themselves. Whether clone makes one is checked below; clone3 is refused.
    SYS_clone3 SYS_set_robust_list SYS_set_tid_address SYS_rseq SYS_exit SYS_exit_group SYS_gettid SYS_getpid SYS_getppid
    SYS_getuid SYS_geteuid SYS_getgid SYS_getegid SYS_getrusage SYS_times SYS_uname SYS_sysinfo SYS_getrandom SYS_getcpu
    SYS_getpriority SYS_sched_getaffinity SYS_sched_getparam SYS_sched_getscheduler
    SYS_sched_get_priority_max SYS_sched_get_priority_min SYS_clock_gettime SYS_clock_getres SYS_gettimeofday
    SYS_get_mempolicy
    // Signals to ourselves, as abort(3) sends them.
    SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sigaltstack
};

/// Older forms, which new architectures do not have.
#[cfg(target_arch = "x86_64")]
const OLDER: &[(c_long, &str)] = &calls! {
    SYS_open SYS_stat SYS_lstat SYS_access SYS_readlink SYS_unlink SYS_rename SYS_link SYS_dup2 SYS_poll SYS_select
    SYS_epoll_create SYS_epoll_wait SYS_eventfd SYS_pipe SYS_time SYS_renameat SYS_sync_file_range SYS_getrlimit SYS_arch_prctl
};
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[(c_long, &str)] = &[];

/// Allowed in addition when io_urings were made before.
const URING: &[(c_long, &str)] = &calls! { SYS_io_uring_enter SYS_io_uring_register };

/// Allowed in addition for a client of a storage cluster, which connects again when a connection breaks.
const NETWORK: &[(c_long, &str)] = &calls! {
    SYS_socketpair SYS_connect SYS_bind SYS_listen SYS_sendto SYS_sendmmsg SYS_recvmmsg SYS_sched_setaffinity
    SYS_sched_setscheduler SYS_setpriority SYS_fchmod SYS_fchmodat
};

/// What an intruder would try; the list is only for the log. Every call that is in none of the lists is stopped, too.
const NAMED_ONLY: &[(c_long, &str)] = &calls! {
    SYS_execve SYS_execveat SYS_clone SYS_ptrace SYS_process_vm_readv SYS_process_vm_writev SYS_kill SYS_tkill SYS_tgkill
    SYS_socket SYS_socketpair SYS_connect SYS_bind SYS_listen SYS_sendto SYS_io_uring_setup SYS_fcntl
    SYS_sched_setaffinity SYS_setxattr SYS_getxattr SYS_mmap SYS_mprotect SYS_ioctl SYS_prctl SYS_prlimit64 SYS_setuid SYS_setgid
    SYS_setresuid SYS_setresgid SYS_setgroups SYS_capset SYS_mount SYS_umount2 SYS_pivot_root SYS_chroot SYS_unshare
    SYS_setns SYS_bpf SYS_perf_event_open SYS_userfaultfd SYS_init_module SYS_finit_module SYS_kexec_load SYS_reboot
    SYS_keyctl SYS_add_key SYS_open_by_handle_at SYS_name_to_handle_at SYS_mknodat SYS_mkdirat SYS_symlinkat SYS_fchmodat
    SYS_fchownat SYS_fchmod SYS_fchown SYS_pidfd_open SYS_pidfd_getfd SYS_seccomp SYS_personality SYS_swapon SYS_chdir
    SYS_sethostname SYS_settimeofday SYS_shmget SYS_shmat SYS_msgget SYS_semget SYS_memfd_secret
};

#[cfg(target_arch = "x86_64")]
const NAMED_ONLY_OLDER: &[(c_long, &str)] = &calls! {
    SYS_fork SYS_vfork SYS_creat SYS_chmod SYS_chown SYS_mkdir SYS_rmdir SYS_mknod SYS_symlink SYS_setrlimit SYS_iopl
    SYS_ioperm SYS_modify_ldt
};
#[cfg(not(target_arch = "x86_64"))]
const NAMED_ONLY_OLDER: &[(c_long, &str)] = &[];

/// `linux/fs.h` and its kin: what the daemon asks of files, devices and sockets. All but the first change nothing.
const IOCTLS: [u64; 14] = [
    0x1277,      // BLKDISCARD
    0x1268,      // BLKSSZGET
    0x127b,      // BLKPBSZGET
    0x1278,      // BLKIOMIN
    0x1279,      // BLKIOOPT
    0x127a,      // BLKALIGNOFF
    0x127c,      // BLKDISCARDZEROES
    0x125e,      // BLKROGET
    0x8008_1272, // BLKGETSIZE64
    0x5421,      // FIONBIO
    0x541b,      // FIONREAD
    0x5450,      // FIONCLEX
    0x5451,      // FIOCLEX
    0x5401,      // TCGETS
];

/// What the daemon does with descriptors: their flags, duplicates, locks and seals. The others (F_SETOWN, F_SETSIG,
/// F_NOTIFY, F_SETLEASE) have the kernel send signals, to any process of the same user.
const FCNTLS: [c_int; 13] = [
    libc::F_DUPFD,
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_GETLK,
    libc::F_SETLK,
    libc::F_OFD_GETLK,
    libc::F_OFD_SETLK,
    libc::F_OFD_SETLKW,
    libc::F_ADD_SEALS,
    libc::F_GET_SEALS,
];

/// PR_SET_VMA, by which the C library names its memory: of linux/prctl.h.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// SOCK_TYPE_MASK of linux/net.h: the bits of a socket's type that are no flags.
const SOCK_TYPE_MASK: u64 = 0xf;

/// Why the filter could not be installed.
#[derive(Debug)]
pub enum FilterError {
    /// The filter cannot be compiled: there is none for this architecture.
    Compile(BackendError),
    /// The kernel refused it.
    Install(seccompiler::Error),
}

impl std::fmt::Display for FilterError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FilterError::Compile(error) => error.fmt(f),
            FilterError::Install(error) => error.fmt(f),
        }
    }
}

impl From<BackendError> for FilterError {
    fn from(error: BackendError) -> Self {
        FilterError::Compile(error)
    }
}

/// Installs the filter in every thread. Whatever is stopped raises SIGSYS.
pub(super) fn install(needs: ImageNeeds) -> Result<(), FilterError> {
    // The strict one is last: it allows no other.
    for program in compile(needs)? {
        apply_filter_all_threads(&program).map_err(FilterError::Install)?;
    }
    Ok(())
}

/// Programs of which the kernel takes the hardest answer. The first ones refuse with an error what the libraries do
/// without, the last stops what has no such way.
fn compile(needs: ImageNeeds) -> Result<Vec<BpfProgram>, BackendError> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let refusing = |rules, errno| {
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno as u32), architecture)?.try_into()
    };
    // Its arguments lie in memory, where no filter looks. The C library then uses clone.
    let mut programs = vec![refusing(BTreeMap::from([(libc::SYS_clone3, Vec::new())]), libc::ENOSYS)?];
    if needs.network {
        programs.push(refusing(forbidden()?, libc::EPERM)?);
    }
    let strict = SeccompFilter::new(allowed(needs)?, SeccompAction::Trap, SeccompAction::Allow, architecture)?;
    programs.push(strict.try_into()?);
    Ok(programs)
}

/// What a cluster's client tries, and lives without: Unix sockets (the log of the system, a name service), to be
/// called, modes of files, and the processors and ranks of threads by their number, which may be another process's.
fn forbidden() -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let others = |argument| -> Result<Vec<SeccompRule>, BackendError> {
        let other = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, 0)?;
        Ok(vec![SeccompRule::new(vec![other])?])
    };
    Ok(BTreeMap::from([
        (libc::SYS_socket, one_of(0, &[libc::AF_UNIX as u64], None)?),
        (libc::SYS_socketpair, datagrams()?),
        (libc::SYS_sched_setaffinity, others(0)?),
        (libc::SYS_sched_setscheduler, others(0)?),
        (libc::SYS_setpriority, others(1)?),
        (libc::SYS_listen, Vec::new()),
        // No rule on paths knows them.
        (libc::SYS_fchmod, Vec::new()),
        (libc::SYS_fchmodat, Vec::new()),
    ]))
}

fn allowed(needs: ImageNeeds) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let network: &[(c_long, &str)] = if needs.network { NETWORK } else { &[] };
    let uring: &[(c_long, &str)] = if needs.io_uring { URING } else { &[] };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        [ALLOWED, OLDER, network, uring].concat().into_iter().map(|(number, _)| (number, Vec::new())).collect();
    let pid = u64::from(std::process::id());
    let executable = libc::PROT_EXEC as u64;
    let thread = libc::CLONE_THREAD as u64;
    let conditional = [
        // A new process is what an intruder would want.
        (libc::SYS_clone, one_of(0, &[thread], Some(thread))?),
        (libc::SYS_tgkill, one_of(0, &[pid], None)?),
        // Only for this process.
        (libc::SYS_prlimit64, one_of(0, &[0, pid], None)?),
        (libc::SYS_fcntl, one_of(1, &FCNTLS.map(|command| command as u64), None)?),
        (libc::SYS_ioctl, one_of(1, &IOCTLS, None)?),
        (libc::SYS_prctl, one_of(0, &[libc::PR_SET_NAME as u64, libc::PR_GET_NAME as u64, PR_SET_VMA], None)?),
        // No new code. A cluster's client loads parts of itself when they are first used.
        (libc::SYS_mmap, if needs.network { Vec::new() } else { one_of(2, &[0], Some(executable))? }),
        (libc::SYS_mprotect, if needs.network { Vec::new() } else { one_of(2, &[0], Some(executable))? }),
    ];
    rules.extend(conditional);
    if needs.network {
        rules.insert(libc::SYS_socket, internet_sockets()?);
    } else {
        rules.insert(libc::SYS_sendto, without_address()?);
        // A pair leads nowhere else. Datagram sockets would, to any Unix socket by its path.
        rules.insert(libc::SYS_socketpair, one_of(1, &[libc::SOCK_STREAM as u64], Some(SOCK_TYPE_MASK))?);
    }
    Ok(rules)
}

/// socket(2) of a cluster's client. Unix sockets are refused with an error, see [`forbidden`]. Of netlink only
/// NETLINK_ROUTE, by which the C library lists the host's addresses.
fn internet_sockets() -> Result<Vec<SeccompRule>, BackendError> {
    let mut rules = one_of(0, &[libc::AF_INET, libc::AF_INET6, libc::AF_UNIX].map(|domain| domain as u64), None)?;
    let netlink = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, libc::AF_NETLINK as u64)?;
    let route = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, libc::NETLINK_ROUTE as u64)?;
    rules.push(SeccompRule::new(vec![netlink, route])?);
    Ok(rules)
}

/// sendto(2) that names no receiver (send(2)).
fn without_address() -> Result<Vec<SeccompRule>, BackendError> {
    let none = SeccompCondition::new(4, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    Ok(vec![SeccompRule::new(vec![none])?])
}

/// socketpair(2) of datagram sockets, which send to any Unix socket by its path.
fn datagrams() -> Result<Vec<SeccompRule>, BackendError> {
    one_of(1, &[libc::SOCK_DGRAM as u64, libc::SOCK_RAW as u64], Some(SOCK_TYPE_MASK))
}

/// A rule for each value that an argument may have, all of its bits or those of `mask`. Arguments are compared in their
/// lower 32 bits, which is what the kernel looks at in all of these.
fn one_of(argument: u8, values: &[u64], mask: Option<u64>) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |&value: &u64| {
        let how = mask.map_or(SeccompCmpOp::Eq, SeccompCmpOp::MaskedEq);
        SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, value)?])
    };
    values.iter().map(rule).collect()
}

/// A system call's name, if it is one of those that an intruder would try. Called in a signal's handler: only looks.
pub(super) fn name(number: c_long) -> Option<&'static str> {
    let found = [NAMED_ONLY, NAMED_ONLY_OLDER, ALLOWED, OLDER, NETWORK, URING]
        .into_iter()
        .flatten()
        .find(|(known, _)| *known == number);
    found.map(|(_, name)| &name["SYS_".len()..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_filters_compile_for_each_kind_of_image() {
        for (network, io_uring) in [(false, true), (true, false), (false, false)] {
            let programs = compile(ImageNeeds { network, io_uring }).unwrap();
            let strict = programs.last().unwrap();
            assert!(programs.len() == if network { 3 } else { 2 } && strict.len() > 100);
            // The kernel's limit on instructions (BPF_MAXINSNS).
            assert!(strict.len() <= 4096, "{}", strict.len());
        }
    }

    #[test]
    fn no_call_of_an_intruder_is_allowed_with_any_arguments() {
        let rules = allowed(ImageNeeds::default()).unwrap();
        for (number, name) in NAMED_ONLY.iter().chain(NAMED_ONLY_OLDER) {
            assert!(rules.get(number).is_none_or(|rules| !rules.is_empty()), "{name}");
        }
    }

    #[test]
    fn the_name_of_a_stopped_call_is_found() {
        assert_eq!(name(libc::SYS_execve), Some("execve"));
        assert_eq!(name(libc::SYS_read), Some("read"));
        assert_eq!(name(100_000), None);
    }
}
