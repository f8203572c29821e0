#!/bin/sh
# Cache mode writethrough: writethrough.sh SOCKET IMAGE CONTROL [OPTION...]
# The host's page cache. A write is acknowledged when it is durable.
# The guest sees a write-through cache and flushes nothing. Reads come from the host's cache.
socket=${1:?SOCKET} image=${2:?IMAGE} control=${3:?CONTROL}
shift 3
exec virtioblkd --cache writethrough --socket-path "$socket" --blk-file "$image" --control-path "$control" "$@"
