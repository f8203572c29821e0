#!/bin/sh
# For `virtioblkctl snapshot --to 'exec:lvm-thin.sh NAME'`: a thin snapshot of every disk, each called VOLUME-NAME.
# The disks are thin volumes that virtioblkd serves as block devices. All or none: what was made goes if one fails.
set -eu

name=${1:?usage: lvm-thin.sh NAME}
count=${VIRTIOBLK_DISK_COUNT:?lvm-thin.sh is run by virtioblkctl snapshot --to exec:}
for tool in lvs lvcreate lvremove; do
	if ! command -v "$tool" >/dev/null; then
		echo "lvm-thin.sh: there is no '$tool': install lvm2, or add the directory that it is in to PATH" >&2
		exit 1
	fi
done
made=
# Names of volumes have no spaces.
trap '[ -z "$made" ] || lvremove --yes --quiet $made >&2' EXIT
trap 'exit 1' HUP INT TERM

at=0
while [ "$at" -lt "$count" ]; do
	at=$((at + 1))
	eval "disk=\$VIRTIOBLK_DISK_$at"
	if ! found=$(lvs --noheadings --options vg_name,lv_name,pool_lv "$disk"); then
		echo "lvm-thin.sh: lvs does not know '$disk': it is no volume of LVM's" >&2
		exit 1
	fi
	# "VG LV POOL"; the pool is empty where the volume is not thin.
	set -- $found
	if [ $# != 3 ]; then
		echo "lvm-thin.sh: '$disk' is no thin volume: a snapshot of another kind needs --size, and slows it down" >&2
		exit 1
	fi
	lvcreate --quiet --snapshot --setactivationskip n --name "$2-$name" "$1/$2" >&2
	made="$made $1/$2-$name"
done
made=
