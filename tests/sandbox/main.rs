//! The sandbox: what the daemon has given up, that what it gave up is refused or ends it, and that it can still do all that
//! it is for. (All other tests of the real daemon run in the sandbox too: it is on by default.)

mod calls;
mod copy_dirs;
mod features;
mod place;
mod users;
