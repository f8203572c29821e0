//! The RBD back-end and the daemon on a real Ceph cluster (`make check-rbd`). All tests share one cluster
//! (`Cluster::shared`); a test that stops, fills or fences something starts its own.

mod abi;
mod attend;
mod backend;
mod export;
mod front_end;
mod guest;
mod modes;
mod pages;
mod quiesce;
mod snapshot;
mod story;
mod trouble;
mod upgrade;
