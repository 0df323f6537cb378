#!/usr/bin/env bash
# `make test-all`: all of `make test`, then what takes longer or needs more of the machine: traces
# read back from a real Jaeger, the container images with the compose file, brokers broken on purpose
# that the consistency checker has to catch, a rolling restart, the catch-up of a replica, the lag of
# replication, and 10,000 partitions. Needs root for the container engine.
#
# Long tests that hang are ended, which counts as a failure.
#
# Its last line is `N passed, N failed`, over both parts.
set -uo pipefail

# shellcheck source=scripts/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

# The lines of `make test` are shown as they come; its last one is added to ours.
make_test() {
    local log line
    log=$(mktemp)
    scripts/test.sh 2>&1 | tee "$log"
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$log" | tail -n 1)
    rm -f "$log"
    if [ -z "$line" ]; then
        failed=$((failed + 1))
        printf '!!! make test did not reach its end\n'
        return
    fi
    passed=$((passed + ${line%% passed*}))
    line=${line##*, }
    failed=$((failed + ${line%% failed*}))
}

stage "make test" make_test
stage "Jaeger" check scripts/install-test-tools.sh jaeger
stage "container engine" check scripts/install-test-tools.sh containers
# What the consistency checker has to find: built beside the product, never into it.
stage "broken broker" check cargo build --release --locked "${product[@]}" --features chronik-broker/sabotage \
    --bin chronik-broker-sabotaged
stage "long tests" cargo_tests timeout -k 30 7200 \
    cargo test --release --locked --no-fail-fast --workspace --test long -- --test-threads=1
summary
