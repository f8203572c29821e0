# What the guest of tests/guest/power_cut.rs can be told to do; comes after tests/guest/serve.sh. Its only disk is /dev/vda,
# whose volatile cache and whose power are the host's.

# A filesystem on the whole disk and in it a file of $1 bytes without a single block.
make_file() {
	mkfs.ext4 -q -F -b 4096 -J size=4 -E lazy_itable_init=0,nodiscard /dev/vda >/tmp/mkfs.log 2>&1 ||
		{ cat /tmp/mkfs.log; return 1; }
	mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && truncate -s "$1" /mnt/disk.img && sync
}

# From now on this kernel drops all flushes of the disk and says that they are done.
lie() {
	echo 'write through' >/sys/block/vda/queue/write_cache
}

# load PLAN: the front-end (the test program itself), as the plan (JSON) says.
load() {
	VIRTIOBLKD_POWER_PLAN=$1 power_cut --ignored --exact power_cut::front_end --nocapture >/tmp/load.log 2>&1 ||
		{ cat /tmp/load.log /tmp/virtioblkd.log; return 1; }
}
