//! Recognizes images of other formats, which are served as raw: the guest then sees the format's tables instead of a disk.
//! Only a warning follows, since a guest can write such a header itself.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use super::Backend;

/// Bytes of an image's start that show its format.
pub(crate) const HEAD: usize = 4096;
/// Bytes of an image's end that do: the footer of a VHD.
pub(crate) const TAIL: usize = 512;

/// The first and the last bytes of an image, a few KiB at most.
#[derive(Default)]
pub struct ImageEnds {
    /// From byte 0.
    pub head: Vec<u8>,
    /// Up to the last byte; the last sector and perhaps more.
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
/// VDI_SIGNATURE of QEMU's block/vdi.c, and where it stands.
const VDI: [u8; 4] = 0xbeda_107f_u32.to_le_bytes();
const VDI_AT: usize = 0x40;

/// The format that an image has by its header or footer, as `qemu-img` calls it; `None`: as far as can be seen it is raw.
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

/// What people call the format.
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

/// How to make a raw image of one in `format`.
pub(crate) fn conversion(format: &str) -> String {
    match format {
        "luks" => "convert it (qemu-img convert --object secret,id=key,file=PASSPHRASE --image-opts \
                   driver=luks,key-secret=key,file.filename=IMAGE -O raw NEW) and serve NEW, or serve the device that \
                   cryptsetup open makes"
            .into(),
        format => format!("convert it (qemu-img convert -f {format} -O raw IMAGE NEW) and serve NEW"),
    }
}

/// `it is a qcow2 image by its header`.
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

/// Looks at an image once, in a thread of its own: the image's storage may hang.
#[derive(Default)]
pub(crate) struct FormatCheck {
    found: OnceLock<&'static str>,
    runs: Mutex<bool>,
    ended: Condvar,
}

impl FormatCheck {
    /// Starts to look. Once the sandbox has been entered; main.
    pub(crate) fn start(self: &Arc<Self>, image: Arc<dyn Backend>) {
        let check = Arc::clone(self);
        *self.lock() = true;
        let work = move || {
            check.look(&*image);
            drop(image);
            *check.lock() = false;
            check.ended.notify_all();
        };
        if let Err(error) = thread::Builder::new().name("format".into()).spawn(work) {
            *self.lock() = false;
            log::warn!("no thread to see whether the image is raw: {error}");
        }
    }

    /// The format that was found, unless the image is raw.
    pub(crate) fn found(&self) -> Option<&'static str> {
        self.found.get().copied()
    }

    /// Waits until the image is not used here any more, at most for `limit`.
    pub(crate) fn wait(&self, limit: Duration) {
        let ended = self.ended.wait_timeout_while(self.lock(), limit, |runs| *runs);
        drop(ended.unwrap_or_else(PoisonError::into_inner));
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self, image: &dyn Backend) {
        match image.info().ends() {
            Ok(ends) => {
                if let Some(format) = recognize(&ends) {
                    let is_rbd = image.info().image_status().rbd.is_some();
                    log::warn!("{}: {}", image.describe(), warning(format, is_rbd));
                    // The only one who sets it.
                    let _ = self.found.set(format);
                }
            }
            // The guest's business, when it reads that.
            Err(error) => log::debug!("{}: its format cannot be seen: {error}", image.describe()),
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
        // Of a longer piece the last sector counts.
        ends.tail.splice(..0, [0; 512]);
        assert_eq!(recognize(&ends), Some("vpc"));
        ends.tail.extend([0; 512]);
        assert_eq!(recognize(&ends), None);
    }

    #[test]
    fn the_warning_says_what_to_do() {
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
