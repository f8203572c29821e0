//! The `virtioblkd` daemon: the command line, the log, the server, the exit status.
//!
//! Exit status: 0 well ended, 1 failed at run time, 2 wrong command line or file.

use std::io::Write;
use std::process::ExitCode;

use virtioblkd::internal::base::logging;
use virtioblkd::internal::config::{Config, Invocation};
use virtioblkd::internal::server::Server;

fn main() -> ExitCode {
    match Config::from_args(std::env::args_os()) {
        Ok(Invocation::Print(text)) => print(&text),
        Ok(Invocation::Run(config)) => run(&config),
        Err(error) => {
            logging::message_lines(format_args!("virtioblkd: {error}"));
            logging::finish();
            ExitCode::from(2)
        }
    }
}

fn run(config: &Config) -> ExitCode {
    logging::start(config.log_level);
    let status = match Server::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            ExitCode::from(1)
        }
    };
    logging::finish();
    status
}

/// Whoever reads the answer must learn when it is not whole.
fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::message_lines(format_args!("virtioblkd: cannot write to stdout: {error}"));
            logging::finish();
            ExitCode::from(1)
        }
    }
}
