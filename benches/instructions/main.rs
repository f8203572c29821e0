//! Instructions of the server's own code for one request, beside another build of it. They hardly depend on what else
//! the machine does, so that a change that costs is seen where times say nothing.
//!
//! `cargo bench --bench instructions -- [--server NAME=PROGRAM]... [--only TEXT] [--requests N] [--dir DIR]
//! [--functions]`
//!
//! Method: the threads of the server's virtqueue are single-stepped (ptrace(2)), which counts the instructions in user mode
//! on any machine, virtual ones included; a system call counts as one. The front-end queues as many requests as the case is deep, kicks
//! once, and takes all answers before the next batch, so that every run has the same batches. A case is counted
//! for N requests (default 32) and for 3 N, each time between two moments at which all threads of the server sleep, and
//! the difference divided by 2 N. That is done twice and the smaller figure printed: a wait that something interrupts
//! only adds. The sandbox is off, since it allows no ptrace. A server that is stepped is slow: where it chooses a way by
//! time (writes over the page cache), this counts the way that it takes then, which differs from run to run on a busy
//! machine. With `--dir` on tmpfs there is no such choice.
//!
//! `--functions` prints after each case which functions the instructions belong to, in every server: the innermost function
//! of this package, inlined ones included, or else the outermost. It needs addr2line (binutils).
//!
//! Without `--server` only this build is counted. `scripts/bench-instructions` builds another commit and compares.

mod case;
mod count;
mod functions;

use std::path::PathBuf;

use case::CASES;
use count::{count, print_functions};
use rustix::thread::CpuSet;

struct Options {
    /// Name and program; this build is the first.
    servers: Vec<(String, PathBuf)>,
    only: String,
    requests: u64,
    dir: PathBuf,
    functions: bool,
}

fn main() {
    let options = parse(std::env::args().skip(1));
    share_one_cpu();
    let dir = tempfile::tempdir_in(&options.dir).unwrap_or_else(|error| panic!("{}: {error}", options.dir.display()));
    print!("{:<34}", "instructions a request");
    options.servers.iter().for_each(|(name, _)| print!(" {name:>12}"));
    println!("{}", if options.servers.len() > 1 { "   first/last" } else { "" });
    let mut worst: f64 = 0.0;
    for case in CASES.iter().filter(|case| case.name.contains(&options.only)) {
        let counts: Vec<f64> =
            options.servers.iter().map(|(_, program)| count(program, case, options.requests, dir.path())).collect();
        print!("{:<34}", case.name);
        counts.iter().for_each(|count| print!(" {count:>12.0}"));
        if let [first, .., last] = counts[..] {
            print!("   {:>9.3}", first / last);
            worst = worst.max(first / last);
        }
        println!();
        for (name, program) in options.servers.iter().filter(|_| options.functions) {
            println!("  {name}");
            print_functions(program, case, options.requests, dir.path());
        }
    }
    if options.servers.len() > 1 {
        println!("largest ratio: {worst:.3}");
    }
}

/// Server and tracer take turns at each instruction, which is several times as fast on one CPU. The server inherits this.
fn share_one_cpu() {
    let allowed = rustix::thread::sched_getaffinity(None).expect("our own CPUs");
    let first = (0..CpuSet::MAX_CPU).find(|&cpu| allowed.is_set(cpu)).expect("we run on a CPU");
    let mut one = CpuSet::new();
    one.set(first);
    rustix::thread::sched_setaffinity(None, &one).expect("a CPU that was allowed");
}

fn parse(mut args: impl Iterator<Item = String>) -> Options {
    let mut options = Options {
        servers: vec![("this build".into(), env!("CARGO_BIN_EXE_virtioblkd").into())],
        only: String::new(),
        requests: 32,
        dir: std::env::temp_dir(),
        functions: false,
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| panic!("{arg} needs a value"));
        match arg.as_str() {
            "--server" => {
                let server = value();
                let (name, program) = server.split_once('=').expect("--server NAME=PROGRAM");
                options.servers.push((name.into(), program.into()));
            }
            "--only" => options.only = value(),
            "--requests" => options.requests = value().parse().expect("a number of requests"),
            "--dir" => options.dir = value().into(),
            "--functions" => options.functions = true,
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    options
}
