//! Tests of a file's queue that need its private state.

use std::time::Duration;

use super::*;
use crate::backend::{IoBuf, Op, OpId, preadv};
use crate::engine::CacheMode;

fn image(policy: CacheMode) -> (tempfile::NamedTempFile, Result<FileBackend, OpenError>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let backend = FileBackend::open(&FileOptions::new(file.path(), policy.into()));
    (file, backend)
}

/// Returns the result if the op completed inline, in `push`.
fn inline_result(queue: &mut dyn IoQueue, op: Op) -> Option<Result<(), Errno>> {
    let mut out = Vec::new();
    queue.push(op, OpId(1)).unwrap();
    queue.reap(&mut out);
    out.pop().map(|completion| completion.result)
}

fn write() -> Op {
    Op::Write { offset: 4096, buf: IoBuf::owned(4096, 4096, 0), durable: false }
}

#[test]
fn cached_data_is_transferred_inline() {
    let (file, backend) = image(CacheMode::Writeback);
    let mut queue = backend.unwrap().open_queue(4).unwrap();
    assert_eq!(inline_result(&mut *queue, write()), Some(Ok(())));
    let part = IoBuf::owned(4096, 4096, 0);
    let asked = preadv::transfer(file.as_file().as_fd(), false, &part, 0..512, 4096, libc::RWF_NOWAIT, &mut Vec::new());
    if asked == Err(Errno(libc::EOPNOTSUPP)) {
        return eprintln!("SKIPPED: reads of {} do not know RWF_NOWAIT", file.path().display());
    }
    assert_eq!(inline_result(&mut *queue, Op::Read { offset: 4096, buf: part }), Some(Ok(())));
    let long = IoBuf::owned(1 << 20, 4096, 0);
    assert_eq!(
        inline_result(&mut *queue, Op::Read { offset: 0, buf: long }),
        None,
        "a long copy would delay the others"
    );
}

#[test]
fn a_sync_after_a_sync_makes_no_system_call() {
    let (_file, backend) = image(CacheMode::Writeback);
    let backend = backend.unwrap();
    let is_clean = || backend.image.changes.begin_sync().is_none();
    let mut queue = backend.open_queue(4).unwrap();
    assert!(!is_clean(), "an earlier process may have written");
    backend.sync().unwrap();
    assert!(is_clean());
    assert_eq!(inline_result(&mut *queue, Op::Sync), Some(Ok(())));
    inline_result(&mut *queue, write());
    assert!(!is_clean());
    backend.image.sync_error.fail(Errno(libc::EIO), "test");
    backend.sync().unwrap_err();
    assert_eq!(inline_result(&mut *queue, Op::Sync), Some(Err(Errno(libc::EIO))), "a failure is final");
}

/// A guest's request must not fail because a filesystem requires more alignment than it reported.
#[test]
fn a_transfer_that_the_kernel_refuses_is_bounced() {
    let (_file, backend) = image(CacheMode::None);
    let mut backend = match backend {
        Ok(backend) => backend,
        Err(error) => return eprintln!("SKIPPED: {error}"),
    };
    Arc::get_mut(&mut backend.image).unwrap().limits.align.memory = 1;
    let mut queue = backend.open_queue(2).unwrap();
    let mut run = |op| {
        let mut out = Vec::new();
        queue.push(op, OpId(1)).unwrap();
        while out.is_empty() {
            queue.wait(Some(Duration::from_secs(60))).unwrap();
            queue.reap(&mut out);
        }
        out.remove(0)
    };
    let skewed = IoBuf::owned(8192, 4096, 1);
    skewed.copy_from(0, &[5; 8192]);
    assert_eq!(run(Op::Write { offset: 4096, buf: skewed, durable: true }).result, Ok(()));
    let read = run(Op::Read { offset: 4096, buf: IoBuf::owned(8192, 4096, 3) });
    assert_eq!(read.result, Ok(()));
    let mut seen = [0; 8192];
    read.buf.unwrap().copy_to(0, &mut seen);
    assert_eq!(seen, [5; 8192]);
}
