#!/bin/sh
# Cache mode directsync: directsync.sh SOCKET IMAGE CONTROL [OPTION...]
# Opens the image with O_DIRECT. A write is acknowledged when it is durable.
# The guest sees a write-through cache and sends no flushes. For guests that may not flush when they should.
socket=${1:?SOCKET} image=${2:?IMAGE} control=${3:?CONTROL}
shift 3
exec virtioblkd --cache directsync --socket-path "$socket" --blk-file "$image" --control-path "$control" "$@"
