# What the guest of tests/guest/replicas.rs can be told to do; comes after serve.sh and before shell.sh. It has two disks,
# /dev/vda and /dev/vdb, and stores everything twice, or with a checksum, on them.

# front_end SCRIBBLES: one run of the front-end (the test program itself) on what is served.
front_end() {
	SOCKET=/tmp/vhost SCRIBBLES=$1 replicas --ignored --exact replicas::front_end --nocapture >/tmp/front_end.log 2>&1 ||
		{ cat /tmp/front_end.log /tmp/virtioblkd.log; return 1; }
}

# --- md RAID1 ---

# make_raid1 KIB: /dev/md0. Both halves are empty, so there is nothing to make equal at first.
make_raid1() {
	export MDADM_NO_UDEV=1
	mdadm --quiet --create /dev/md0 --run --level=1 --raid-devices=2 --assume-clean --bitmap=none --size="$1" \
		/dev/vda /dev/vdb && wait_for '[ -b /dev/md0 ]'
}

# Prints what differs, in sectors, as the kernel's own comparison has it. The next run writes everything anew.
compare_raid1() {
	local md=/sys/block/md0/md
	echo check >$md/sync_action && wait_for "[ \"\$(cat $md/sync_action)\" = idle ]" || return 1
	echo "differ: $(cat $md/mismatch_cnt)"
}

# --- DRBD: two resources in one kernel, each the other's peer ---

# make_drbd KIB: /dev/drbd0, primary, whose peer is /dev/drbd1.
make_drbd() {
	local minor disk
	mkdir -p /var/lock /var/lib/drbd && ifconfig lo 127.0.0.1 up &&
		# What DRBD would call to tell the administrator.
		echo /bin/true >/sys/module/drbd/parameters/usermode_helper || return 1
	for minor in 0 1; do
		disk=/dev/vd$(echo $minor | tr 01 ab)
		# A fixed and high rate: DRBD would find its own over many seconds.
		drbdmeta --force $minor v08 "$disk" internal create-md &&
			drbdsetup-84 new-resource r$minor && drbdsetup-84 new-minor r$minor $minor 0 &&
			drbdsetup-84 attach $minor "$disk" "$disk" internal --size="$1k" --c-plan-ahead=0 --resync-rate=1G || return 1
	done
	connect_drbd && wait_for 'drbd_is cs:Connected' &&
		drbdsetup-84 new-current-uuid --clear-bitmap 0 && drbdsetup-84 primary 0 --force &&
		wait_for 'drbd_is ds:UpToDate/UpToDate && [ -b /dev/drbd0 ]'
} 2>&1

# connect_drbd OPTION...: of the connection, besides the usual ones.
connect_drbd() {
	local here=ipv4:127.0.0.1:7790 there=ipv4:127.0.0.1:7791 net="--protocol=C --verify-alg=crc32c"
	drbdsetup-84 connect r0 $here $there $net "$@" && drbdsetup-84 connect r1 $there $here $net "$@"
}

disconnect_drbd() {
	drbdsetup-84 disconnect ipv4:127.0.0.1:7790 ipv4:127.0.0.1:7791 &&
		drbdsetup-84 disconnect ipv4:127.0.0.1:7791 ipv4:127.0.0.1:7790
}

# reconnect_drbd OPTION...: makes the replicas equal where DRBD knows that they differ.
reconnect_drbd() {
	disconnect_drbd && connect_drbd "$@" && wait_for 'drbd_is cs:Connected && drbd_is ds:UpToDate/UpToDate'
}

# drbd_is WORD: whether /proc/drbd has it of the first device.
drbd_is() {
	grep -q "^ 0:.* $1 " /proc/drbd
}

# Prints what differs, in KiB, as DRBD's own comparison has it; then makes the replicas equal again.
compare_drbd() {
	local differ
	drbdsetup-84 verify 0 && wait_for 'drbd_is cs:Connected' || return 1
	differ=$(sed -n '/^ 0:/ { n; s/.* oos://p }' /proc/drbd)
	echo "differ: $differ"
	[ "$differ" = 0 ] || reconnect_drbd
}

# Prints how often DRBD's own checksum found that a buffer was changed while it was sent, since this was last asked.
drbd_changed_buffers() {
	wait_for 'drbd_is cs:Connected && drbd_is ds:UpToDate/UpToDate' || return 1
	echo "changed: $(dmesg -c | grep -c 'buffer modified by upper layers')"
}

# --- btrfs, which keeps a checksum of each block ---

# make_btrfs KIB: an image of that size in a new filesystem.
make_btrfs() {
	mkfs.btrfs --quiet --data single --metadata single /dev/vda && mkdir -p /mnt &&
		mount -t btrfs /dev/vda /mnt && make_image "$1" datacow
}

# make_image KIB OPTION: a new image, made while the filesystem has that mount option.
make_image() {
	rm -f /mnt/disk.img && mount -o "remount,$2" /mnt && truncate -s "$1k" /mnt/disk.img
}

# Prints how many blocks do not fit their checksums; then the image is a new one, since no server would start on one
# whose first block cannot be read.
compare_btrfs() {
	local before kib
	before=$(corrupt_blocks) && umount /mnt && mount -t btrfs /dev/vda /mnt || return 1
	# Reading such a block is an error.
	dd if=/mnt/disk.img of=/dev/null bs=64k iflag=direct conv=noerror 2>/tmp/dd
	echo "differ: $(($(corrupt_blocks) - before))"
	kib=$(($(stat -c %s /mnt/disk.img) / 1024)) && make_image $kib datacow
}

corrupt_blocks() {
	sed -n 's/^corruption_errs //p' /sys/fs/btrfs/*-*/devinfo/1/error_stats
}

# --- dm-integrity, which keeps a checksum of each sector ---

# make_integrity KIB: without its journal (D). With it (J) the data is copied into the journal, and the checksum is that
# of the copy.
make_integrity() {
	local sectors
	# The kernel formats the empty disk for one sector, and only then is there a device of any size.
	for sectors in 1 $(($1 * 2)); do
		[ ! -e /dev/dm-0 ] || dmsetup remove --noudevsync integrity || return 1
		# Named as integritysetup names it.
		dmsetup create --noudevsync --noudevrules --uuid CRYPT-INTEGRITY-replicas integrity \
			--table "0 $sectors integrity /dev/vda 0 4 D 1 internal_hash:crc32c" || return 1
	done
	clear_integrity
}

# Gives every sector a checksum.
clear_integrity() {
	dd if=/dev/zero of=/dev/dm-0 bs=64k oflag=direct 2>/tmp/dd
	grep -q 'No space left' /tmp/dd
}

# Prints how many times 64 KiB cannot be read because a sector does not fit its checksum; then all can be read again.
compare_integrity() {
	dd if=/dev/dm-0 of=/dev/null bs=64k iflag=direct conv=noerror 2>/tmp/dd
	echo "differ: $(grep -c '^dd: ' /tmp/dd)"
	clear_integrity
}
