#!/bin/sh
# Cache mode none: none.sh SOCKET IMAGE CONTROL [OPTION...]
# Opens the image with O_DIRECT. A write is acknowledged when the host's device has it; a guest's flush is synced.
# The guest sees a write-back cache. This mode is the default, and right for most disks.
socket=${1:?SOCKET} image=${2:?IMAGE} control=${3:?CONTROL}
shift 3
exec virtioblkd --cache none --socket-path "$socket" --blk-file "$image" --control-path "$control" "$@"
