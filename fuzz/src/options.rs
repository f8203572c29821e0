//! Fuzzes the command line and the configuration file.

use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;

use virtioblkd::internal::config::{Config, Invocation};

/// Runs one input. The first byte chooses: arguments that are separated by zero bytes, or the text of a configuration file.
pub fn run(data: &[u8]) {
    let [choice, text @ ..] = data else { return };
    let program = OsString::from("virtioblkd");
    let made = if choice % 2 == 0 {
        let arguments = text.split(|byte| *byte == 0).map(|word| OsString::from_vec(word.to_vec()));
        // --config would read a file, whose text is not part of this input.
        let arguments = arguments.filter(|word| !word.as_encoded_bytes().starts_with(b"--c"));
        Config::from_args(std::iter::once(program).chain(arguments))
    } else {
        let file = rustix::fs::memfd_create("disk.toml", rustix::fs::MemfdFlags::CLOEXEC).expect("a file");
        rustix::io::write(&file, text).expect("room");
        let path = format!("--config=/proc/self/fd/{}", file.as_raw_fd());
        Config::from_args([program, path.into()])
    };
    match made {
        Ok(Invocation::Run(config) | Invocation::Check(config)) => {
            assert!((1..=256).contains(&config.num_queues));
            assert!(config.queue_size.is_power_of_two() && config.queue_size >= 2);
            assert!(config.serial.len() <= 20 && config.serial.is_ascii());
            assert!(config.logical_block_size.is_none_or(|size| size == 512 || size == 4096));
        }
        Ok(Invocation::RunCommand(run)) => assert!(!run.arguments.iter().any(|word| word == "--run")),
        Ok(Invocation::Print(text)) => assert!(!text.is_empty()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
