//! A filesystem that holds new files, in memory, and stops answering when it is told to.

use std::any::Any;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Errno, FileAttr, FileHandle, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry, ReplyWrite, Request,
    TimeOrNow, WriteFlags,
};

/// A directory in it that is always there.
const BELOW: &str = "below";
const BELOW_INODE: INodeNo = INodeNo(2);
/// The kernel asks anew each time.
const BELIEVE: Duration = Duration::ZERO;
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Default)]
struct State {
    names: BTreeMap<OsString, INodeNo>,
    files: BTreeMap<u64, Vec<u8>>,
    stopped: bool,
    /// Bytes a second that can be written; 0: no limit.
    rate: u64,
    /// Requests without an answer. One that is dropped is answered with EIO.
    waiting: Vec<Box<dyn Any + Send>>,
}

/// A mounted one; goes on and is unmounted when dropped.
pub struct Stopping {
    state: Arc<Mutex<State>>,
    // Before the directory: it is mounted there.
    session: Option<BackgroundSession>,
    dir: tempfile::TempDir,
}

impl Stopping {
    /// Mounts one. Errors: why there can be none here.
    pub fn mount() -> Result<Stopping, String> {
        let state = Arc::new(Mutex::new(State::default()));
        let (session, dir) = super::mount(Tree(state.clone()), "stopping")?;
        Ok(Stopping { state, session: Some(session), dir })
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.dir.path().to_path_buf()
    }

    /// A directory in it.
    pub fn below(&self) -> PathBuf {
        self.dir.path().join(BELOW)
    }

    /// From now on nothing is answered.
    pub fn stop(&self) {
        self.lock().stopped = true;
    }

    /// From now on writes take their time.
    pub fn slow_down(&self, bytes_per_second: u64) {
        self.lock().rate = bytes_per_second;
    }

    /// How many requests wait for an answer.
    pub fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    /// What waits fails, and everything is answered from now on.
    pub fn go_on(&self) {
        let mut state = self.lock();
        state.stopped = false;
        state.waiting.clear();
    }

    /// The names of its files.
    pub fn files(&self) -> Vec<String> {
        self.lock().names.keys().map(|name| name.to_string_lossy().into_owned()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }
}

impl Drop for Stopping {
    fn drop(&mut self) {
        self.go_on();
        // A process that was killed has files open for a moment longer.
        let end = Instant::now() + UNMOUNT_TIMEOUT;
        while !Command::new("umount").arg(self.dir.path()).output().is_ok_and(|ended| ended.status.success()) {
            if Instant::now() > end {
                let _ = Command::new("umount").arg("-l").arg(self.dir.path()).output();
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(self.session.take());
    }
}

struct Tree(Arc<Mutex<State>>);

/// Keeps a request without an answer while the filesystem is stopped.
macro_rules! stops {
    ($state:ident, $reply:ident) => {
        if $state.stopped {
            return $state.waiting.push(Box::new($reply));
        }
    };
}

impl Tree {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic while held")
    }
}

impl State {
    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let directory = [INodeNo::ROOT, BELOW_INODE].contains(&inode);
        let file = if directory { None } else { Some(self.files.get(&inode.0)?.len() as u64) };
        Some(super::attributes(inode, file))
    }
}

impl Filesystem for Tree {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.lock();
        stops!(state, reply);
        let inode = if name == BELOW { Some(BELOW_INODE) } else { state.names.get(name).copied() };
        match inode.and_then(|inode| state.attributes(inode)) {
            Some(attributes) => reply.entry(&BELIEVE, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let mut state = self.lock();
        stops!(state, reply);
        match state.attributes(inode) {
            Some(attributes) => reply.attr(&BELIEVE, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.lock();
        stops!(state, reply);
        if let (Some(size), Some(file)) = (size, state.files.get_mut(&inode.0)) {
            file.resize(size as usize, 0);
        }
        match state.attributes(inode) {
            Some(attributes) => reply.attr(&BELIEVE, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn create(&self, _: &Request, _: INodeNo, name: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        let mut state = self.lock();
        stops!(state, reply);
        let inode = INodeNo(state.files.keys().next_back().map_or(10, |last| last + 1));
        state.names.insert(name.to_os_string(), inode);
        state.files.insert(inode.0, Vec::new());
        let attributes = state.attributes(inode).expect("just made");
        reply.created(&BELIEVE, &attributes, Generation(0), FileHandle(0), FopenFlags::empty());
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let mut state = self.lock();
        stops!(state, reply);
        match state.names.remove(name) {
            Some(_) => reply.ok(),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// There are no hard links: `link` is not implemented.
    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        name: &OsStr,
        _: INodeNo,
        new: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut state = self.lock();
        stops!(state, reply);
        assert!(flags.contains(RenameFlags::RENAME_NOREPLACE), "a copy replaces nothing");
        match state.names.remove(name) {
            Some(inode) => {
                state.names.insert(new.to_os_string(), inode);
                reply.ok();
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut state = self.lock();
        stops!(state, reply);
        let file = state.files.get(&inode.0).map_or(&[][..], Vec::as_slice);
        let start = file.len().min(offset as usize);
        reply.data(&file[start..file.len().min(start + size as usize)]);
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = self.lock();
        stops!(state, reply);
        let Some(file) = state.files.get_mut(&inode.0) else { return reply.error(Errno::ENOENT) };
        let start = offset as usize;
        file.resize(file.len().max(start + data.len()), 0);
        file[start..start + data.len()].copy_from_slice(data);
        if state.rate > 0 {
            std::thread::sleep(Duration::from_secs_f64(data.len() as f64 / state.rate as f64));
        }
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = self.lock();
        stops!(state, reply);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = self.lock();
        stops!(state, reply);
        reply.ok();
    }
}
