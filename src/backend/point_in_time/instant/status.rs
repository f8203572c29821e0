//! PURE. Which parts of a range were holes at the instant.
//!
//! A client may ask for almost 4 GiB at once, and the thread that finds the reply is the one that saves what the guest is
//! about to overwrite. So a reply takes a bounded number of steps and may describe less than was asked, as NBD allows.

use std::ops::Range;

use super::StatusExtent;
use crate::backend::point_in_time::bitmap::Bitmap;

/// The most extents that one reply examines.
const MAX_STEPS: usize = 256;

/// The most times that one reply asks the image for its next data, which is a system call or two.
const MAX_LOOKUPS: usize = 64;

/// Lists holes and data of a range that is not empty, in order and without gaps, from its start on. `image` returns where the
/// image's hole or data at a byte of no saved cluster ends, and whether it is a hole. `zero` has the saved clusters that held
/// only zeroes.
pub(super) fn list(
    bytes: Range<u64>,
    cluster: u64,
    saved: &Bitmap,
    zero: &Bitmap,
    mut image: impl FnMut(u64) -> Result<(u64, bool), String>,
) -> Result<Vec<StatusExtent>, String> {
    let mut found: Vec<StatusExtent> = Vec::new();
    let last = bytes.end.div_ceil(cluster);
    let (mut at, mut lookups) = (bytes.start, 0);
    for _ in 0..MAX_STEPS {
        if at >= bytes.end || lookups == MAX_LOOKUPS {
            break;
        }
        let first = at / cluster;
        let (end, hole) = match saved.first_clear(first..last) {
            Some(clear) if clear == first => {
                lookups += 1;
                let (end, hole) = image(at)?;
                (end.min(saved.first_set(first..last).unwrap_or(last) * cluster), hole)
            }
            clear => {
                let run = first..clear.unwrap_or(last);
                let hole = zero.first_clear(first..first + 1).is_none();
                let other = if hole { zero.first_clear(run.clone()) } else { zero.first_set(run.clone()) };
                (other.unwrap_or(run.end) * cluster, hole)
            }
        };
        let len = end.min(bytes.end) - at;
        at += len;
        match found.last_mut() {
            Some(before) if before.hole == hole => before.len += len,
            _ => found.push(StatusExtent { len, hole }),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: u64 = 100;

    /// The bitmaps of saved clusters, and of those among them that held zeroes.
    fn bitmaps(len: u64, saved: impl Iterator<Item = u64>, zero: impl Iterator<Item = u64>) -> (Bitmap, Bitmap) {
        let bitmaps = (Bitmap::new(len).unwrap(), Bitmap::new(len).unwrap());
        for cluster in saved {
            bitmaps.0.set(cluster..cluster + 1);
        }
        for cluster in zero {
            bitmaps.1.set(cluster..cluster + 1);
        }
        bitmaps
    }

    fn pairs(found: &[StatusExtent]) -> Vec<(u64, bool)> {
        found.iter().map(|extent| (extent.len, extent.hole)).collect()
    }

    #[test]
    fn extents_come_from_the_image_and_from_what_is_saved() {
        let (saved, zero) = bitmaps(10, [2, 3, 4, 7].into_iter(), [3].into_iter());
        // The image's own data begins at byte 550.
        let image = |at: u64| Ok(if at < 550 { (550, true) } else { (2000, false) });
        let found = |bytes| pairs(&list(bytes, CLUSTER, &saved, &zero, image).unwrap());
        assert_eq!(found(0..960), [(200, true), (100, false), (100, true), (100, false), (50, true), (410, false)]);
        assert_eq!(found(310..320), [(10, true)]);
        assert_eq!(found(599..601), [(2, false)]);
        assert_eq!(list(0..10, CLUSTER, &saved, &zero, |_| Err("no".into())), Err("no".into()));
    }

    /// The guest's writes wait for the thread that does this.
    #[test]
    fn a_reply_is_bounded_however_long_the_request() {
        let clusters = 65_536;
        let (saved, zero) = bitmaps(clusters, 0..0, 0..0);
        let mut lookups = 0;
        let mut image = |at: u64| {
            lookups += 1;
            Ok((at + 1, at.is_multiple_of(2)))
        };
        let found = list(0..clusters * CLUSTER, CLUSTER, &saved, &zero, &mut image).unwrap();
        assert_eq!((found.len(), lookups), (MAX_LOOKUPS, MAX_LOOKUPS));
        let (saved, zero) = bitmaps(clusters, 0..clusters, (0..clusters).step_by(2));
        let found = list(0..clusters * CLUSTER, CLUSTER, &saved, &zero, |_| panic!("all is saved")).unwrap();
        assert_eq!(found.len(), MAX_STEPS);
        // One that has a single status needs one step.
        let (saved, zero) = bitmaps(clusters, 0..0, 0..0);
        let mut lookups = 0;
        let found = list(0..clusters * CLUSTER, CLUSTER, &saved, &zero, |_| {
            lookups += 1;
            Ok((u64::MAX, false))
        });
        assert_eq!((pairs(&found.unwrap()), lookups), (vec![(clusters * CLUSTER, false)], 1));
    }
}
