# What the guests of the cloud-disk story do (tests/guest/story.rs); comes before shell.sh.

# Writes files into the new directory $1, each in its own way. The order matters: an fsync also makes the names of files
# durable that were made before it, though not their content.
work() {
	local dir=$1 text="new in ${1##*/}"
	mkdir "$dir"
	for file in vim rename; do
		echo old | dd of="$dir/$file" conv=fsync
	done

	echo "$text" >"$dir/echo-then-fsync-of-others"
	python3 -ISc '
import os, sys
file = open(sys.argv[1], "w")
file.write(sys.argv[2] + "\n")
file.flush()
os.fsync(file.fileno())
file.close()' "$dir/python-fsync" "$text"
	# Vim, unless told otherwise: the old file out of the way, a new one, fsync, the old one removed.
	mv "$dir/vim" "$dir/vim~"
	echo "$text" | dd of="$dir/vim" conv=fsync
	rm "$dir/vim~"
	# Many editors and every package manager: a new file, fsync, renamed over the old one.
	echo "$text" | dd of="$dir/rename.new" conv=fsync
	mv "$dir/rename.new" "$dir/rename"

	# From here on nobody calls fsync.
	echo "$text" >"$dir/echo"
	python3 -ISc '
import sys
with open(sys.argv[1], "w") as file:
    file.write(sys.argv[2] + "\n")' "$dir/python" "$text"
	echo "insert $dir/database $text" >&3
} 2>/tmp/work.log

# Says of each file $2... in the directory $1 what is there.
show() {
	local dir=$1 file
	shift
	for file in "$@"; do
		if [ ! -e "$dir/$file" ]; then
			echo "$file: lost"
		elif [ ! -s "$dir/$file" ]; then
			echo "$file: empty"
		else
			echo "$file: $(cat "$dir/$file")"
		fi
	done
}

# What the kernel says of the filesystem on the device $1, as far as it matters.
kernel_says() {
	dmesg | grep -E "(EXT4-fs|JBD2).*${1##*/}" | grep -E 'recovery complete|error|warning|fail|abort|corrupt'
	true
}

# A stand-in for a database: a row that is inserted lives in its memory until it is told to write it out. Then it takes
# no orders until it is told to go on. It listens on file descriptor 3.
database() {
	local word file row
	while read -r word file row; do
		case $word in
		insert) pending_file=$file pending_row=$row ;;
		flush)
			if [ "$pending_file" ]; then
				echo "$pending_row" | dd of="$pending_file" conv=fsync && pending_file=
			fi
			echo "$?" >/run/database.answer
			until [ "$word" = go-on ]; do read -r word; done
			;;
		esac
	done <&3
}

# Starts it, and tells it of freezes by the hook that we ship: its text is in $HOOK.
start_database() {
	mkfifo /run/database /run/database.answer
	exec 3<>/run/database
	database >/tmp/database.log 2>&1 &
	mkdir -p /etc/qemu/fsfreeze-hook.d
	echo "$HOOK" >/etc/qemu/fsfreeze-hook
	cat >/etc/qemu/fsfreeze-hook.d/50-database <<'SCRIPT'
#!/bin/sh
case $1 in
freeze)
	echo flush >/run/database
	read -r status </run/database.answer
	exit "$status"
	;;
thaw) echo go-on >/run/database ;;
esac
SCRIPT
	chmod +x /etc/qemu/fsfreeze-hook /etc/qemu/fsfreeze-hook.d/50-database
}
