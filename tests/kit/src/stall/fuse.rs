//! A filesystem with one file, in memory, that answers chosen requests only when it is told to.

use std::ffi::OsStr;
use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use fuser::{
    BackgroundSession, Errno, FileAttr, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request,
    WriteFlags,
};

use crate::guest;

const FILE: INodeNo = INodeNo(2);
const NAME: &str = "disk.img";
/// How long the kernel may believe what it was told.
const BELIEVE: Duration = Duration::from_secs(600);

/// What waits to be let go.
enum Waiting {
    Read { reply: ReplyData, offset: usize, size: usize },
    Write { reply: ReplyWrite, offset: usize, data: Vec<u8> },
    Sync(ReplyEmpty),
}

struct State {
    content: Vec<u8>,
    /// Reads that touch this byte wait.
    read: Option<u64>,
    /// Writes that touch this byte wait.
    write: Option<u64>,
    /// Syncs wait.
    sync: bool,
    /// Flushes wait: each close(2) of the file sends one.
    flush: bool,
    /// FUSE_ASYNC_DIO.
    async_dio: bool,
    /// Bytes that one write stores at most.
    most_written: usize,
    waiting: Vec<Waiting>,
}

impl State {
    fn read(&self, reply: ReplyData, offset: usize, size: usize) {
        let end = self.content.len();
        reply.data(&self.content[offset.min(end)..(offset + size).min(end)]);
    }

    fn answer(&mut self, waiting: Waiting) {
        match waiting {
            Waiting::Read { reply, offset, size } => self.read(reply, offset, size),
            Waiting::Write { reply, offset, data } => self.write(reply, offset, &data),
            Waiting::Sync(reply) => reply.ok(),
        }
    }

    fn write(&mut self, reply: ReplyWrite, offset: usize, data: &[u8]) {
        let data = &data[..data.len().min(self.most_written)];
        let Some(room) = self.content.get_mut(offset..offset + data.len()) else {
            return reply.error(Errno::ENOSPC);
        };
        room.copy_from_slice(data);
        reply.written(data.len() as u32);
    }
}

/// Why there can be no such filesystem here.
pub struct Unable(pub String);

/// A mounted one; unmounted when dropped.
pub struct Stalling {
    state: Arc<Mutex<State>>,
    // Before the directory: it is mounted there.
    session: Option<BackgroundSession>,
    dir: tempfile::TempDir,
}

impl Stalling {
    /// Mounts one. Its file has this content.
    pub fn mount(content: Vec<u8>) -> Result<Stalling, Unable> {
        Self::mount_as(content, true, usize::MAX)
    }

    /// Mounts one. `async_dio`: FUSE_ASYNC_DIO, without which Linux makes an O_DIRECT transfer of io_uring wait in the thread
    /// that begins it, and with which it makes an error of a short write. `most_written`: bytes that a write stores at
    /// most.
    pub fn mount_as(content: Vec<u8>, async_dio: bool, most_written: usize) -> Result<Stalling, Unable> {
        let state = Arc::new(Mutex::new(State {
            content,
            read: None,
            write: None,
            sync: false,
            flush: false,
            async_dio,
            most_written,
            waiting: Vec::new(),
        }));
        let (session, dir) = super::mount(Tree(state.clone()), "stalling").map_err(Unable)?;
        Ok(Stalling { state, session: Some(session), dir })
    }

    pub fn image(&self) -> PathBuf {
        self.dir.path().join(NAME)
    }

    /// From now on reads of this byte wait.
    pub fn stall_reads_of(&self, offset: u64) {
        self.lock().read = Some(offset);
    }

    /// From now on writes of this byte wait.
    pub fn stall_writes_of(&self, offset: u64) {
        self.lock().write = Some(offset);
    }

    /// From now on syncs wait.
    pub fn stall_syncs(&self) {
        self.lock().sync = true;
    }

    /// From now on each close(2) of the file waits.
    pub fn stall_closes(&self) {
        self.lock().flush = true;
    }

    /// How many wait now.
    pub fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Answers those that wait; nothing waits from now on.
    pub fn let_go(&self) {
        let mut state = self.lock();
        (state.read, state.write, state.sync, state.flush) = (None, None, false, false);
        for waiting in std::mem::take(&mut state.waiting) {
            state.answer(waiting);
        }
    }

    /// Answers the reads that wait; no read waits from now on.
    pub fn let_reads_go(&self) {
        let mut state = self.lock();
        state.read = None;
        for read in state.waiting.extract_if(.., |waiting| matches!(waiting, Waiting::Read { .. })).collect::<Vec<_>>()
        {
            state.answer(read);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }
}

impl Drop for Stalling {
    fn drop(&mut self) {
        // Whoever has the file open could not end otherwise.
        self.let_go();
        // A process that was killed has the file open for a moment longer: its io_uring is taken down by the kernel.
        let end = Instant::now() + guest::WAIT_TIMEOUT;
        while !guest::output(Command::new("umount").arg(self.dir.path())).status.success() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        let ended = self.session.take().expect("until here").join();
        if !std::thread::panicking() {
            ended.expect("nobody has the file open any more");
        }
    }
}

struct Tree(Arc<Mutex<State>>);

impl Tree {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic while held")
    }

    fn attributes(&self, inode: INodeNo) -> FileAttr {
        super::attributes(inode, (inode == FILE).then(|| self.lock().content.len() as u64))
    }
}

impl Filesystem for Tree {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        if self.lock().async_dio {
            config
                .add_capabilities(InitFlags::FUSE_ASYNC_DIO)
                .map_err(|lacking| io::Error::other(format!("the kernel lacks {lacking:?}")))?;
        }
        // No read of a neighbour may touch the byte that waits. A page is the least, and what a reader asks for anyway.
        config.set_max_readahead(4096).map(drop).map_err(|least| io::Error::other(format!("readahead of {least}")))
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == NAME {
            reply.entry(&BELIEVE, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&BELIEVE, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // What one description has read into the page cache stays there when the next is opened.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut state = self.lock();
        let range = offset..offset + u64::from(size);
        let (offset, size) = (offset as usize, size as usize);
        if state.read.is_some_and(|byte| range.contains(&byte)) {
            state.waiting.push(Waiting::Read { reply, offset, size });
        } else {
            state.read(reply, offset, size);
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = self.lock();
        let range = offset..offset + data.len() as u64;
        let offset = offset as usize;
        if state.write.is_some_and(|byte| range.contains(&byte)) {
            state.waiting.push(Waiting::Write { reply, offset, data: data.to_vec() });
        } else {
            state.write(reply, offset, data);
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        let mut state = self.lock();
        // The kernel sends no more of them after the first ENOSYS.
        if state.flush { state.waiting.push(Waiting::Sync(reply)) } else { reply.error(Errno::ENOSYS) }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = self.lock();
        if state.sync {
            state.waiting.push(Waiting::Sync(reply));
        } else {
            reply.ok();
        }
    }
}
