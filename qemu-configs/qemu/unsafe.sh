#!/bin/sh
# Cache mode unsafe: unsafe.sh SOCKET IMAGE CONTROL [OPTION...]
# Uses the host's page cache. A guest's flush is acknowledged and ignored.
# A crash of the host loses data that the guest has flushed. For disks that can be created again, such as installations.
socket=${1:?SOCKET} image=${2:?IMAGE} control=${3:?CONTROL}
shift 3
exec virtioblkd --cache unsafe --socket-path "$socket" --blk-file "$image" --control-path "$control" "$@"
