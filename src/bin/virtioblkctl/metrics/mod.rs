//! Metrics of this host's disks: `stats --openmetrics` prints them, `exporter` serves them to Prometheus.

mod families;
mod http;
mod text;

use std::net::{SocketAddr, TcpListener};
use std::sync::Mutex;

use clap::Args;
use virtioblkd::internal::base::logging;
use virtioblkd::internal::control::client::Failure;
use virtioblkd::internal::host::listing::{self, Directories, Listed};
use virtioblkd::internal::host::measure::measure;

use crate::chosen::Chosen;
use crate::print;
pub(crate) use text::Format;

#[derive(Args)]
pub(crate) struct Exporter {
    /// The address and port to listen on. Metrics name disks, images and domains: choose an address that only Prometheus
    /// reaches
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:9973")]
    listen: SocketAddr,
}

/// Prints the metrics of the chosen disk; without one, of all disks of this host.
pub(crate) fn print_page(chosen: &Chosen, format: Format) -> Result<(), Failure> {
    let named = chosen.several(&[])?;
    let all = find(&chosen.directories())?;
    let disks: Vec<Listed> = match (named.disks.as_slice(), &named.domain) {
        ([], None) => all,
        (named, _) => named.iter().map(|(name, control)| as_listed(name, control, &all)).collect(),
    };
    print(&page(disks, format))
}

/// The listed disk with this control socket. One that is not listed has the name that was given.
fn as_listed(name: &str, control: &std::path::Path, all: &[Listed]) -> Listed {
    let listed = all.iter().find(|disk| disk.control.as_deref() == Some(control));
    listed.cloned().unwrap_or_else(|| Listed {
        name: name.to_owned(),
        domain: None,
        target: None,
        control: Some(control.to_owned()),
        socket: None,
    })
}

fn find(directories: &Directories) -> Result<Vec<Listed>, Failure> {
    listing::find(directories).map_err(|error| Failure::new("list", format!("cannot list this host's disks: {error}")))
}

fn page(disks: Vec<Listed>, format: Format) -> String {
    let measured = measure(&disks);
    let rows: Vec<_> = disks.into_iter().zip(measured).collect();
    families::page(&rows, format)
}

/// Serves the metrics of all disks of this host, until the process is ended.
pub(crate) fn serve(options: &Exporter, chosen: &Chosen) -> Result<(), Failure> {
    let directories = chosen.directories();
    let failed = |error: &std::io::Error| {
        let advice = "choose another --listen ADDR:PORT, or end the program that uses this one";
        Failure::new("listen", format!("cannot listen on {}: {error}; {advice}", options.listen))
    };
    let listener = TcpListener::bind(options.listen).map_err(|error| failed(&error))?;
    let address = listener.local_addr().map_err(|error| failed(&error))?;
    logging::message(format_args!("metrics are served on http://{address}/metrics"));
    // One collection at a time bounds the threads that ask daemons, however many clients there are.
    let collecting = Mutex::new(());
    http::serve(&listener, &|format| {
        let _one = collecting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        find(&directories).map(|disks| page(disks, format)).map_err(|failure| failure.to_string())
    });
    Ok(())
}
