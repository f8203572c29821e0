//! Recognizes images of other formats, which are served as raw: the guest then sees the format's tables instead of a disk.
//! Only a warning follows, since a guest can write such a header itself.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use super::Backend;

/// Bytes of an image's start that show its format.
pub(crate) const HEAD: usize = 4096;
/// Bytes of an image's end that show its format: the footer of a VHD.
pub(crate) const TAIL: usize = 512;

/// The first and the last bytes of an image, a few KiB at most.
#[derive(Default)]
pub struct ImageEnds {
    /// The bytes from byte 0 on.
    pub head: Vec<u8>,
    /// The bytes up to the last one: the last sector, and perhaps more.
    pub tail: Vec<u8>,
}

/// The formats by what they begin with; their names are those of `qemu-img`.
const MAGICS: [(&[u8], &str); 8] = [
    (b"QED\0", "qed"),
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
    (b"conectix", "vpc"),
    (b"vhdxfile", "vhdx"),
    (b"LUKS\xba\xbe", "luks"),
    (b"QFI\xfb\0\0\0\x01", "qcow"),
];
const QCOW2: &[u8] = b"QFI\xfb";
/// VDI_SIGNATURE of QEMU's block/vdi.c.
const VDI: [u8; 4] = 0xbeda_107f_u32.to_le_bytes();
/// The byte at which the header of a VDI image has [`VDI`].
const VDI_AT: usize = 0x40;

/// Returns the format that an image's header or footer shows, as `qemu-img` calls it; `None`: neither shows one.
pub(crate) fn recognize(ends: &ImageEnds) -> Option<&'static str> {
    let head = ends.head.as_slice();
    if let Some((_, name)) = MAGICS.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Some(name);
    }
    if head.starts_with(QCOW2) {
        return Some("qcow2");
    }
    if head.get(VDI_AT..VDI_AT + VDI.len()) == Some(VDI.as_slice()) {
        return Some("vdi");
    }
    // A VHD of fixed size is the raw disk and a footer of 512 bytes.
    let footer = ends.tail.len().checked_sub(TAIL).map(|start| &ends.tail[start..]);
    footer.is_some_and(|footer| footer.starts_with(b"conectix")).then_some("vpc")
}

/// Returns the format's name as people write it.
fn full_name(format: &str) -> &str {
    match format {
        "vpc" => "VHD (vpc)",
        "luks" => "LUKS",
        "vmdk" => "VMDK",
        "vdi" => "VDI",
        "vhdx" => "VHDX",
        other => other,
    }
}

/// Returns the text that says how to make a raw image of one in `format`.
pub(crate) fn conversion(format: &str) -> String {
    match format {
        "luks" => "convert it (qemu-img convert --object secret,id=key,file=PASSPHRASE --image-opts \
                   driver=luks,key-secret=key,file.filename=IMAGE -O raw NEW) and serve NEW, or serve the device that \
                   cryptsetup open makes"
            .into(),
        format => format!("convert it (qemu-img convert -f {format} -O raw IMAGE NEW) and serve NEW"),
    }
}

/// Returns the text that names the format and where it was found: `it is an image of the format qcow2 by its header`.
pub(crate) fn finding(format: &str) -> String {
    let place = if format == "vpc" { "header or footer" } else { "header" };
    format!("it is an image of the format {} by its {place}", full_name(format))
}

fn warning(format: &str, is_rbd: bool) -> String {
    let fix = match format {
        "luks" if is_rbd => "give --rbd-encryption and --rbd-passphrase-file".to_string(),
        format => conversion(format),
    };
    format!(
        "{}, and it is served as raw: the guest sees the bytes of the format, not the disk in it; {fix}. If the guest \
         itself wrote the header, --format raw says that it is meant",
        finding(format)
    )
}

/// Checks an image's format once, in a thread of its own, because the image's storage may hang.
#[derive(Default)]
pub(crate) struct FormatCheck {
    found: OnceLock<&'static str>,
    /// The thread has not ended.
    is_running: Mutex<bool>,
    ended: Condvar,
}

