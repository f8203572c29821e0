# What people do with the sources. `make help` lists it.

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
# A guest test is a QEMU and a server; more at once than CPUs only wait for each other.
TEST_THREADS ?= 2
# Tests that boot guests, and tests that start a Ceph cluster or need its headers. All others need nothing but Rust.
VM_TESTS = firmware vm kill life migration story agent replicas power_cut libvirt libvirt_moves full_filesystem \
	upgrade_guest
RBD_TESTS = $(filter-out rbd_stub,$(basename $(notdir $(wildcard tests/rbd_*.rs))))
OTHER_TESTS = $(filter-out $(VM_TESTS) $(RBD_TESTS),$(basename $(notdir $(wildcard tests/*.rs))))

# How long `make fuzz` searches each target.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS = $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))

# What touches memory and threads and needs no guest. Left out: tests of deadlines (all is many times slower), and of the
# engine, which is pure. Apart: what runs the real daemon, where the sanitizer cannot look for leaks at the end (its
# sandbox stops the clone(2) that this takes).
ADDRESS_TESTS = activation backend_contract control control_clients control_flood control_store device durability \
	file_backend fuzz_replay hostile hostile_memory inflight resize stable_writes
ADDRESS_DAEMON_TESTS = upgrade upgrade_front_end
# Those whose reports were judged, see the suppressions (others are not examined yet). Nor those that provoke SIGBUS: the
# sanitizer's own mmap(2) hangs in a signal's handler.
THREAD_TESTS = activation control device inflight resize
# A stable compiler has these behind RUSTC_BOOTSTRAP; std itself is not instrumented.
SANITIZE_address = -Zsanitizer=address
SANITIZE_thread = -Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer
sanitized = RUSTC_BOOTSTRAP=1 RUSTFLAGS="$(SANITIZE_$(1))" CARGO_TARGET_DIR=$(abspath $(deep))/$(1) $(CARGO) test \
	--target $$(rustc -vV | sed -n 's/^host: //p') --no-fail-fast $(2) \
	-- --test-threads=$(TEST_THREADS) --skip engine:: --skip the_daemon_says_what_it_does

deep = $(or $(CARGO_TARGET_DIR),target)/deep
release = $(or $(CARGO_TARGET_DIR),target)/release
doc = $(DESTDIR)$(PREFIX)/share/doc/virtioblkd

.NOTPARALLEL:
.PHONY: toolchain $(shell sed -n 's/^\([a-z-]*\):.*## .*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

build: toolchain ## Build the programs, optimized
	$(CARGO) build --release

demo: toolchain deps ## Watch a guest write, be held still under load, and go on
	$(CARGO) build --release
	scripts/demo

demo-snapshot: toolchain deps ## Watch what a snapshot of a running guest holds, at each level
	scripts/demo-snapshot

check: toolchain deps check-lint check-unit check-vm check-rbd ## All checks: lint, unit, integration, real guests, Ceph

check-unit: toolchain ## Unit and integration tests that boot no guest
	$(CARGO) test --lib --bins
	$(CARGO) test --doc
	$(CARGO) test --lib --features model orders::
	$(if $(OTHER_TESTS),$(CARGO) test $(OTHER_TESTS:%=--test %))

check-vm: toolchain deps ## Tests with real guests
	$(CARGO) test $(VM_TESTS:%=--test %) -- --test-threads=$(TEST_THREADS)

check-rbd: toolchain deps deps-rbd ## Tests with a real Ceph cluster, which they start themselves
	$(CARGO) test $(RBD_TESTS:%=--test %) -- --test-threads=$(TEST_THREADS)

check-story: toolchain deps ## Snapshots of real guests, frozen by their agents
	$(CARGO) test --test story --test agent -- --test-threads=$(TEST_THREADS)

check-stable: toolchain deps ## Guests that change buffers in flight, over a real md RAID1 and DRBD
	$(CARGO) test --test replicas -- --test-threads=$(TEST_THREADS)

check-libvirt: toolchain deps ## The shipped domain on a real libvirt; its saves and migrations
	$(CARGO) test --test libvirt --test libvirt_moves -- --test-threads=$(TEST_THREADS)

check-power: toolchain deps ## Power cuts of a guest that serves, in every mode; minutes
	$(CARGO) test --test power_cut -- --test-threads=$(TEST_THREADS) --nocapture

power-long: toolchain deps ## The same with twenty seeds and more cuts; an hour
	VIRTIOBLKD_POWER=long $(CARGO) test --test power_cut -- --test-threads=$(TEST_THREADS) --nocapture

check-lint: toolchain ## Formatting, clippy, documentation, without a warning
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --no-deps --document-private-items

fuzz: toolchain ## Search for what breaks the parsers, FUZZ_SECONDS a target (needs cargo-fuzz)
	@$(CARGO) fuzz --version >/dev/null 2>&1 || { echo "fuzz: run 'cargo install cargo-fuzz' first" >&2; exit 1; }
	set -e; for target in $(FUZZ_TARGETS); do \
		mkdir -p $(deep)/fuzz-corpus/$$target; \
		RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run $$target $(deep)/fuzz-corpus/$$target fuzz/corpus/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -max_len=4096 -print_final_stats=1; \
	done

check-deep: toolchain check-address check-thread check-orders explore-long fuzz ## Sanitizers, orders of threads, the long explorer, fuzzing; an hour

check-address: toolchain ## The suites that need no guest, with the address sanitizer
	$(call sanitized,address,--lib $(ADDRESS_TESTS:%=--test %))
	ASAN_OPTIONS=detect_leaks=0 $(call sanitized,address,$(ADDRESS_DAEMON_TESTS:%=--test %))

check-thread: toolchain ## Some of them with the thread sanitizer
	TSAN_OPTIONS="suppressions=$(CURDIR)/tests/thread-sanitizer.supp" $(call sanitized,thread,--lib $(THREAD_TESTS:%=--test %))

check-orders: toolchain ## The models of the hand-offs between threads, in ten times as many orders
	VIRTIOBLKD_ORDERS=10000 $(CARGO) test --lib --features model orders::

explore-long: toolchain ## The engine's explorer over longer scripts; minutes
	VIRTIOBLKD_EXPLORE=long $(CARGO) test --release --lib engine::explore -- --nocapture

bench: toolchain deps ## Speed beside others and the bare kernel, quiesces, idling, stable writes; a quarter of an hour
	$(CARGO) bench --bench peers -- --only hot --dir /dev/shm
	$(CARGO) bench --bench peers
	$(CARGO) bench --bench quiesce
	$(CARGO) bench --bench idle
	$(CARGO) bench --bench stable_writes

bench-rbd: toolchain deps-rbd ## The same on Ceph RBD, beside fio's rbd engine and qemu-storage-daemon's export
	$(CARGO) bench --bench rbd

bench-guest: toolchain deps ## fio in a guest, beside QEMU and qemu-storage-daemon, into benches/results; ten minutes
	$(CARGO) bench --bench guest

install: ## Install what `make build` made (PREFIX, DESTDIR)
	@test -x $(release)/virtioblkd || { echo "install: run 'make build' first" >&2; exit 1; }
	install -D $(release)/virtioblkd $(DESTDIR)$(PREFIX)/bin/virtioblkd
	install -D $(release)/virtioblkctl $(DESTDIR)$(PREFIX)/bin/virtioblkctl
	install -d $(DESTDIR)$(PREFIX)/share/qemu/vhost-user $(doc)
	sed 's|/usr/local|$(PREFIX)|' qemu-configs/vhost-user/50-virtioblkd.json \
		>$(DESTDIR)$(PREFIX)/share/qemu/vhost-user/50-virtioblkd.json
	cp -r qemu-configs docs $(doc)/

deps: ## Install what the guest tests need; fetch the guest
	scripts/install-test-deps
	scripts/guest-image

deps-rbd: ## Install what the Ceph tests need
	scripts/install-test-deps rbd

toolchain:
	@scripts/check-toolchain
