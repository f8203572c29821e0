# fio that writes and verifies from two processes, for guests with libaio and fio in them.

# verifying_fio SECONDS: puts the job for one run of so long into /tmp/fio.job.
verifying_fio() {
	cat >/tmp/fio.job <<FIO
[global]
filename=/dev/vda
direct=1
ioengine=libaio
iodepth=16
size=8m
verify=crc32c
verify_backlog=64
verify_fatal=1
serialize_overlap=1
time_based
runtime=$1
[mixed]
rw=randrw
bs=4k
offset=0
[flushing]
rw=randwrite
bs=16k
offset=8m
fsync=32
FIO
}
