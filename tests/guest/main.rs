//! Real guests in QEMU on disks that the real programs serve (`make check-vm`). A test is a QEMU and a server, so they
//! run on as many threads as TEST_THREADS says.

mod agent;
mod firmware;
mod full_filesystem;
mod kill;
mod libvirt;
mod libvirt_domain;
mod libvirt_hook;
mod libvirt_killed;
mod libvirt_load;
mod libvirt_moves;
mod libvirt_storage;
mod libvirt_systemd;
mod life;
mod linux;
mod migration;
mod pages;
mod power;
mod power_cut;
mod replicas;
mod story;
mod upgrade;
