#!/bin/sh
# Cache mode unsafe: unsafe.sh SOCKET IMAGE CONTROL [OPTION...]
# The host's page cache. A guest's flush is acknowledged and ignored.
# A crash of the host loses what the guest believes safe. For disks that can be made anew, such as installations.
socket=${1:?SOCKET} image=${2:?IMAGE} control=${3:?CONTROL}
shift 3
exec virtioblkd --cache unsafe --socket-path "$socket" --blk-file "$image" --control-path "$control" "$@"
