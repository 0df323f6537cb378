#!/usr/bin/env bash
# What every change must pass (`make test`): formatting, lints, unit and property tests, then the
# end-to-end tests with real clients against real clusters. Nothing is skipped: what a test needs is
# installed first, and what cannot be installed fails.
#
# Always the whole workspace: a selection of packages has features of its own, and builds what others have
# built already once more.
#
# A stage that hangs is ended: the others still have their say.
#
# Its last line is `N passed, N failed`, added up over all runners; a stage that cannot even run
# counts as one failure.
set -uo pipefail

# shellcheck source=scripts/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

stage "test tools" check scripts/install-test-tools.sh
stage "build" check cargo build --release --locked "${product[@]}"
stage "format" check cargo fmt --all --check
stage "lints" check cargo clippy --release --locked --workspace --all-targets -- -D warnings
# Cargo takes `test = false` for "no target of --all-targets", and then passes over their names too.
stage "lints of end-to-end tests" check cargo clippy --release --locked --workspace --test it --test long -- -D warnings
stage "unit and property tests" cargo_tests timeout -k 30 1500 \
    cargo test --release --locked --no-fail-fast --workspace
stage "end-to-end tests" cargo_tests timeout -k 30 1800 \
    cargo test --release --locked --no-fail-fast --workspace --test it -- --test-threads="${CHRONIK_TEST_THREADS:-2}"
summary
