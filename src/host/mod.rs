//! The disks of this host's virtual machines: what libvirt's domain descriptions say of them, and the daemons that serve
//! them. Used by `virtioblkctl` only; knows the daemon by its options, its pid file and its readiness message.
//!
//! | file | what |
//! |---|---|
//! | `domain` | PURE. A domain's XML: its name, its UUID, its vhost-user disks, whether its memory is shared |
//! | `metadata` | PURE. Our element in the domain's `<metadata>`: a disk's options, in libvirt's words |
//! | `places` | where a disk's files are: configuration, pid file, log, sockets |
//! | `daemons` | starts and ends the daemon of a disk |
//! | `logs` | what a daemon's log says of a start that failed |
//! | `units` | daemons as units of systemd, where systemd runs |
//! | `edits` | PURE. Changes of XML that leave every other byte as it is |
//! | `check/` | what keeps a domain's disks from working, each with the fix. PURE, but for `facts` |
//! | `convert/` | PURE. A disk of QEMU's own becomes one of ours, and back |
//! | `listing` | finds this host's disks by name, and asks their daemons how they are |
//! | `measure` | asks the daemons of this host's disks for all their figures |
//! | `members` | the disks of one domain: libvirt's word and `listing` joined |
//! | `usage` | how much of the host's storage an image takes |
//! | `virsh` | asks libvirt through virsh, bounded in time. The hook never does |
//! | `connection` | refuses a libvirt of another host or user |
//! | `domain_lock`, `change` | one change of a running domain at a time, and of our element in its description |
//! | `redefine` | changes the description of a domain's next start, unless another program changed it meanwhile |
//! | `hotplug` | attaches and detaches a running domain's disks |
//! | `iotune` | changes the limits in a domain's description |
//! | `apply` | brings the metadata of a domain's next start to the daemons that run |
//! | `proxmox` | Proxmox VE's hookscript: the same for its VMs |
//! | `image_use` | whether another process uses a file image, asked in a process of its own |
//! | `hook` | libvirt's hook: starts a domain's disks before the domain and ends them after it |

pub mod apply;
mod change;
pub mod check;
pub mod connection;
pub mod convert;
mod daemons;
pub mod domain;
mod domain_lock;
mod edits;
pub mod hook;
pub mod hotplug;
pub mod image_use;
pub mod iotune;
pub mod listing;
mod logs;
pub mod measure;
pub mod members;
pub mod metadata;
pub mod places;
pub mod proxmox;
pub mod redefine;
mod units;
pub mod usage;
pub mod virsh;
