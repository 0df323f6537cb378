# The commands a person types. Each calls cargo or a script and has no logic of its own.
# Flags of the local cluster: make run ARGS="--brokers 1 --controllers 1"

TARGET := $(or $(CARGO_TARGET_DIR),target)

.PHONY: help run test test-all figures check-consistency check bench fix

help: ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1	/p' $(MAKEFILE_LIST)

run: ## build, then run a whole cluster on this machine (Ctrl-C stops it)
	cargo build --release -p chronik-controller -p chronik-broker -p chronik-gateway -p chronik-cli
	@exec $(TARGET)/release/chronik dev $(ARGS)

test: ## what every change must pass
	scripts/test.sh

test-all: ## test, and what takes longer: Jaeger, container images, broken brokers, rolling restart, 10,000 partitions
	scripts/test-all.sh

figures: ## what test-all only watches, held to its goals: 10,000 partitions, catch-up, compaction, replication lag; wants a quiet machine
	scripts/figures.sh

check-consistency: ## clients against faults, judged, for as long as ARGS="--minutes 30 --seed 1" says
	cargo build --release --locked -p chronik-controller -p chronik-broker -p chronik-gateway -p chronik-cli
	scripts/install-test-tools.sh
	cargo build --release --locked --workspace --bin chronik-checker
	CHRONIK_BIN_DIR=$(abspath $(TARGET))/release $(TARGET)/release/chronik-checker $(ARGS)

check: ## format and lints, without changing anything
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	cargo clippy --release --workspace --test it --test long -- -D warnings

bench: ## load against Chronik and Apache Kafka, side by side, every record read back
	cargo build --release -p chronik-controller -p chronik-broker -p chronik-gateway -p chronik-cli
	scripts/install-test-tools.sh
	CHRONIK_BIN_DIR=$(abspath $(TARGET))/release python3 bench/compare.py $(ARGS)

fix: ## format, and apply what the lints can mend; the only command that changes files
	cargo fmt --all
	cargo clippy --release --workspace --all-targets --fix --allow-dirty --allow-staged
	cargo clippy --release --workspace --test it --test long --fix --allow-dirty --allow-staged
