//! Which functions the instructions belong to (`--functions`).

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::ptrace;
use nix::unistd::Pid;

/// How often the instruction at each address was executed.
pub type Addresses = HashMap<u64, u64>;

/// Fewer instructions a request than this are not printed.
const SMALLEST: f64 = 0.5;

/// The address of the next instruction of a thread that has stopped. `None` where this is not known how to find.
pub fn program_counter(thread: Pid) -> Option<u64> {
    let registers = ptrace::getregs(thread).ok()?;
    #[cfg(target_arch = "x86_64")]
    return Some(registers.rip);
    #[cfg(target_arch = "aarch64")]
    return Some(registers.pc);
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return None;
}

/// A file that is mapped into a process, from its first to its last address there.
struct MappedFile {
    path: PathBuf,
    start: u64,
    end: u64,
}

/// The files that are mapped into a process.
pub struct Mappings(Vec<MappedFile>);

impl Mappings {
    pub fn of(process: u32) -> Self {
        let text = std::fs::read_to_string(format!("/proc/{process}/maps")).expect("a running server");
        let mut files: Vec<MappedFile> = Vec::new();
        for line in text.lines() {
            let mut fields = line.split_whitespace();
            let (Some(range), Some(path)) = (fields.next(), fields.nth(4)) else { continue };
            let (start, end) = range.split_once('-').expect("a range");
            let [start, end] = [start, end].map(|number| u64::from_str_radix(number, 16).expect("a number"));
            match files.iter_mut().find(|file| file.path == Path::new(path)) {
                Some(file) => file.end = end,
                None => files.push(MappedFile { path: path.into(), start, end }),
            }
        }
        Mappings(files)
    }

    /// Prints the functions with the most instructions, each divided by `requests`.
    pub fn print(&self, addresses: &Addresses, requests: u64) {
        let mut functions: HashMap<String, u64> = HashMap::new();
        for file in &self.0 {
            let inside: Vec<u64> =
                addresses.keys().copied().filter(|address| (file.start..file.end).contains(address)).collect();
            for (name, address) in file.functions(&inside).into_iter().zip(inside) {
                *functions.entry(name).or_default() += addresses[&address];
            }
        }
        let mut functions: Vec<(String, f64)> =
            functions.into_iter().map(|(name, count)| (name, count as f64 / requests as f64)).collect();
        functions.sort_by(|(_, one), (_, other)| other.total_cmp(one));
        for (name, count) in functions.into_iter().filter(|&(_, count)| count >= SMALLEST) {
            println!("    {count:>8.1} {name}");
        }
    }
}

impl MappedFile {
    /// The function of each address, inlined ones included, by addr2line(1).
    fn functions(&self, addresses: &[u64]) -> Vec<String> {
        let file = self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy();
        if addresses.is_empty() || !self.path.is_file() {
            return vec![file.into_owned(); addresses.len()];
        }
        let mut addr2line = Command::new("addr2line")
            .args(["--functions", "--inlines", "--demangle", "--addresses", "--exe"])
            .arg(&self.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("--functions needs addr2line: install binutils");
        let mut input = addr2line.stdin.take().expect("it is a pipe");
        let lines: String = addresses.iter().map(|address| format!("{:#x}\n", address - self.start)).collect();
        // It answers while it reads.
        let writer = std::thread::spawn(move || input.write_all(lines.as_bytes()));
        let output = addr2line.wait_with_output().expect("it ends with its input").stdout;
        writer.join().expect("no panic").expect("it reads all addresses");
        let output = String::from_utf8_lossy(&output);
        // An address, then two lines a function: its name and its place.
        output.split("\n0x").map(|part| name_of(part.lines().skip(1), &file)).collect()
    }
}

/// The innermost function of this package, by its file and its name; without one, the outermost of all. `lines`: name and
/// place of each function, the innermost first.
fn name_of<'a>(lines: impl Iterator<Item = &'a str>, object: &str) -> String {
    let lines: Vec<&str> = lines.collect();
    let mut functions = lines.chunks_exact(2);
    let own = functions.clone().find_map(|function| Some((function[0], own_file(function[1])?)));
    if let Some((name, file)) = own {
        return format!("{file} {}", name.rsplit("::").next().unwrap_or(name));
    }
    match functions.next_back() {
        Some(["??", _]) | None => object.into(),
        Some(function) => function[0].into(),
    }
}

/// The path below `src` of a source file of this package.
fn own_file(place: &str) -> Option<&str> {
    let (path, _line) = place.rsplit_once(':')?;
    let is_foreign = path.starts_with("/rustc/") || path.contains("/registry/");
    let (_, file) = path.rsplit_once("src/").filter(|_| !is_foreign)?;
    Some(file)
}
