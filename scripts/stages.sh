# Stages of a test run: times, and one count over all runners. Sourced by test.sh, test-all.sh and
# figures.sh, which then run in the root of the project.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1

target=${CARGO_TARGET_DIR:-$root/target}
export CHRONIK_BIN_DIR=${CHRONIK_BIN_DIR:-$target/release}
product=(-p chronik-cli -p chronik-controller -p chronik-broker -p chronik-gateway)

passed=0
failed=0
times=()
started=$SECONDS

# stage NAME RUNNER COMMAND...
stage() {
    local name=$1 runner=$2 began=$SECONDS
    shift 2
    printf '\n=== %s\n' "$name"
    "$runner" "$name" "$@"
    times+=("$(printf '%5d s  %s' $((SECONDS - began)) "$name")")
}

# A command that passes or fails as one.
check() {
    local name=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf '!!! %s failed\n' "$name"
    fi
}

# A cargo test run: its own counts, from the line each test binary ends with.
cargo_tests() {
    local name=$1 log counts status
    shift
    log=$(mktemp)
    "$@" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    # "test result: ok. 12 passed; 0 failed; 0 ignored; ..."
    counts=$(awk '/^test result: / { p += $4; f += $6; i += $8; n++ } END { print p+0, f+0, i+0, n+0 }' "$log")
    rm -f "$log"
    # shellcheck disable=SC2086
    set -- $counts
    passed=$((passed + $1))
    failed=$((failed + $2))
    if [ "$3" -gt 0 ]; then
        failed=$((failed + $3))
        printf '!!! %s: %d tests were ignored, which counts as failed\n' "$name" "$3"
    fi
    if [ "$1" -eq 0 ] && [ "$2" -eq 0 ]; then
        failed=$((failed + 1))
        printf '!!! %s: no test ran\n' "$name"
    elif [ "$status" -ne 0 ] && [ "$2" -eq 0 ]; then
        # A test binary that did not compile or was killed has no counts of its own.
        failed=$((failed + 1))
        printf '!!! %s failed with exit code %d\n' "$name" "$status"
    fi
}

summary() {
    printf '\n=== times\n'
    printf '%s\n' "${times[@]}"
    printf '%5d s  in all\n\n' $((SECONDS - started))
    printf '%d passed, %d failed\n' "$passed" "$failed"
    [ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
}
