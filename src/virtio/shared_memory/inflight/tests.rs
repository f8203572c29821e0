use super::*;

const SIZE: u16 = 8;

fn fresh() -> (VhostUserInflight, File) {
    Inflight::create(3, SIZE, SIZE).unwrap()
}

fn map(message: &VhostUserInflight, file: &File) -> Result<Inflight> {
    Inflight::map(message, file.try_clone().unwrap(), &SessionSocket::pair().0)
}

fn ring((message, file): &(VhostUserInflight, File)) -> Tracker {
    map(message, file).unwrap().ring(1, SIZE, 0).unwrap()
}

#[test]
fn requests_taken_and_not_completed_are_found_in_order() {
    let memory = fresh();
    let mut first = ring(&memory);
    assert_eq!(first.recover(65_534, SIZE, SIZE), Ok(vec![]));
    for head in [5, 2, 7, 0] {
        first.taken(head);
    }
    first.completing(2);
    first.completed(2, 65_535);
    assert_eq!(ring(&memory).recover(65_535, SIZE, SIZE), Ok(vec![5, 7, 0]));
    // The next server takes one more, and is killed too.
    let mut second = ring(&memory);
    assert_eq!(second.recover(65_535, SIZE, SIZE), Ok(vec![5, 7, 0]));
    second.taken(2);
    assert_eq!(ring(&memory).recover(65_535, SIZE, SIZE), Ok(vec![5, 7, 0, 2]));
}

#[test]
fn a_server_may_be_killed_between_any_two_steps_of_a_completion() {
    for steps in 0..=2 {
        let memory = fresh();
        let mut dying = ring(&memory);
        assert_eq!(dying.recover(65_535, SIZE, SIZE), Ok(vec![]));
        dying.taken(3);
        dying.taken(4);
        dying.completing(4);
        // add_used comes here: from step 1 on, the guest's used index counts the head.
        if steps == 2 {
            dying.completed(4, 0);
        }
        let (used, left) = if steps == 0 { (65_535, vec![3, 4]) } else { (0, vec![3]) };
        assert_eq!(ring(&memory).recover(used, SIZE, SIZE), Ok(left), "{steps} steps");
    }
}

/// A head is completed, taken again, and in flight when the server is killed while it completes another head.
#[test]
fn a_head_that_is_completed_unmarked_is_distinguished_from_the_last_one() {
    let memory = fresh();
    let mut dying = ring(&memory);
    assert_eq!(dying.recover(0, SIZE, SIZE), Ok(vec![]));
    dying.taken(1);
    dying.completing(1);
    dying.completed(1, 1);
    dying.taken(1);
    dying.completing(6);
    assert_eq!(ring(&memory).recover(2, SIZE, SIZE), Ok(vec![1]));
}

/// The driver was reset and the region was not: no request of the earlier driver is recovered.
#[test]
fn no_more_requests_are_recovered_than_the_driver_waits_for() {
    let used_by_the_first = 5;
    let memory = fresh();
    let mut first = ring(&memory);
    assert_eq!(first.recover(used_by_the_first, 0, SIZE), Ok(vec![]));
    first.taken(2);
    first.taken(3);
    assert!(ring(&memory).recover(used_by_the_first, 1, SIZE).is_err(), "one of them is not its own");
    assert!(ring(&memory).recover(0, 2, SIZE).is_err(), "its used ring was set up anew");
    assert_eq!(ring(&memory).recover(used_by_the_first, 2, SIZE), Ok(vec![2, 3]));
    assert_eq!(ring(&memory).recover(0, 0, SIZE), Ok(vec![]));
    // The marks are removed.
    assert_eq!(ring(&memory).recover(0, 2, SIZE), Ok(vec![]));
}

/// Where nothing is marked, nothing is recovered, whatever the state of the ring.
#[test]
fn a_region_without_marks_fits_every_ring() {
    let memory = fresh();
    let mut first = ring(&memory);
    assert_eq!(first.recover(0, 0, SIZE), Ok(vec![]));
    first.taken(2);
    first.completing(2);
    first.completed(2, 1);
    assert_eq!(ring(&memory).recover(700, 3, SIZE), Ok(vec![]));
}

