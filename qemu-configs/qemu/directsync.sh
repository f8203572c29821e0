#!/bin/sh
# Cache mode directsync: directsync.sh SOCKET IMAGE CONTROL [OPTION...]
# O_DIRECT. A write is acknowledged when it is durable.
# The guest sees a write-through cache and flushes nothing. For guests that cannot be trusted to flush.
socket=${1:?SOCKET} image=${2:?IMAGE} control=${3:?CONTROL}
shift 3
exec virtioblkd --cache directsync --socket-path "$socket" --blk-file "$image" --control-path "$control" "$@"
