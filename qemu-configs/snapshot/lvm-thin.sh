#!/bin/sh
# For `virtioblkctl snapshot --to 'exec:lvm-thin.sh NAME'`: takes a thin snapshot VOLUME-NAME of every disk. The disks are
# thin volumes that virtioblkd serves as block devices. If one snapshot fails, the others are removed.
set -eu

name=${1:?usage: lvm-thin.sh NAME}
count=${VIRTIOBLK_DISK_COUNT:?lvm-thin.sh is run by virtioblkctl snapshot --to exec:}
for tool in lvs lvcreate lvremove; do
	if ! command -v "$tool" >/dev/null; then
		echo "lvm-thin.sh: the program '$tool' is missing: install lvm2, or add its directory to PATH" >&2
		exit 1
	fi
done
made=
# $made is not quoted: it is a list, and names of volumes contain no spaces.
trap '[ -z "$made" ] || lvremove --yes --quiet $made >&2' EXIT
trap 'exit 1' HUP INT TERM

at=0
while [ "$at" -lt "$count" ]; do
	at=$((at + 1))
	eval "disk=\$VIRTIOBLK_DISK_$at"
	if ! found=$(lvs --noheadings --options vg_name,lv_name,pool_lv "$disk"); then
		echo "lvm-thin.sh: '$disk' is not an LVM volume (lvs does not find it): use another --to for this disk" >&2
		exit 1
	fi
	# The output is "VG LV POOL". POOL is empty if the volume is not thin.
	set -- $found
	if [ $# != 3 ]; then
		echo "lvm-thin.sh: '$disk' is not a thin volume: a snapshot of another kind needs --size, and slows the volume down" >&2
		exit 1
	fi
	lvcreate --quiet --snapshot --setactivationskip n --name "$2-$name" "$1/$2" >&2
	made="$made $1/$2-$name"
done
made=
