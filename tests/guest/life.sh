# What the guests of tests/guest/life.rs do; comes before shell.sh.

# The guest before this one may have been reset in the middle of a line.
echo

# ledger.py DEVICE NAME OFFSET FIRST: rounds of eight blocks of 4 KiB, each full of its round's number, written and
# synced; then the number is said. tests/guest/ledger.rs knows where they are.
cat >/tmp/ledger.py <<'PYTHON'
import os, sys
device, name, offset, round = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
disk = os.open(device, os.O_WRONLY)
while not os.path.exists("/tmp/stop"):
    for block in range(round * 8, round * 8 + 8):
        os.pwrite(disk, round.to_bytes(8, "little") * 512, offset + block * 37 % 512 * 4096)
    os.fsync(disk)
    os.write(1, b"@kept %s %d\n" % (name.encode(), round))
    round += 1
PYTHON

# keep DEVICE NAME OFFSET FIRST: the ledger in the background; its end, if it fails, is the job's.
keep() {
	( python3 -IS /tmp/ledger.py "$@" || echo "@@exit: ledger $2" ) &
	kept="$kept $!"
}

# Ends all ledgers.
close_ledgers() {
	local pid
	touch /tmp/stop
	for pid in $kept; do wait "$pid" || return 1; done
	kept=
	rm /tmp/stop
}

# read_all DEVICE: reads it round and round in the background, past the page cache. Errors are no matter: the device may go.
read_all() {
	( while [ ! -e /tmp/stop-reading ]; do dd if="$1" of=/dev/null bs=64k iflag=direct 2>/dev/null || sleep 0.1; done ) &
}

# The virtio device of a disk, as its driver's bind and unbind take it.
virtio_device() {
	basename "$(readlink -f "/sys/block/${1#/dev/}/device")"
}

# rebind DEVICE VIRTIO QUEUES: takes the driver from the device and gives it back, with so many queues.
rebind() {
	local driver=/sys/bus/virtio/drivers/virtio_blk
	echo "$2" >$driver/unbind || return 1
	[ ! -e "/sys/block/${1#/dev/}" ] || return 1
	echo "$3" >/sys/module/virtio_blk/parameters/num_request_queues
	echo "$2" >$driver/bind || return 1
	until [ -b "$1" ]; do sleep 0.05; done
	ls "/sys/block/${1#/dev/}/mq" | wc -l
}

# 256 KiB that know their number.
text() {
	yes "number $1" | head -c 262144
}

# put DEVICE N: text N in its place, durable.
put() {
	text "$2" | dd of="$1" bs=256k iflag=fullblock seek="$2" conv=notrunc,fsync 2>/tmp/error || { cat /tmp/error; return 1; }
}

# got DEVICE N: text N is in its place.
got() {
	text "$2" >/tmp/text
	dd if="$1" bs=256k skip="$2" count=1 iflag=direct 2>/dev/null | cmp - /tmp/text
}

# got_all DEVICE LAST: so are all up to text LAST.
got_all() {
	local n
	for n in $(seq 0 "$2"); do got "$1" "$n" || return 1; done
}

# kernel_from DEVICE KERNEL_BYTES INITRD_BYTES: another kernel from the disk, at 8 MiB and 32 MiB.
kernel_from() {
	dd if="$1" bs=1M skip=8 2>/dev/null | head -c "$2" >/tmp/kernel
	dd if="$1" bs=1M skip=32 2>/dev/null | head -c "$3" >/tmp/initrd
}

# kexec_from DEVICE KERNEL_BYTES INITRD_BYTES OPTIONS: starts it in the background.
kexec_from() {
	kernel_from "$1" "$2" "$3"
	( sleep 0.3; kexec /tmp/kernel /tmp/initrd "$4" || echo "@@exit: kexec" ) &
}

# crash_into DEVICE KERNEL_BYTES INITRD_BYTES OPTIONS: this one crashes, in the background, and that one is started.
crash_into() {
	kernel_from "$1" "$2" "$3"
	kexec -p /tmp/kernel /tmp/initrd "$4" || return 1
	( sleep 0.3; echo c >/proc/sysrq-trigger ) &
}
