//! UNSAFE. Logs the name of a system call that the filter stopped, and ends the daemon by SIGSYS.
#![allow(unsafe_code)]

use std::io;
use std::ptr::null_mut;

use super::syscall_filter;
use crate::base::logging;

/// Installs the handler. Called once, by main, before the filter is installed. Fails if sigaction(2) fails.
pub(super) fn install() -> io::Result<()> {
    // SAFETY: all zeroes is a valid sigaction (no flags, an empty mask, the default action).
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_sigsys as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` lives through the call; the handler does nothing but what signal-safety(7) allows.
    let done = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, null_mut()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Writes the log line and ends the process. Runs in the thread that made the call. The kernel did not carry the call
/// out, and its return value is undefined, so the program must not continue: the signal is sent again with its default
/// action, which takes effect when the handler returns.
extern "C" fn on_sigsys(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let mut line = StackText { text: [0; 400], len: 0 };
    line.add("error: the sandbox stopped the system call ");
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo.
    let number = unsafe { blocked_call(info) };
    match syscall_filter::name(libc::c_long::from(number)) {
        Some(name) => line.add(name),
        None => line.add("number "),
    }
    if syscall_filter::name(libc::c_long::from(number)).is_none() {
        line.add_number(number.unsigned_abs());
    }
    line.add(
        ": the daemon ends at once. Either an intruder made this call, or the daemon lacks a permission that it needs: report \
         this line; --sandbox no-filter serves without the filter\n",
    );
    logging::last_line(&line.text[..line.len]);
    // SAFETY: plain values; all of these are on signal-safety(7)'s list but gettid and tgkill, which are bare system
    // calls.
    unsafe {
        libc::signal(libc::SIGSYS, libc::SIG_DFL);
        libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::syscall(libc::SYS_gettid), libc::SIGSYS);
    }
}

/// Returns `si_syscall`, which libc does not declare. The structure begins with three ints (and padding), then follow
/// the address of the call and its number (sigaction(2), SIGSYS).
///
/// # Safety
///
/// `info` must be a valid siginfo of a SIGSYS that a filter raised.
unsafe fn blocked_call(info: *const libc::siginfo_t) -> libc::c_int {
    #[repr(C)]
    struct SigsysInfo {
        first: [libc::c_int; 3],
        call_addr: *const libc::c_void,
        syscall: libc::c_int,
    }
    // SAFETY: a siginfo is 128 bytes and aligned as a pointer, and this is the layout that the kernel has filled in.
    unsafe { (*info.cast::<SigsysInfo>()).syscall }
}

/// A text on the stack, because a signal handler must not allocate.
struct StackText {
    text: [u8; 400],
    len: usize,
}

impl StackText {
    fn add(&mut self, text: &str) {
        for byte in text.bytes() {
            if let Some(place) = self.text.get_mut(self.len) {
                *place = byte;
                self.len += 1;
            }
        }
    }

    fn add_number(&mut self, number: u32) {
        let mut divisor = 1_000_000_000;
        while divisor > 1 && number < divisor {
            divisor /= 10;
        }
        while divisor > 0 {
            let digit = [b'0' + (number / divisor % 10) as u8];
            self.add(std::str::from_utf8(&digit).unwrap_or("?"));
            divisor /= 10;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_words_fit_the_line() {
        let mut line = StackText { text: [0; 400], len: 0 };
        for number in [0, 7, 10, 435, 4_000_000_000] {
            line.add_number(number);
            line.add(" ");
        }
        assert_eq!(&line.text[..line.len], b"0 7 10 435 4000000000 ");
        line.add(&"x".repeat(1000));
        assert_eq!(line.len, 400);
    }
}
