//! The filter of system calls (seccomp(2)). It permits the calls that the daemon uses, and none that starts a program,
//! reaches another process or requests more rights. The lists come from a trace of every test that runs the daemon, and
//! have in addition the calls that the C library, Rust's library and librados may use instead on other machines.
//!
//! All threads have the same filter: they share their memory, so an intruder who controls one controls the others, too.
//! The kernel caches the result for each call that is allowed with any arguments (Linux 5.11), so those cost nothing.
//!
//! Operations of io_uring do not pass the filter, and half of them escape the rules on paths, too (sockets,
//! attributes). The io_urings are therefore restricted to reads, writes and syncs when they are created, all before the
//! filter, and io_uring_setup(2) is stopped: `backend/uring/prepared.rs`. Sockets cannot be created either: the daemon
//! is connected already, or gets connections from accept(2). Only for an image that is reached over a network, Internet
//! sockets can.

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

/// The calls that are allowed with any arguments.
const ALLOWED: &[(c_long, &str)] = &calls! {
    // Data.
    SYS_read SYS_write SYS_readv SYS_writev SYS_pread64 SYS_pwrite64 SYS_preadv SYS_pwritev SYS_preadv2 SYS_pwritev2
    SYS_lseek SYS_fsync SYS_fdatasync SYS_fallocate SYS_ftruncate SYS_fadvise64 SYS_copy_file_range
    // Files. The rules on paths decide which ones.
    SYS_openat SYS_close SYS_close_range SYS_dup SYS_dup3 SYS_flock SYS_fstat SYS_newfstatat SYS_statx SYS_statfs
    SYS_fstatfs SYS_readlinkat SYS_faccessat SYS_faccessat2 SYS_getdents64 SYS_unlinkat SYS_linkat
    SYS_renameat2 SYS_getcwd SYS_umask SYS_memfd_create
    // Waiting and waking.
    SYS_ppoll SYS_pselect6 SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_eventfd2 SYS_signalfd4 SYS_timerfd_create
    SYS_timerfd_settime SYS_timerfd_gettime SYS_pipe2 SYS_futex SYS_nanosleep SYS_clock_nanosleep SYS_sched_yield
    SYS_restart_syscall
    // Sockets that exist already, and the connections of their clients.
    SYS_accept4 SYS_accept SYS_recvfrom SYS_sendmsg SYS_recvmsg SYS_shutdown SYS_getsockopt SYS_setsockopt
    SYS_getsockname SYS_getpeername
    // Memory.
    SYS_brk SYS_munmap SYS_mremap SYS_madvise SYS_mlock SYS_munlock SYS_membarrier SYS_mincore
    // Threads, and queries about them. Below, clone is restricted to threads, and clone3 is refused.
    SYS_clone3 SYS_set_robust_list SYS_set_tid_address SYS_rseq SYS_exit SYS_exit_group SYS_gettid SYS_getpid SYS_getppid
    SYS_getuid SYS_geteuid SYS_getgid SYS_getegid SYS_getrusage SYS_times SYS_uname SYS_sysinfo SYS_getrandom SYS_getcpu
    SYS_getpriority SYS_sched_getaffinity SYS_sched_getparam SYS_sched_getscheduler
    SYS_sched_get_priority_max SYS_sched_get_priority_min SYS_clock_gettime SYS_clock_getres SYS_gettimeofday
    SYS_get_mempolicy
    // Signals to ourselves, as abort(3) sends them.
    SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sigaltstack
};

/// The older forms of these calls, which new architectures do not have.
#[cfg(target_arch = "x86_64")]
const OLDER: &[(c_long, &str)] = &calls! {
    SYS_open SYS_stat SYS_lstat SYS_access SYS_readlink SYS_unlink SYS_rename SYS_link SYS_dup2 SYS_poll SYS_select
    SYS_epoll_create SYS_epoll_wait SYS_eventfd SYS_pipe SYS_time SYS_renameat SYS_sync_file_range SYS_getrlimit SYS_arch_prctl
};
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[(c_long, &str)] = &[];

/// The calls that are allowed in addition if io_urings were created before.
const URING: &[(c_long, &str)] = &calls! { SYS_io_uring_enter SYS_io_uring_register };

/// The calls that are allowed in addition for a client of a storage cluster, which reconnects when a connection breaks.
const NETWORK: &[(c_long, &str)] = &calls! {
    SYS_socketpair SYS_connect SYS_bind SYS_listen SYS_sendto SYS_sendmmsg SYS_recvmmsg SYS_sched_setaffinity
    SYS_sched_setscheduler SYS_setpriority SYS_fchmod SYS_fchmodat
};

/// Calls that are stopped and that an intruder would try. The list only provides their names for the log; every call
/// that is in no list is stopped, too.
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

/// The ioctl(2) commands that the daemon uses for files, devices and sockets (`linux/fs.h` and others). All but the
/// first change nothing.
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

/// The fcntl(2) commands that the daemon uses, for flags, duplicates, locks and seals. The others (F_SETOWN, F_SETSIG,
/// F_NOTIFY, F_SETLEASE) make the kernel send signals, to any process of the same user.
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

