# A guest's job that does what the host tells it, a line at a time over the serial line, and answers each with its
# status. What it may be told besides the usual commands:

# The filesystem that the disk $1 (its serial) has, at $2. The kernel writes nothing back by itself here: it would
# after 5 to 30 s, and what a test finds must not depend on how fast the machine is.
mount_disk() {
	echo 0 >/proc/sys/vm/dirty_writeback_centisecs
	mkdir -p "$2" && mount -t ext4 -o commit=3600 "$(disk "$1")" "$2"
}

# The device of the disk with the serial $1.
disk() {
	local device
	for device in /sys/block/vd*; do
		[ "$(cat "$device/serial")" != "$1" ] || echo "/dev/${device##*/}"
	done
}

# The agent, as a service would start it; $@: more of its options.
start_agent() {
	local port path=
	until [ "$path" ]; do
		for port in /sys/class/virtio-ports/*; do
			[ "$(cat "$port/name")" != org.qemu.guest_agent.0 ] || path=/dev/${port##*/}
		done
		[ "$path" ] || sleep 0.1
	done
	mkdir -p /run/qga
	qemu-ga -d -f /run/qga/pid -t /run/qga -l /tmp/agent.log -v -m virtio-serial -p "$path" "$@"
}

stop_agent() {
	local pid
	pid=$(cat /run/qga/pid)
	kill "$@" "$pid"
	while [ -d "/proc/$pid" ]; do sleep 0.1; done
	rm -f /run/qga/pid
}

echo @@ready
while read -r line; do
	case $line in
	quit) break ;;
	esac
	eval "$line"
	echo "@@status $?"
done