impl FormatCheck {
    /// Starts the check. Called by main once the sandbox has been entered.
    pub(crate) fn start(self: &Arc<Self>, image: Arc<dyn Backend>) {
        let check = Arc::clone(self);
        *self.lock() = true;
        let work = move || {
            check.run(&*image);
            drop(image);
            *check.lock() = false;
            check.ended.notify_all();
        };
        if let Err(error) = thread::Builder::new().name("format".into()).spawn(work) {
            *self.lock() = false;
            log::warn!("cannot start a thread to check whether the image is raw: {error}");
        }
    }

    /// Returns the format that was found; `None`: the check has not ended, or found none.
    pub(crate) fn found(&self) -> Option<&'static str> {
        self.found.get().copied()
    }

    /// Waits until the check no longer uses the image, for `limit` at most.
    pub(crate) fn wait(&self, limit: Duration) {
        let ended = self.ended.wait_timeout_while(self.lock(), limit, |is_running| *is_running);
        drop(ended.unwrap_or_else(PoisonError::into_inner));
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.is_running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, image: &dyn Backend) {
        match image.info().ends() {
            Ok(ends) => {
                if let Some(format) = recognize(&ends) {
                    let is_rbd = image.info().image_status().rbd.is_some();
                    log::warn!("{}: {}", image.describe(), warning(format, is_rbd));
                    // Never set before: the check runs once.
                    let _ = self.found.set(format);
                }
            }
            // The guest gets this error when it reads there itself.
            Err(error) => log::debug!("{}: cannot read its format: {error}", image.describe()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(at: usize, magic: &[u8]) -> ImageEnds {
        let mut head = vec![0; HEAD];
        head[at..at + magic.len()].copy_from_slice(magic);
        ImageEnds { head, tail: vec![0; TAIL] }
    }

    #[test]
    fn each_format_is_known_by_its_magic() {
        for (magic, format) in [
            (&b"QFI\xfb\0\0\0\x03"[..], "qcow2"),
            (b"QFI\xfb\0\0\0\x02", "qcow2"),
            (b"QFI\xfb\0\0\0\x01", "qcow"),
            (b"QED\0", "qed"),
            (b"KDMV\x01", "vmdk"),
            (b"COWD\x01", "vmdk"),
            (b"# Disk DescriptorFile\nversion=1", "vmdk"),
            (b"conectix", "vpc"),
            (b"vhdxfile", "vhdx"),
            (b"LUKS\xba\xbe\0\x02", "luks"),
        ] {
            assert_eq!(recognize(&of(0, magic)), Some(format));
            assert_eq!(recognize(&of(1, magic)), None, "{format} at another place");
            assert_eq!(recognize(&ImageEnds { head: magic.to_vec(), tail: Vec::new() }), Some(format), "a short image");
            assert_eq!(recognize(&ImageEnds { head: magic[..3].to_vec(), tail: Vec::new() }), None);
        }
        assert_eq!(recognize(&of(0x40, &[0x7f, 0x10, 0xda, 0xbe])), Some("vdi"));
    }

    #[test]
    fn a_vhd_of_fixed_size_is_known_by_its_footer() {
        let mut ends = of(0, b"\xeb\x63\x90 a boot sector");
        assert_eq!(recognize(&ends), None);
        ends.tail[..8].copy_from_slice(b"conectix");
        assert_eq!(recognize(&ends), Some("vpc"));
        // Of a longer end, only the last sector counts.
        ends.tail.splice(..0, [0; 512]);
        assert_eq!(recognize(&ends), Some("vpc"));
        ends.tail.extend([0; 512]);
        assert_eq!(recognize(&ends), None);
    }

    #[test]
    fn the_warning_says_how_to_fix_it() {
        for (format, is_rbd, words) in [
            ("qcow2", false, "qemu-img convert -f qcow2 -O raw"),
            ("vpc", false, "VHD"),
            ("luks", false, "driver=luks"),
            ("luks", true, "--rbd-encryption"),
        ] {
            let text = warning(format, is_rbd);
            assert!(text.contains(words) && text.contains("--format raw"), "{text}");
        }
    }
}
