//! Where an image holds data, as the threads ask that read it for an instant.

use crate::backend::Backend;

/// Returns what [`Backend::next_data`] does, for an instant of `size` bytes of this image. An image that was shrunk since the
/// instant is an error: what was cut off would look like a hole. The message is for the operator.
pub(super) fn next_data(image: &dyn Backend, size: u64, at: u64) -> Result<Option<(u64, u64)>, String> {
    let found = image.next_data(at).map_err(|error| {
        format!("cannot find the image's holes from byte {at} on ({error}); check the image's medium")
    })?;
    let now = image.geometry().size;
    if now < size {
        return Err(format!(
            "the image was shrunk from {size} bytes to {now}, so its end can no longer be read; take a new snapshot"
        ));
    }
    Ok(found)
}
