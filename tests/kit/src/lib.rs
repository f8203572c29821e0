//! What the tests and benchmarks share: back-ends and disks that do what a test tells them, front-ends, the real
//! programs, real guests, and a real Ceph cluster.
//!
//! From small to large:
//! - [`prng`]: numbers for randomized tests; [`unread`]: outputs that nobody reads; [`programs`]: where the programs are;
//!   [`log`]: what a program logs; [`wait`]: until something is so.
//! - [`backend`]: a queue of a back-end, used as a worker does; [`backend_contract`]: what holds for every back-end;
//!   [`rbd_stub`]: a librbd without a cluster; [`stall`]: media that stop answering.
//! - [`front_end`]: a front-end that sends whatever it is told; [`driver`]: a decent one; [`rig`]: a device in this
//!   process; [`front_end_suite`]: what holds for every kind of image.
//! - [`control`]: a fake disk behind the control socket; [`snapshot`]: disks and a fake guest agent; [`upgrade`]: a
//!   daemon that may be another process by now.
//! - [`guest`]: QEMU with a real guest; [`hook`]: what libvirt's hook started; [`ceph`]: a real cluster; [`documents`]: the
//!   commands of the pages.

pub mod backend;
pub mod backend_contract;
pub mod ceph;
pub mod control;
pub mod documents;
pub mod driver;
pub mod front_end;
pub mod front_end_suite;
pub mod guest;
pub mod hook;
pub mod log;
pub mod prng;
pub mod programs;
pub mod rbd_stub;
pub mod rig;
pub mod snapshot;
pub mod stall;
pub mod unread;
pub mod upgrade;
pub mod wait;

/// Whether a thread of this process may become another user. Where it may not, the test is skipped, and this says so.
pub fn can_become_another_user() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: only root can become another user");
    }
    root
}

/// Whether this process ignores SIGHUP, as below nohup(1). The programs that it starts then ignore it too, by their design.
/// Says so, because what SIGHUP does is then not tested.
pub fn ignores_sighup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("the kernel's own file");
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).expect("a mask of signals");
    let ignores = u64::from_str_radix(ignored.trim(), 16).expect("a mask in hexadecimal") & 1 != 0;
    if ignores {
        eprintln!("SKIPPED: SIGHUP, which this process was told to ignore (nohup)");
    }
    ignores
}
