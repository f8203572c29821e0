//! The hidden subcommand `pages`: writes the manual pages and the completions of shells, for `make install`. Options come from
//! the definitions of the command lines; what no definition has (examples, notes, files) is in `docs/man`, in Markdown.

mod roff;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Command, CommandFactory};
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;
use virtioblkd::internal::base::logging;
use virtioblkd::internal::base::version::VERSION;
use virtioblkd::internal::config;
use virtioblkd::internal::control::client::Failure;

use crate::cli::{self, Cli};

#[derive(Args)]
pub(crate) struct Pages {
    /// Where to write man/ and completions/
    #[arg(value_name = "DIRECTORY")]
    directory: PathBuf,
    /// The directory docs of the sources
    #[arg(long, value_name = "DIR", default_value = "docs")]
    docs: PathBuf,
}

pub(crate) fn run(options: &Pages) -> Result<(), Failure> {
    write(options).map_err(|error| Failure::new("pages", format!("cannot write the manual pages: {error}")))
}

fn write(options: &Pages) -> io::Result<()> {
    let (man, completions) = (options.directory.join("man"), options.directory.join("completions"));
    for section in ["man1", "man5", "man7"] {
        fs::create_dir_all(man.join(section))?;
    }
    let daemon = built(config::command(), "virtioblkd");
    let ctl = built(cli::command(), "virtioblkctl");
    // A shell completes the options of every command, which the commands' help does not repeat.
    let completed = built(Cli::command(), "virtioblkctl");
    write_command(&daemon, "virtioblkd", options)?;
    write_commands(&ctl, "virtioblkctl", options)?;
    let keys = roff::title("VIRTIOBLKD.TOML", "5")
        + &roff::markdown(&fs::read_to_string(options.docs.join("man/virtioblkd.toml.md"))?);
    fs::write(man.join("man5/virtioblkd.toml.5"), keys.replace("@KEYS@\n", &list_keys(&daemon)))?;
    let protocol = roff::title("VIRTIOBLKD-CONTROL", "7")
        + ".SH NAME\nvirtioblkd\\-control \\- the protocol of virtioblkd's control socket\n.SH DESCRIPTION\n"
        + &roff::markdown(&fs::read_to_string(options.docs.join("control-protocol.md"))?);
    fs::write(man.join("man7/virtioblkd-control.7"), protocol)?;
    for (shell, name) in [(Shell::Bash, "bash"), (Shell::Zsh, "zsh"), (Shell::Fish, "fish")] {
        let directory = completions.join(name);
        fs::create_dir_all(&directory)?;
        generate_to(shell, &mut daemon.clone(), "virtioblkd", &directory)?;
        generate_to(shell, &mut completed.clone(), "virtioblkctl", &directory)?;
    }
    Ok(())
}

/// The command with the names of its subcommands (`virtioblkctl-status`) set.
fn built(command: Command, name: &'static str) -> Command {
    let mut command = command.name(name).disable_help_subcommand(true);
    command.build();
    command
}

/// Writes a page for the command and each of its subcommands, at any depth.
fn write_commands(command: &Command, name: &str, options: &Pages) -> io::Result<()> {
    write_command(command, name, options)?;
    for subcommand in command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()) {
        write_commands(subcommand, &format!("{name}-{}", subcommand.get_name()), options)?;
    }
    Ok(())
}

fn write_command(command: &Command, name: &str, options: &Pages) -> io::Result<()> {
    let page = Man::new(command.clone());
    let mut text = Vec::new();
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    let mut text = String::from_utf8(text).map_err(io::Error::other)?;
    let shown = || command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set());
    if shown().next().is_some() {
        text += ".SH COMMANDS\n";
    }
    for subcommand in shown() {
        let about = subcommand.get_about().map(ToString::to_string).unwrap_or_default();
        text += &roff::entry(&format!("{name}-{}(1)", subcommand.get_name()), &about);
    }
    text += &roff::markdown(&by_hand(name, &options.docs)?);
    let page = roff::title(&name.to_uppercase(), "1") + &text;
    fs::write(options.directory.join(format!("man/man1/{name}.1")), page)
}

/// The sections that are written by hand: those of `docs/man/NAME.md`, or for a subcommand without such a file those of
/// `docs/man/command.md`.
fn by_hand(name: &str, docs: &Path) -> io::Result<String> {
    match fs::read_to_string(docs.join(format!("man/{name}.md"))) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => fs::read_to_string(docs.join("man/command.md")),
        text => text,
    }
}

/// The keys of a configuration file, each with its values and help.
fn list_keys(daemon: &Command) -> String {
    let keys = config::file_keys();
    let arguments = daemon
        .get_arguments()
        .filter(|argument| argument.get_long().is_some_and(|long| keys.iter().any(|key| key == long)));
    let entry = |argument: &clap::Arg| {
        let values: Vec<String> =
            argument.get_value_names().unwrap_or_default().iter().map(ToString::to_string).collect();
        let help = argument.get_long_help().or(argument.get_help()).map(ToString::to_string).unwrap_or_default();
        roff::entry(&format!("{} = {}", argument.get_long().unwrap_or_default(), values.join(" ")), &help)
    };
    arguments.map(entry).collect()
}

/// The date for the foot of a page: that of the sources if the maker of a package gives it, else today.
fn date() -> String {
    let seconds = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|seconds| seconds.parse().ok());
    let given = seconds.map(Duration::from_secs);
    let since_1970 = given.or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    logging::utc(since_1970).chars().take("2026-11-28".len()).collect()
}

/// The version for the foot of a page.
fn source() -> String {
    format!("virtioblkd {}", VERSION.split(' ').next().unwrap_or(VERSION))
}
