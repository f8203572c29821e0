//! The quiesce socket: QMP's dialect on a Unix socket.
