#!/usr/bin/env bash
# `make figures`: the tests whose goals depend on the machine (seconds, MB/s, processor time), held to the
# goals themselves. `make test-all` runs them too, and allows three times as much: machines differ by that.
# Wants a machine on which nothing else runs.
#
# Its last line is `N passed, N failed`.
set -uo pipefail

# shellcheck source=scripts/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

stage "test tools" check scripts/install-test-tools.sh
stage "build" check cargo build --release --locked "${product[@]}"
stage "figures" cargo_tests env CHRONIK_HOLD_GOALS=true timeout -k 30 3600 \
    cargo test --release --locked --no-fail-fast --workspace --test long -- --test-threads=1 \
    scale catch_up replication_lag compaction
summary
