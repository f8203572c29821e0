//! One vhost-user connection: the messages of the front-end, and the rings that these set up, start and stop.
//!
//! | file | what |
//! |---|---|
//! | `session` | one front-end's session: socket, handler, message layer |
//! | `session_end` | why a session ended |
//! | `handler` | the messages; every change of a ring goes through `vring` |
//! | `vring` | one ring as the front-end describes it, stopped (owned by the handler) or running (owned by its worker) |
//! | `activation` | acquires the image before the first ring starts and releases it after the last one has stopped |
//! | `backend_channel` | messages from this back-end to the front-end (VHOST_USER_SET_BACKEND_REQ_FD) |
//! | `eventfd` | checks that a front-end's kick, call and error descriptors are eventfds |
//! | `first_bytes` | whether a connection speaks vhost-user |
//! | `save_restore` | the state of a session that another process continues |

pub(super) mod activation;
pub(super) mod backend_channel;
pub(super) mod eventfd;
pub(super) mod first_bytes;
pub(super) mod handler;
pub(crate) mod save_restore;
pub(super) mod session;
pub(super) mod session_end;
pub(super) mod vring;