#[test]
fn each_ring_has_a_part_of_its_own() {
    let memory = fresh();
    let region = map(&memory.0, &memory.1).unwrap();
    let mut rings: Vec<Tracker> = (0..3).map(|index| region.ring(index, SIZE, 0).unwrap()).collect();
    for (head, ring) in rings.iter_mut().enumerate() {
        assert_eq!(ring.recover(0, SIZE, SIZE), Ok(vec![]));
        ring.taken(head as u16);
    }
    for (head, ring) in rings.iter_mut().enumerate() {
        assert_eq!(ring.recover(0, SIZE, SIZE), Ok(vec![head as u16]));
    }
    assert!(region.ring(3, SIZE, 0).is_none());
}

#[test]
fn a_region_that_is_too_small_is_refused() {
    let (message, file) = fresh();
    let refused = |message: VhostUserInflight, file: &File| assert!(map(&message, file).is_err());
    refused(VhostUserInflight { num_queues: 4, ..message }, &file);
    refused(VhostUserInflight { queue_size: 512, ..message }, &file);
    refused(VhostUserInflight { mmap_size: message.mmap_size + 1, ..message }, &file);
    refused(VhostUserInflight { mmap_offset: 4096, ..message }, &file);
    refused(VhostUserInflight { mmap_offset: u64::MAX, ..message }, &file);
    // Half a huge page. The machine need not have any, because nothing is accessed.
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let huge: File = memfd_create("huge", flags).unwrap().into();
    huge.set_len(4 << 20).unwrap();
    refused(VhostUserInflight { mmap_size: 1 << 20, ..message }, &huge);
    assert!(map(&VhostUserInflight { mmap_size: 2 << 20, ..message }, &huge).is_ok());
}

/// QEMU 10.0.13 asks for 128 entries, sends that number back, and has rings of 1024.
#[test]
fn a_ring_larger_than_what_was_asked_for_is_tracked() {
    let (message, file) = Inflight::create(3, SIZE, 4 * SIZE).unwrap();
    assert_eq!((message.num_queues, message.queue_size), (3, SIZE));
    let open = |index, size| map(&message, &file).unwrap().ring(index, size, 0).unwrap();
    for index in 0..3 {
        let mut first = open(index, 4 * SIZE);
        assert_eq!(first.recover(0, 4 * SIZE, 4 * SIZE), Ok(vec![]));
        for head in [31, 2, 8, 7, 16 + index as u16] {
            first.taken(head);
        }
        first.completing(8);
        first.completed(8, 1);
        first.completing(31);
    }
    // Each ring has its own part, and the server was killed before the last step of the last completion.
    for index in 0..3 {
        let left = Ok(vec![2, 7, 16 + index as u16]);
        assert_eq!(open(index, 4 * SIZE).recover(2, 4 * SIZE, 4 * SIZE), left, "ring {index}");
    }
    assert!(map(&message, &file).unwrap().ring(0, 8 * SIZE, 0).is_none(), "larger than was allowed then");
}

/// The entries asked for lie where another server expects them (libvhost-user's vu_set_inflight_fd).
#[test]
fn another_server_finds_the_entries_that_the_front_end_asked_for() {
    let (message, file) = Inflight::create(3, SIZE, 64 * SIZE).unwrap();
    let other_size = (stride(SIZE) * 3) as u64;
    let other = VhostUserInflight { mmap_size: other_size, ..message };
    let mut ours = map(&message, &file).unwrap().ring(2, SIZE, 0).unwrap();
    assert_eq!(ours.recover(0, SIZE, SIZE), Ok(vec![]));
    ours.taken(3);
    let mut theirs = map(&other, &file).unwrap().ring(2, SIZE, 0).unwrap();
    assert_eq!(theirs.recover(0, SIZE, SIZE), Ok(vec![3]));
    theirs.taken(5);
    assert_eq!(map(&message, &file).unwrap().ring(2, SIZE, 0).unwrap().recover(0, SIZE, SIZE), Ok(vec![3, 5]));
}

