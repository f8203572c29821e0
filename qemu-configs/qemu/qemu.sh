#!/bin/sh
# The front-end's side, the same in every cache mode: qemu.sh SOCKET [QEMU ARGUMENT...]. virtioblkd must be listening.
#
# - The guest's memory is shared (share=on): virtioblkd works in it.
# - reconnect: QEMU comes back by itself when the server does. Without it a server that ends takes the disk with it.
#   The option counts seconds up to QEMU 9.1 and is named reconnect-ms from 9.2 on.
# - num-queues: one a vCPU is best; no more than virtioblkd's --num-queues.
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
