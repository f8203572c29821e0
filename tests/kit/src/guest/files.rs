//! A guest that writes files and says when each was fsynced, and what a snapshot of its disk must hold.

use std::path::Path;

use super::ext4::e2fsprogs;
use super::output;
use super::qemu::Vm;

/// Writes files one after another and says so once a file's fsync has returned, until the host says stop.
pub const FILES_JOB: &str = r#"
mkfs.ext4 -q /dev/vda || exit 1
mount -t ext4 /dev/vda /mnt || exit 1
( n=0
  while [ ! -e /tmp/stop ]; do
    n=$((n + 1))
    yes "file $n" | head -c $((n % 7 * 3000 + 100)) | dd of=/mnt/$n conv=fsync 2>/dev/null || exit 1
    echo "@file $n"
  done
  echo "@last $n" ) &
ask stop
touch /tmp/stop
wait $! || exit 1
umount /mnt
"#;

/// The newest file of [`FILES_JOB`] that is fsynced by now, after at least one more than before: said before a snapshot
/// is asked for, it is promised to be in it.
pub fn promised_so_far(vm: &mut Vm) -> u64 {
    let said = vm.until_line("@file ");
    let mut promised = said.last().expect("the line waited for").clone();
    while let Some(line) = vm.said_so_far("@file ") {
        promised = line;
    }
    promised["@file ".len()..].parse().expect("a number")
}

/// Replays the journal of a copy, as a mount would, checks it, and reads back the files that were promised.
pub fn check_snapshot(snapshot: &Path, promised: u64, mode: &str) {
    // 0: clean, 1: the journal was replayed and what it told was mended. More is damage.
    let replayed = output(e2fsprogs("e2fsck").args(["-p"]).arg(snapshot));
    let report = String::from_utf8_lossy(&replayed.stdout).into_owned();
    assert!(matches!(replayed.status.code(), Some(0 | 1)), "{mode}: e2fsck: {}\n{report}", replayed.status);
    let checked = output(e2fsprogs("e2fsck").args(["-fn"]).arg(snapshot));
    let report = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(checked.status.success(), "{mode}: not clean after its journal was replayed\n{report}");
    for n in promised.saturating_sub(20).max(1)..=promised {
        let read = output(e2fsprogs("debugfs").args(["-R", &format!("cat /{n}")]).arg(snapshot));
        let line = format!("file {n}\n");
        let length = usize::try_from(n % 7 * 3000 + 100).expect("small");
        let expected: Vec<u8> = line.bytes().cycle().take(length).collect();
        assert!(
            read.stdout == expected,
            "{mode}: file {n} of {promised} was fsynced before the quiesce and is not there"
        );
    }
}