/// Another server may make its region larger than asked for, and says so in each ring's header.
#[test]
fn a_larger_region_of_another_server_is_recognised() {
    let (made, file) = Inflight::create(3, 4 * SIZE, 4 * SIZE).unwrap();
    let message = VhostUserInflight { queue_size: SIZE, ..made };
    let mut theirs: Vec<Tracker> =
        (0..3).map(|index| map(&made, &file).unwrap().ring(index, 4 * SIZE, 0).unwrap()).collect();
    // The headers of a new region are empty: it has the size that the front-end names.
    assert!(map(&message, &file).unwrap().ring(1, 4 * SIZE, 0).is_none());
    for ring in &mut theirs {
        assert_eq!(ring.recover(0, 0, 4 * SIZE), Ok(vec![]));
        ring.taken(20);
    }
    assert_eq!(ring_of(&message, &file, 2).recover(0, 4 * SIZE, 4 * SIZE), Ok(vec![20]));
    // One header that contradicts the others makes the region count as small.
    theirs[1].half(ENTRIES).store(3, Ordering::Relaxed);
    assert!(map(&message, &file).unwrap().ring(2, 4 * SIZE, 0).is_none());
}

fn ring_of(message: &VhostUserInflight, file: &File, index: u32) -> Tracker {
    map(message, file).unwrap().ring(index, 4 * SIZE, 0).unwrap()
}

/// A ring that does not fit a region of another server is not tracked, and earlier marks are removed: their requests would
/// be done for a later driver.
#[test]
fn a_ring_that_does_not_fit_leaves_no_marks() {
    let memory = fresh();
    let mut first = ring(&memory);
    assert_eq!(first.recover(0, SIZE, SIZE), Ok(vec![]));
    first.taken(3);
    assert!(map(&memory.0, &memory.1).unwrap().ring(1, 2 * SIZE, 0).is_none());
    assert_eq!(ring(&memory).recover(0, SIZE, SIZE), Ok(vec![]));
}

/// Any content of the region: no panic, and only heads of the ring, each once.
#[test]
fn any_content_of_the_region_is_survived() {
    use std::os::unix::fs::FileExt;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut prng = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let (mut good, mut bad) = (0, 0);
    for _ in 0..20_000 {
        let memory = fresh();
        let mut bytes: Vec<u8> = (0..stride(SIZE) * 3).map(|_| prng() as u8).collect();
        if prng() % 8 > 0 {
            // Nearly valid content.
            let at = stride(SIZE);
            bytes[at..at + 12].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, SIZE as u8, 0]);
            bytes[at + LAST_HEAD + 1] = 0;
            bytes[at + LAST_HEAD] %= 10;
            bytes[at + USED_INDEX + 1] = 0;
            bytes[at + USED_INDEX] %= 10;
            for head in 0..usize::from(SIZE) {
                let entry = at + HEADER + ENTRY * head;
                bytes[entry] %= 3;
                bytes[entry + PREVIOUS_HEAD] %= 9;
                bytes[entry + PREVIOUS_HEAD + 1] = 0;
            }
        }
        memory.1.write_all_at(&bytes, 0).unwrap();
        let mut ring = ring(&memory);
        match ring.recover((prng() % 12) as u16, SIZE, if prng() % 2 == 0 { SIZE } else { SIZE / 2 }) {
            Ok(mut heads) => {
                good += 1;
                let found = heads.len();
                heads.sort_unstable();
                heads.dedup();
                assert!(heads.len() == found && heads.iter().all(|&head| head < SIZE));
                (0..SIZE).for_each(|head| ring.taken(head));
                (0..SIZE).for_each(|head| ring.completing(head));
                (0..SIZE).for_each(|head| ring.completed(head, head));
            }
            Err(_) => bad += 1,
        }
        let mut after = vec![0; bytes.len()];
        memory.1.read_exact_at(&mut after, 0).unwrap();
        assert!(after[..stride(SIZE)] == bytes[..stride(SIZE)], "another ring's part was touched");
        assert!(after[2 * stride(SIZE)..] == bytes[2 * stride(SIZE)..], "another ring's part was touched");
    }
    assert!(good > 1000 && bad > 1000, "{good} good, {bad} bad: the garbage is too good or too bad");
}
