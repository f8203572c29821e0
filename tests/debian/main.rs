//! The units and the package on a real Debian 12 or 13 under its own systemd (`make check-systemd`, `make check-deb`). Each
//! test boots a machine of its own with `scripts/debian-machine`. That needs root, systemd-nspawn and a package mirror; where
//! one of these is missing, the tests say SKIPPED.

mod machine;
mod package;
mod units;
