//! PURE. Where the instant's data of each byte is: in the image, or saved.

use std::ops::Range;

use crate::backend::point_in_time::bitmap::Bitmap;

/// Where a range of bytes is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) bytes: Range<u64>,
    /// The bytes' clusters are saved; otherwise the image has them.
    pub(super) saved: bool,
}

/// Cuts a range of bytes, in which clusters have `cluster` bytes each, where the image's part and the saved part meet.
pub(super) fn sources(bytes: Range<u64>, cluster: u64, saved: &Bitmap) -> Vec<Source> {
    let mut found: Vec<Source> = Vec::new();
    let mut at = bytes.start;
    while at < bytes.end {
        let number = at / cluster;
        let is_saved = saved.first_clear(number..number + 1).is_none();
        let end = ((number + 1) * cluster).min(bytes.end);
        match found.last_mut() {
            Some(last) if last.saved == is_saved => last.bytes.end = end,
            _ => found.push(Source { bytes: at..end, saved: is_saved }),
        }
        at = end;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_where_the_sources_meet() {
        let saved = Bitmap::new(10).unwrap();
        saved.set(2..4);
        let found = |bytes| -> Vec<(u64, u64, bool)> {
            sources(bytes, 100, &saved).into_iter().map(|part| (part.bytes.start, part.bytes.end, part.saved)).collect()
        };
        assert_eq!(found(0..1000), [(0, 200, false), (200, 400, true), (400, 1000, false)]);
        assert_eq!(found(250..251), [(250, 251, true)]);
        assert_eq!(found(199..201), [(199, 200, false), (200, 201, true)]);
        assert_eq!(found(7..7), []);
    }
}
