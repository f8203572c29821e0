//! libvirt's hook, seen from a test: the daemons that it started, and each change of its files.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::inotify;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

/// Kills, when dropped, each process whose command line names a file below a directory: daemons outlive the hook, and a
/// test that fails ends none of them.
pub struct DaemonsOf(pub PathBuf);

impl Drop for DaemonsOf {
    fn drop(&mut self) {
        for pid in processes_naming(&self.0) {
            // It may have ended.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn processes_naming(directory: &Path) -> Vec<Pid> {
    let path = [directory.as_os_str().as_encoded_bytes(), b"/"].concat();
    let names = |pid: &i32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.windows(path.len()).any(|window| window == path)
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(names).filter_map(Pid::from_raw).collect()
}

/// Counts what happens to the files of some directories.
pub struct FileEvents {
    events: OwnedFd,
    count: usize,
}

impl FileEvents {
    /// Counts from now on.
    pub fn of(directories: &[PathBuf]) -> FileEvents {
        let events = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).expect("inotify");
        let changes = inotify::WatchFlags::CREATE
            | inotify::WatchFlags::MODIFY
            | inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::DELETE;
        for directory in directories {
            inotify::add_watch(&events, directory, changes).expect("the directory exists");
        }
        FileEvents { events, count: 0 }
    }

    /// How many files were created, written, renamed or removed so far.
    pub fn count(&mut self) -> usize {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.events, &mut buffer);
        loop {
            match reader.next() {
                Ok(_) => self.count += 1,
                Err(Errno::INTR) => {}
                Err(_) => return self.count,
            }
        }
    }
}
