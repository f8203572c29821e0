#!/bin/sh
# Cache mode writethrough: writethrough.sh SOCKET IMAGE CONTROL [OPTION...]
# Uses the host's page cache. A write is acknowledged when it is durable.
# The guest sees a write-through cache and sends no flushes. Reads are served from the host's page cache.
socket=${1:?SOCKET} image=${2:?IMAGE} control=${3:?CONTROL}
shift 3
exec virtioblkd --cache writethrough --socket-path "$socket" --blk-file "$image" --control-path "$control" "$@"
