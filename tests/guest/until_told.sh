# After fio.sh: fio writes and verifies from two processes, again and again until told to stop; then the guest reads the
# whole disk.

verifying_fio 5
( while [ ! -e /tmp/stop ]; do
    fio --eta=never --output=/tmp/fio.out /tmp/fio.job || { cat /tmp/fio.out; exit 1; }
  done ) &
echo "@begin"
ask stop
touch /tmp/stop
wait $! || exit 1
sync
sha256sum </dev/vda
ask compare
