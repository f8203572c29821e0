//! The pages that users read, and a terminal into which a test pastes their commands.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::programs;

/// A fenced block of a page.
#[derive(Clone, Debug)]
pub struct Block {
    /// The page, relative to the sources' directory.
    pub page: String,
    /// The line of the fence.
    pub line: usize,
    /// The language after the fence.
    pub language: String,
    /// The lines between the fences.
    pub text: String,
}

impl Block {
    /// The first line, by which lists name the block.
    pub fn first_line(&self) -> &str {
        self.text.lines().next().unwrap_or_default()
    }
}

/// Every page with commands for users, relative to the sources' directory.
pub fn pages() -> Vec<String> {
    let docs = fs::read_dir(programs::root().join("docs")).expect("docs");
    let names = docs.map(|entry| format!("docs/{}", entry.expect("an entry").file_name().display()));
    let mut pages: Vec<String> = names.filter(|name| name.ends_with(".md")).collect();
    pages.extend(["README.md", "qemu-configs/README.md", "qemu-configs/snapshot/README.md"].map(String::from));
    pages.sort();
    pages
}

/// The text of a page.
pub fn read(page: &str) -> String {
    fs::read_to_string(programs::root().join(page)).unwrap_or_else(|error| panic!("{page}: {error}"))
}

/// The fenced blocks of a page, in their order.
pub fn blocks(page: &str) -> Vec<Block> {
    let (mut blocks, mut open) = (Vec::new(), None::<Block>);
    for (number, line) in read(page).lines().enumerate() {
        match (line.trim_start().strip_prefix("```"), open.take()) {
            (Some(language), None) => {
                let language = language.trim().to_owned();
                open = Some(Block { page: page.to_owned(), line: number + 1, language, text: String::new() });
            }
            (Some(_), Some(block)) => blocks.push(block),
            (None, Some(mut block)) => {
                block.text += line;
                block.text.push('\n');
                open = Some(block);
            }
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "{page}: a fence is not closed");
    blocks
}

/// The shell's commands for a block: the block as it stands. If it starts a daemon in the background, the shell then waits
/// until the daemon answers, as a reader who types does: a socket's file exists a moment before its server listens.
pub fn pasted(block: &Block) -> String {
    let mut script = format!("echo '--- {}:{}'\n{}", block.page, block.line, block.text);
    let words: Vec<&str> = block.text.split_whitespace().collect();
    if block.text.trim_end().ends_with('&') {
        for pair in words.windows(2).filter(|pair| pair[0] == "--control-path") {
            let ask = format!("virtioblkctl --control {} status >/dev/null 2>&1", pair[1]);
            script += &format!("until [ -S {} ] && {ask}; do sleep 0.05; done\n", pair[1]);
        }
    }
    script
}

/// A directory in which a shell runs, with the programs that were built in its PATH. Whatever runs there is killed when it is
/// dropped.
pub struct Terminal {
    dir: tempfile::TempDir,
    shells: Vec<Child>,
}

impl Default for Terminal {
    fn default() -> Terminal {
        let dir = programs::disk_dir();
        fs::create_dir(dir.path().join("bin")).expect("room");
        Terminal { dir, shells: Vec::new() }
    }
}

impl Terminal {
    /// The directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Adds a program that comes first in the PATH.
    pub fn program(&self, name: &str, text: &str) {
        crate::programs::make_script(&self.dir().join("bin").join(name), text);
    }

    /// Everything that was printed so far.
    pub fn output(&self) -> String {
        fs::read_to_string(self.dir().join("terminal")).unwrap_or_default()
    }

    /// Starts a shell with these commands. It ends at the first one that fails.
    pub fn start(&mut self, script: &str, environment: &[(&str, &Path)]) {
        let bin = programs::virtioblkd();
        let bin = bin.parent().expect("a directory").display();
        let path = format!("{}:{bin}:{}", self.dir().join("bin").display(), std::env::var("PATH").expect("PATH"));
        let output = fs::OpenOptions::new().create(true).append(true).open(self.dir().join("terminal")).expect("room");
        let mut shell = Command::new("sh");
        shell.args(["-eu", "-c", script]).current_dir(self.dir()).env("PATH", path).env_remove("VIRTIOBLK_CONTROL");
        shell.envs(environment.iter().copied()).stdin(Stdio::null()).process_group(0);
        shell.stdout(output.try_clone().expect("a second handle")).stderr(output);
        self.shells.push(shell.spawn().expect("sh"));
    }

    /// Runs these commands to their end.
    pub fn run(&mut self, script: &str, environment: &[(&str, &Path)]) -> ExitStatus {
        self.start(script, environment);
        self.shells.last_mut().expect("just started").wait().expect("our own child")
    }

    /// Runs these commands; panics with all that was printed if one fails.
    pub fn run_ok(&mut self, script: &str, environment: &[(&str, &Path)]) {
        let status = self.run(script, environment);
        assert!(status.success(), "{status}\n{}", self.output());
    }

    /// Processes that were started from here and name this directory, also those that an upgrade started.
    fn left(&self) -> Vec<Pid> {
        let dir = self.dir().as_os_str().as_encoded_bytes();
        let names = fs::read_dir("/proc").expect("/proc is mounted").map(|entry| entry.expect("an entry").file_name());
        let pids = names.filter_map(|name| name.to_str()?.parse().ok().and_then(Pid::from_raw));
        let is_ours = |pid: &Pid| {
            let words = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
            words.windows(dir.len()).any(|part| part == dir)
        };
        pids.filter(is_ours).collect()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Each fails only if the process has ended.
        for shell in &mut self.shells {
            let _ = kill_process_group(Pid::from_child(shell), Signal::KILL);
            let _ = shell.wait();
        }
        for pid in self.left() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// The path of a program that the PATH has, or `None`.
pub fn installed(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.exists())
}
