# Targets for building, testing, measuring and installing. `make help` lists them.

PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
DESTDIR ?=
CARGO ?= cargo
# A guest test runs a QEMU and a server. Running more tests at once than there are CPUs would not be faster.
TEST_THREADS ?= 2
# Each folder of tests/ with a main.rs is a test program (tests/README.md). guest boots guests, ceph starts a Ceph cluster
# and needs its headers; all others need nothing but Rust.
TEST_PROGRAMS = $(patsubst tests/%/main.rs,%,$(wildcard tests/*/main.rs))
UNIT_TESTS = $(filter-out guest ceph debian,$(TEST_PROGRAMS))
# After a failure the other test programs still run.
cargo_test = $(CARGO) test --no-fail-fast

# How long `make fuzz` searches each target.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS = $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))

# For `make check-deep`. The sanitizers run the tests that boot no guest and need no Ceph. Excluded are the engine, which is
# pure; layering and shipped, which run no code of the daemon; and intruder, which preloads a library into the daemon.
NOT_SANITIZED = layering shipped intruder
# These start the real daemon. The leak check at its end needs clone(2) and ptrace(2), which the sandbox forbids, so it is
# disabled for them. The first race ends the daemon, which makes its test fail.
DAEMON_TESTS = daemon export control_flood limits sandbox snapshot upgrade
IN_PROCESS_TESTS = $(filter-out $(NOT_SANITIZED) $(DAEMON_TESTS),$(UNIT_TESTS))
# The thread sanitizer carries out an atomic operation itself, while it holds a lock of its own. If the memory was truncated,
# the daemon's SIGBUS handler runs meanwhile, and the handler's atomics wait for that lock for ever.
THREAD_HANGS = hostile_memory
# RUSTC_BOOTSTRAP enables the sanitizers of a stable compiler. For the thread sanitizer std is built again with
# instrumentation: otherwise memory that std synchronizes would look like a race. $(1): the sanitizer, $(2): the test
# programs, $(3): further arguments.
SANITIZE_address = test
SANITIZE_thread = test -Zbuild-std
sanitized = RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=$(1) CARGO_TARGET_DIR=$(abspath $(deep))/$(1) CARGO_INCREMENTAL=0 \
	CARGO_PROFILE_DEV_DEBUG=line-tables-only CARGO_PROFILE_DEV_OPT_LEVEL=1 $(CARGO) $(SANITIZE_$(1)) \
	--target $$(rustc -vV | sed -n 's/^host: //p') --no-fail-fast $(2) -- --test-threads=$(TEST_THREADS) $(3)
in_process = --lib $(1:%=--test %)
skipped = --skip engine::
LEAKS = LSAN_OPTIONS=suppressions=$(CURDIR)/tests/leak-sanitizer.supp:print_suppressions=0
RACES = suppressions=$(CURDIR)/tests/thread-sanitizer.supp

deep = $(or $(CARGO_TARGET_DIR),target)/deep
release = $(or $(CARGO_TARGET_DIR),target)/release
debug = $(or $(CARGO_TARGET_DIR),target)/debug

.NOTPARALLEL:
.PHONY: toolchain check-book check-quick check-tests check-examples check-models demo-debug power-long explore-long \
	$(shell sed -n 's/^\([a-z0-9-]*\):.*## .*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## Show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 27

build: toolchain ## Build the programs, optimized
	$(CARGO) build --release

demo: toolchain deps ## Watch a guest write, be held still under load, and go on
	$(CARGO) build --release
	scripts/demo

demo-snapshot: toolchain deps ## Watch what a snapshot of a running guest holds, at each level
	scripts/demo-snapshot

check: toolchain deps check-lint check-unit check-vm check-rbd check-debian13-quick ## All checks: lint, unit, integration, real guests, Ceph, Debian 13

check-unit: check-tests check-examples check-models ## Unit and integration tests that boot no guest

# These are three targets, so that `make --keep-going` runs all of them.
check-tests: toolchain
	$(cargo_test) --lib --bins $(UNIT_TESTS:%=--test %)

check-examples: toolchain
	$(cargo_test) --doc

check-models: toolchain
	$(cargo_test) --lib --features model interleavings::

check-vm: toolchain deps ## Tests with real guests
	$(cargo_test) --test guest -- --test-threads=$(TEST_THREADS)

check-rbd: toolchain deps deps-rbd ## Tests with a real Ceph cluster, which they start themselves
	$(cargo_test) --test ceph -- --test-threads=$(TEST_THREADS)

check-story: toolchain deps ## Snapshots of real guests, frozen by their agents
	$(cargo_test) --test guest -- --test-threads=$(TEST_THREADS) story:: agent::

check-stable: toolchain deps ## Guests that change buffers in flight, over a real md RAID1 and DRBD
	$(cargo_test) --test guest -- --test-threads=$(TEST_THREADS) replicas::

check-systemd: toolchain ## The shipped units under a real systemd, in a container; minutes
	$(cargo_test) --test debian -- --test-threads=1 --nocapture units::

check-deb: deb deps ## The package on bare Debian 12 and 13 under a real systemd: install, serve a guest, upgrade, purge; minutes
	VIRTIOBLKD_DEB=$$(ls $(packages)/virtioblkd_*.deb) $(cargo_test) --test debian -- --test-threads=1 --nocapture package::

# Which commit's build a guest goes to and comes back from.
COMMIT ?= HEAD^

check-upgrade: toolchain ## Upgrades to another commit's build and back, under load, in every mode (COMMIT=...)
	VIRTIOBLKD_OTHER=$$(scripts/build-commit $(COMMIT)) $(cargo_test) --test upgrade other_build::

check-libvirt: toolchain deps ## The shipped domain on a real libvirt; its saves and migrations, by hand and by the hook; minutes
	VIRTIOBLKD_LIBVIRT=long $(cargo_test) --test guest -- --test-threads=$(TEST_THREADS) libvirt
	VIRTIOBLKD_LIBVIRT=long $(cargo_test) --test daemon -- --test-threads=$(TEST_THREADS) host_crash:: hook_

# These test what README says of a Debian release, with its QEMU, libvirt, Ceph and guest kernel, in a root that
# scripts/debian-root creates under the build directory. On the release itself the other checks do the same.
IN_DEBIAN13 = scripts/debian-root trixie make
IN_DEBIAN12 = scripts/debian-root bookworm make

check-debian13-quick: toolchain ## The demo and the first suites with guests on Debian 13; minutes
	@if grep -qs '^VERSION_CODENAME=trixie' /etc/os-release; then \
		echo "SKIPPED: this is Debian 13: all other checks ran on it"; \
	else \
		$(IN_DEBIAN13) demo-debug check-quick; \
	fi

check-debian13: toolchain ## The demo, all suites with guests, libvirt, agents and Ceph on Debian 13; an hour
	$(IN_DEBIAN13) --keep-going demo check-vm check-rbd

check-debian12: toolchain ## The same on Debian 12 with its own QEMU 7.2
	$(IN_DEBIAN12) --keep-going demo check-vm check-rbd

# Runs inside such a root. The tests need the debug build of the programs, so the demo uses it, too.
check-quick: toolchain deps
	$(cargo_test) --test guest -- --test-threads=$(TEST_THREADS) firmware:: linux:: libvirt::

demo-debug: toolchain deps
	$(CARGO) build
	VIRTIOBLKD_BIN_DIR=$(debug) scripts/demo

check-power: toolchain deps ## Power cuts of a guest that serves, in every mode; minutes
	$(cargo_test) --test guest -- --test-threads=$(TEST_THREADS) --nocapture power_cut::

check-power-long: toolchain deps ## The same with twenty seeds and more cuts; an hour
	VIRTIOBLKD_POWER=long $(cargo_test) --test guest -- --test-threads=$(TEST_THREADS) --nocapture power_cut::

check-lint: toolchain check-spelling check-book ## Formatting, clippy, documentation, spelling, dependencies, without a warning
	$(CARGO) fmt --all --check
	$(CARGO) clippy --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --no-deps --document-private-items
	scripts/check-dependencies

check-spelling: ## Spelling, where codespell is installed (.codespellrc has our own words)
	@if command -v codespell >/dev/null; then codespell; else echo "SKIPPED: no codespell: apt install codespell"; fi

check-book:
	@if command -v mdbook >/dev/null; then $(MAKE) book; else echo "SKIPPED: no mdbook: cargo install mdbook"; fi

book: ## Build the documentation site into the build directory (needs mdbook: cargo install mdbook)
	scripts/build-book $(or $(CARGO_TARGET_DIR),target)/book

fuzz: toolchain ## Search for what breaks the parsers, FUZZ_SECONDS a target (needs cargo-fuzz)
	@$(CARGO) fuzz --version >/dev/null 2>&1 || { echo "fuzz: run 'cargo install cargo-fuzz' first" >&2; exit 1; }
	set -e; for target in $(FUZZ_TARGETS); do \
		mkdir -p $(deep)/fuzz-corpus/$$target; \
		RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run $$target $(deep)/fuzz-corpus/$$target fuzz/corpus/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -max_len=4096 -print_final_stats=1; \
	done

check-deep: toolchain check-address check-thread check-orders check-explore-long fuzz ## Sanitizers, orders of threads, the long explorer, fuzzing; an hour

check-address: toolchain ## The suites that need no guest, with the address sanitizer
	$(LEAKS) $(call sanitized,address,$(call in_process,$(IN_PROCESS_TESTS)),$(skipped))
	ASAN_OPTIONS=detect_leaks=0 $(call sanitized,address,$(DAEMON_TESTS:%=--test %))

check-thread: toolchain ## The same with the thread sanitizer (needs std's sources)
	@test -f "$$(rustc --print sysroot)/lib/rustlib/src/rust/library/std/Cargo.toml" || \
		{ echo "check-thread: run 'rustup component add rust-src' first" >&2; exit 1; }
	TSAN_OPTIONS="$(RACES)" \
		$(call sanitized,thread,$(call in_process,$(filter-out $(THREAD_HANGS),$(IN_PROCESS_TESTS))),$(skipped))
	TSAN_OPTIONS="$(RACES) halt_on_error=1" $(call sanitized,thread,$(DAEMON_TESTS:%=--test %))

check-orders: toolchain ## The models of the hand-offs between threads, in ten times as many orders
	VIRTIOBLKD_ORDERS=10000 $(cargo_test) --lib --features model interleavings::

check-explore-long: toolchain ## The engine's explorer over longer scripts; minutes
	VIRTIOBLKD_EXPLORE=long $(CARGO) test --release --lib engine::explore -- --nocapture

# The old names of these targets.
power-long: check-power-long
explore-long: check-explore-long

bench: toolchain deps ## Speed beside others and the bare kernel, quiesces, idling, stable writes; a quarter of an hour
	$(CARGO) bench --bench peers -- --only hot --dir /dev/shm
	$(CARGO) bench --bench peers
	$(CARGO) bench --bench quiesce
	$(CARGO) bench --bench idle
	$(CARGO) bench --bench stable_writes

bench-instructions: toolchain ## Instructions of our own code a request, beside the commit before; on any machine
	scripts/bench-instructions $(COMMIT)

bench-rbd: toolchain deps-rbd ## The same on Ceph RBD, beside fio's rbd engine and qemu-storage-daemon's export
	$(CARGO) bench --bench rbd

bench-guest: toolchain deps ## fio in a guest, beside QEMU and qemu-storage-daemon; needs KVM; ten minutes
	$(CARGO) bench --bench guest

install: ## Install what `make build` made, with units, libvirt's hook, manual pages (PREFIX, DESTDIR, SYSCONFDIR)
	@test -x $(release)/virtioblkd && test -x $(release)/virtioblkctl || \
		{ echo "install: run 'make build' first" >&2; exit 1; }
	BIN_DIR=$(release) PREFIX=$(PREFIX) SYSCONFDIR=$(SYSCONFDIR) DESTDIR=$(DESTDIR) scripts/install-files install

uninstall: ## Remove what `make install` installed (same PREFIX, DESTDIR, SYSCONFDIR); configuration files of disks remain
	PREFIX=$(PREFIX) SYSCONFDIR=$(SYSCONFDIR) DESTDIR=$(DESTDIR) scripts/install-files uninstall

# Of the build directory, so that no file is written beside the sources.
packages = $(abspath $(or $(CARGO_TARGET_DIR),target))/packages

deb: ## Build the Debian package, with its debug symbols apart, and check it with lintian
	scripts/install-test-deps package
	rm -rf $(packages) && mkdir -p $(packages)
	DEB_DIR=$(packages) VIRTIOBLKD_BIN_DIR=$(VIRTIOBLKD_BIN_DIR) debian/rules clean binary
	lintian --fail-on error --tag-display-limit 0 $(packages)/virtioblkd_*.deb

deps: ## Install what the guest tests need; fetch the guest
	scripts/install-test-deps
	scripts/guest-image

deps-rbd: ## Install what the Ceph tests need
	scripts/install-test-deps rbd

toolchain:
	@scripts/check-toolchain