/// PR_SET_VMA of linux/prctl.h, with which the C library names its memory.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// SOCK_TYPE_MASK of linux/net.h: the bits of a socket's type that are no flags.
const SOCK_TYPE_MASK: u64 = 0xf;

/// Why the filter could not be installed.
#[derive(Debug)]
pub enum FilterError {
    /// The filter cannot be compiled: there is none for this architecture.
    Compile(BackendError),
    /// The kernel refused the filter.
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

/// Installs the filter in every thread. A call that it stops raises SIGSYS.
pub(super) fn install(needs: ImageNeeds) -> Result<(), FilterError> {
    // The strict program is last, because it forbids to install another one.
    for program in compile(needs)? {
        apply_filter_all_threads(&program).map_err(FilterError::Install)?;
    }
    Ok(())
}

/// Compiles the programs of the filter; the kernel applies the strictest result of them. The first ones make calls fail
/// that the libraries can do without. The last one stops all other calls that are not allowed.
fn compile(needs: ImageNeeds) -> Result<Vec<BpfProgram>, BackendError> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let refusing = |rules, errno| {
        SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno as u32), architecture)?.try_into()
    };
    // A filter cannot check the arguments of clone3, because they lie in memory. The C library then uses clone.
    let mut programs = vec![refusing(BTreeMap::from([(libc::SYS_clone3, Vec::new())]), libc::ENOSYS)?];
    if needs.network {
        programs.push(refusing(forbidden()?, libc::EPERM)?);
    }
    let strict = SeccompFilter::new(allowed(needs)?, SeccompAction::Trap, SeccompAction::Allow, architecture)?;
    programs.push(strict.try_into()?);
    Ok(programs)
}

/// The calls that a cluster's client tries and can do without: Unix sockets (the system log, a name service),
/// listening, modes of files, and the processors and priorities of threads by their number, which may be another
/// process's.
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
        // The rules on paths do not cover these.
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
        // Only threads: an intruder would start a process.
        (libc::SYS_clone, one_of(0, &[thread], Some(thread))?),
        (libc::SYS_tgkill, one_of(0, &[pid], None)?),
        // The limits of this process only.
        (libc::SYS_prlimit64, one_of(0, &[0, pid], None)?),
        (libc::SYS_fcntl, one_of(1, &FCNTLS.map(|command| command as u64), None)?),
        (libc::SYS_ioctl, one_of(1, &IOCTLS, None)?),
        (libc::SYS_prctl, one_of(0, &[libc::PR_SET_NAME as u64, libc::PR_GET_NAME as u64, PR_SET_VMA], None)?),
        // No executable memory, except for a cluster's client, which loads parts of itself when they are first used.
        (libc::SYS_mmap, if needs.network { Vec::new() } else { one_of(2, &[0], Some(executable))? }),
        (libc::SYS_mprotect, if needs.network { Vec::new() } else { one_of(2, &[0], Some(executable))? }),
    ];
    rules.extend(conditional);
    if needs.network {
        rules.insert(libc::SYS_socket, internet_sockets()?);
    } else {
        rules.insert(libc::SYS_sendto, without_address()?);
        // A pair of stream sockets reaches no other socket. A datagram socket reaches any Unix socket by its path.
        rules.insert(libc::SYS_socketpair, one_of(1, &[libc::SOCK_STREAM as u64], Some(SOCK_TYPE_MASK))?);
    }
    Ok(rules)
}

/// The rules for socket(2) of a cluster's client: Internet sockets, and of netlink NETLINK_ROUTE, with which the C
/// library lists the host's addresses. Unix sockets pass here, and [`forbidden`] refuses them with an error.
fn internet_sockets() -> Result<Vec<SeccompRule>, BackendError> {
    let mut rules = one_of(0, &[libc::AF_INET, libc::AF_INET6, libc::AF_UNIX].map(|domain| domain as u64), None)?;
    let netlink = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, libc::AF_NETLINK as u64)?;
    let route = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, libc::NETLINK_ROUTE as u64)?;
    rules.push(SeccompRule::new(vec![netlink, route])?);
    Ok(rules)
}

/// The rule for sendto(2) without a receiver's address, which is send(2).
fn without_address() -> Result<Vec<SeccompRule>, BackendError> {
    let none = SeccompCondition::new(4, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    Ok(vec![SeccompRule::new(vec![none])?])
}

/// The rules for socketpair(2) of datagram sockets, which can send to any Unix socket by its path.
fn datagrams() -> Result<Vec<SeccompRule>, BackendError> {
    one_of(1, &[libc::SOCK_DGRAM as u64, libc::SOCK_RAW as u64], Some(SOCK_TYPE_MASK))
}

/// Makes a rule for each value that an argument may have; with `mask` only these bits are compared. The lower 32 bits
/// of the argument are compared, because the kernel uses only these in all such calls.
fn one_of(argument: u8, values: &[u64], mask: Option<u64>) -> Result<Vec<SeccompRule>, BackendError> {
    let rule = |&value: &u64| {
        let how = mask.map_or(SeccompCmpOp::Eq, SeccompCmpOp::MaskedEq);
        SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, value)?])
    };
    values.iter().map(rule).collect()
}

/// Returns a system call's name, if it is in one of the lists. Called in a signal handler, so it only reads.
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
