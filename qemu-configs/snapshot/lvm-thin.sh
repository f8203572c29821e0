#!/bin/sh
# For `virtioblkctl snapshot --to 'exec:lvm-thin.sh NAME'`: a thin snapshot of every disk, each called VOLUME-NAME.
# The disks are thin volumes that virtioblkd serves as block devices. All or none: what was made goes if one fails.
set -eu

name=${1:?usage: lvm-thin.sh NAME}
made=
trap '[ -z "$made" ] || lvremove --yes --quiet $made >&2' EXIT
trap 'exit 1' HUP INT TERM

for disk in $VIRTIOBLK_DISKS; do
	# "VG LV POOL"; the pool is empty where the volume is not thin.
	set -- $(lvs --noheadings --options vg_name,lv_name,pool_lv "$disk")
	if [ $# != 3 ]; then
		echo "lvm-thin.sh: '$disk' is no thin volume: a snapshot of another kind needs --size, and slows it down" >&2
		exit 1
	fi
	lvcreate --quiet --snapshot --setactivationskip n --name "$2-$name" "$1/$2" >&2
	made="$made $1/$2-$name"
done
made=
