#!/bin/sh
# Cache mode writeback: writeback.sh SOCKET IMAGE CONTROL [OPTION...]
# Uses the host's page cache. A write is acknowledged when the cache has it; a guest's flush is synced.
# The guest sees a write-back cache. For filesystems without O_DIRECT, and images that several guests read.
socket=${1:?SOCKET} image=${2:?IMAGE} control=${3:?CONTROL}
shift 3
exec virtioblkd --cache writeback --socket-path "$socket" --blk-file "$image" --control-path "$control" "$@"
