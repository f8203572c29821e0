#!/bin/sh
# For `virtioblkctl snapshot --to 'exec:zfs.sh NAME'`: takes a ZFS snapshot DATASET@NAME of every disk's dataset with one
# command, which within a pool takes all of them or none. A disk is a volume (/dev/zvol/..., /dev/zdN) or a file in a
# dataset. Paths and names of datasets may contain spaces.
set -eu

name=${1:?usage: zfs.sh NAME}
count=${VIRTIOBLK_DISK_COUNT:?zfs.sh is run by virtioblkctl snapshot --to exec:}
if ! command -v zfs >/dev/null; then
	echo "zfs.sh: the program 'zfs' is missing: install zfsutils-linux, or add its directory to PATH" >&2
	exit 1
fi
# The positional parameters are the snapshots.
set --
at=0
while [ "$at" -lt "$count" ]; do
	at=$((at + 1))
	eval "disk=\$VIRTIOBLK_DISK_$at"
	# The links of volumes, and zvol_id, have '+' for a space; no dataset has a '+' in its name.
	case $disk in
	/dev/zvol/*) dataset=$(printf '%s' "${disk#/dev/zvol/}" | tr + ' ') ;;
	/dev/zd*)
		dataset=$("${ZVOL_ID:-/lib/udev/zvol_id}" "$disk")
		dataset=$(printf '%s' "$dataset" | tr + ' ')
		;;
	*) dataset=$(zfs list -H -o name "$disk") ;;
	esac
	new=$dataset@$name
	for old; do
		# Two disks may be files in one dataset.
		[ "$old" != "$new" ] || new=
	done
	[ -z "$new" ] || set -- "$@" "$new"
done
exec zfs snapshot "$@"
