//! The virtio-blk device model behind vhost-user. Knows no files.
