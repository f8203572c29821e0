//! What holds for back-ends: the contract, files and block devices, librbd without a cluster, copies, stable writes. In
//! this process, without the daemon.

mod contract;
mod copy;
mod file;
mod rbd_lock;
mod rbd_quiesce;
mod rbd_stub;
mod stable_writes;
