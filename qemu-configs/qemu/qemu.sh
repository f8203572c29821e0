#!/bin/sh
# Starts QEMU with the disk, in the same way for every cache mode: qemu.sh SOCKET [QEMU ARGUMENT...]. Start virtioblkd first.
#
# - The guest's memory is shared (share=on), because virtioblkd reads and writes it in place.
# - reconnect: QEMU connects again when the server is restarted. Without it the disk fails for good when the server ends.
#   The option is in seconds up to QEMU 9.1, and named reconnect-ms from 9.2 on.
# - num-queues: one for each vCPU is best; at most virtioblkd's --num-queues.
set -eu

socket=${1:?usage: qemu.sh SOCKET [QEMU ARGUMENT...]}
shift
memory=${MEMORY:-1G}
reconnect=reconnect-ms=1000
version=$(qemu-system-x86_64 --version | sed -n '1s/.*version \([0-9]*\.[0-9]*\).*/\1/p')
case $version in
[0-8].* | 9.[01]) reconnect=reconnect=1 ;;
esac

exec qemu-system-x86_64 \
	-accel "${ACCEL:-kvm}" -accel tcg \
	-m "$memory" \
	-object memory-backend-memfd,id=mem,size="$memory",share=on \
	-machine q35,memory-backend=mem \
	-chardev socket,id=vda,path="$socket",$reconnect \
	-device vhost-user-blk-pci,chardev=vda,num-queues=1,bootindex=1 \
	"$@"
