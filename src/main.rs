//! The `virtioblkd` daemon: parses the command line, starts the log, and runs the server.
//!
//! The exit status is 0 after an orderly end, 1 after a failure at run time, and 2 for a wrong command line or
//! configuration file.

use std::io::Write;
use std::process::ExitCode;

use virtioblkd::internal::base::logging;
use virtioblkd::internal::config::{Config, Invocation, RunCommand};
use virtioblkd::internal::server::{Server, run_command};

fn main() -> ExitCode {
    match Config::from_args(std::env::args_os()) {
        Ok(Invocation::Print(text)) => print(&text),
        Ok(Invocation::Run(config)) => run(&config),
        Ok(Invocation::Check(config)) => check(&config),
        Ok(Invocation::RunCommand(command)) => run_beside(&command),
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

/// Checks that the disk could be served, and prints the result.
fn check(config: &Config) -> ExitCode {
    logging::start(config.log_level);
    let status = match Server::check(config) {
        Ok(description) => print(&format!("{description}\n")),
        Err(error) => {
            log::error!("{error}");
            ExitCode::from(1)
        }
    };
    logging::finish();
    status
}

/// Serves the disk in another process while a command runs.
fn run_beside(command: &RunCommand) -> ExitCode {
    let status = run_command::run(command).unwrap_or_else(|error| {
        logging::message(error);
        1
    });
    logging::finish();
    ExitCode::from(status)
}

/// Prints a text. If not all of it can be written, the exit status reports that.
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
