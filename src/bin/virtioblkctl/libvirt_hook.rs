//! `virtioblkctl libvirt-hook`: libvirt calls it before a domain starts and after it has ended.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use virtioblkd::internal::base::logging;
use virtioblkd::internal::host::hook::{self, Call, Host};
use virtioblkd::internal::host::image_use;

/// The arguments that libvirt passes to its hooks (docs/hooks.rst).
#[derive(Args)]
pub(crate) struct LibvirtHook {
    /// The domain's name
    domain: String,
    /// prepare, release, migrate, restore, reconnect; others do nothing
    operation: String,
    /// begin or end
    sub_operation: String,
    /// The reason for the end of a domain, or `-`
    extra: Option<String>,
}

/// Returns the program's arguments. If the program's name ends in `virtioblkd`, as that of its link in
/// /etc/libvirt/hooks/qemu.d does, it is libvirt's hook: libvirt passes no subcommand, so this inserts `libvirt-hook`. If it
/// ends in `virtioblkd-proxmox`, it is Proxmox VE's hookscript.
pub(crate) fn arguments() -> Vec<OsString> {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    let name = arguments.first().and_then(|name| Path::new(name).file_name()).unwrap_or_default();
    if name.as_encoded_bytes().ends_with(b"virtioblkd") {
        arguments.insert(1, "libvirt-hook".into());
    } else if name.as_encoded_bytes().ends_with(b"virtioblkd-proxmox") {
        arguments.insert(1, "proxmox-hook".into());
    }
    arguments
}

pub(crate) fn run(options: &LibvirtHook) -> ExitCode {
    let call = Call {
        operation: options.operation.clone(),
        sub_operation: options.sub_operation.clone(),
        reason: options.extra.clone().unwrap_or_default(),
    };
    let result = Host::of_this_user().and_then(|host| hook::run(&call, &host, io::stdin().lock(), io::stdout().lock()));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::message(error);
            // libvirt kills a running guest whose hook fails at `reconnect`.
            if options.operation == "reconnect" { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
    }
}

/// The arguments that the hook passes to the process that asks for an image's locks.
#[derive(Args)]
pub(crate) struct ImageUse {
    /// The disk only reads
    #[arg(long)]
    read_only: bool,
    /// The image
    image: PathBuf,
}

pub(crate) fn check_image_use(options: &ImageUse) -> ExitCode {
    match image_use::check_here(&options.image, options.read_only) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::message(error);
            ExitCode::FAILURE
        }
    }
}
