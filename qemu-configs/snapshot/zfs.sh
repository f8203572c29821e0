#!/bin/sh
# For `virtioblkctl snapshot --to 'exec:zfs.sh NAME'`: a ZFS snapshot DATASET@NAME under every disk, all by one command:
# within a pool it makes all or none. A disk is a volume (/dev/zvol/..., /dev/zdN) or a file in a dataset.
set -eu

name=${1:?usage: zfs.sh NAME}
snapshots=
for disk in $VIRTIOBLK_DISKS; do
	case $disk in
	/dev/zvol/*) dataset=${disk#/dev/zvol/} ;;
	/dev/zd*) dataset=$(/lib/udev/zvol_id "$disk") ;;
	*) dataset=$(zfs list -H -o name "$disk") ;;
	esac
	case " $snapshots " in
	*" $dataset@$name "*) ;; # Two files in one dataset.
	*) snapshots="$snapshots $dataset@$name" ;;
	esac
done
# Split at the spaces: dataset names have none.
exec zfs snapshot $snapshots
