//! The `virtioblkd` daemon: parses the command line, starts the log, and runs the server.
//!
//! The exit status is 0 after an orderly end, 1 after a failure at run time, and 2 for a wrong command line or
//! configuration file.

use std::io::Write;

use virtioblkd::internal::base::logging;
use virtioblkd::internal::config::{Config, Invocation, RunCommand};
use virtioblkd::internal::server::{self, Server, run_command};

fn main() {
    let status = match Config::from_args(std::env::args_os()) {
        Ok(Invocation::Print(text)) => print(&text),
        Ok(Invocation::Run(config)) => run(&config),
        Ok(Invocation::Check(config)) => check(&config),
        Ok(Invocation::RunCommand(command)) => run_beside(&command),
        Err(error) => {
            logging::message_lines(format_args!("virtioblkd: {error}"));
            2
        }
    };
    server::exit(status);
}

fn run(config: &Config) -> u8 {
    logging::start(config.log_level);
    match Server::run(config) {
        Ok(()) => 0,
        Err(error) => {
            log::error!("{error}");
            1
        }
    }
}

/// Checks that the disk could be served, and prints the result.
fn check(config: &Config) -> u8 {
    logging::start(config.log_level);
    match Server::check(config) {
        Ok(description) => print(&format!("{description}\n")),
        Err(error) => {
            log::error!("{error}");
            1
        }
    }
}

/// Serves the disk in another process while a command runs.
fn run_beside(command: &RunCommand) -> u8 {
    run_command::run(command).unwrap_or_else(|error| {
        logging::message(error);
        1
    })
}

/// Prints a text. If not all of it can be written, the exit status reports that.
fn print(text: &str) -> u8 {
    let mut stdout = std::io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => 0,
        Err(error) => {
            logging::message_lines(format_args!("virtioblkd: cannot write to stdout: {error}"));
            1
        }
    }
}
