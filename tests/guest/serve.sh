# A server inside the guest, for tests whose guests have virtioblkd in them; comes before shell.sh.

# wait_for CONDITION: until that shell line holds; two minutes at least before it gives up.
wait_for() {
	local tries=0
	until eval "$1"; do
		tries=$((tries + 1))
		if [ $tries -ge 1200 ]; then
			echo "waited in vain until: $1"
			return 1
		fi
		sleep 0.1
	done
}

# serve IMAGE MODE OPTION...
serve() {
	local image=$1 mode=$2
	shift 2
	virtioblkd --socket-path /tmp/vhost --control-path /tmp/control --blk-file "$image" --cache "$mode" "$@" \
		>/tmp/virtioblkd.log 2>&1 &
	server=$!
	wait_for "[ -S /tmp/vhost ] || ! [ -d /proc/$server ]" && [ -S /tmp/vhost ] || { cat /tmp/virtioblkd.log; return 1; }
}

# Ends the server in order; that syncs in every mode.
stop_serving() {
	kill "$server"
	wait "$server" || { cat /tmp/virtioblkd.log; return 1; }
}
