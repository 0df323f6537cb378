#!/usr/bin/env bash
# Installs what the end-to-end tests need into a cache folder outside the clone, and proves each part
# by running it. Idempotent: what is there already takes seconds, what is missing is fetched again.
#
#   scripts/install-test-tools.sh             clients: kcat, Python, Node, Java, Go
#   scripts/install-test-tools.sh containers  Docker engine and docker-compose (needs root)
#   scripts/install-test-tools.sh jaeger      Jaeger, built from its Go module (minutes, once)
#
# CHRONIK_TEST_CACHE: the cache folder, ~/.cache/chronik-tests where not set.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${CHRONIK_TEST_CACHE:-$HOME/.cache/chronik-tests}
clients=$root/tests/clients
jaeger_version=v1.76.0

say() { printf 'test tools: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

# need_command COMMAND DEBIAN-PACKAGE: there, or installed by apt-get where we are root.
need_command() {
    command -v "$1" >/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing $2 (for $1)"
        apt_install "$2"
    fi
    command -v "$1" >/dev/null || fail "$1 is missing: install it (Debian package: $2), or run this as root"
}

apt_updated=
apt_install() {
    if [ -z "$apt_updated" ]; then
        apt-get update -qq || say "apt-get update failed, going on with the lists that are there"
        apt_updated=1
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

# stamped NAME HASH: true if NAME was installed from the same inputs.
stamped() { [ "$(cat "$cache/$1.stamp" 2>/dev/null)" = "$2" ]; }
stamp() { printf '%s\n' "$2" >"$cache/$1.stamp"; }
hash_of() { cat "$@" | sha256sum | cut -c1-32; }

# retry COMMAND...: a registry may be busy for a moment.
retry() {
    local attempt
    for attempt in 1 2 3; do
        "$@" && return
        say "attempt $attempt of 3 failed: $1"
    done
    return 1
}

install_kcat() {
    need_command kcat kcat
    kcat -V 2>&1 | grep -q '^Version' || fail "kcat is installed but does not run"
}

install_python() {
    local hash
    need_command python3 python3
    hash=$(hash_of "$clients/python/requirements.txt")-$(python3 -c 'import sys; print(sys.version_info[:2])')
    if ! stamped python "$hash" || [ ! -x "$cache/python/bin/python" ]; then
        say "Python clients: fetching"
        rm -rf "$cache/python"
        python3 -m venv "$cache/python" 2>/dev/null || {
            rm -rf "$cache/python"
            [ "$(id -u)" = 0 ] && apt_install python3-venv
            python3 -m venv "$cache/python" || fail "python3 has no venv module: install python3-venv"
        }
        retry "$cache/python/bin/pip" install --quiet --disable-pip-version-check \
            -r "$clients/python/requirements.txt" || fail "pip could not fetch the Python clients"
        stamp python "$hash"
    fi
    "$cache/python/bin/python" -c 'import confluent_kafka, kafka' || fail "the Python clients do not import"
}

install_node() {
    local hash
    need_command node nodejs
    need_command npm npm
    hash=$(hash_of "$clients/kafkajs/package.json" "$clients/kafkajs/package-lock.json")
    if ! stamped kafkajs "$hash" || [ ! -d "$cache/kafkajs/node_modules" ]; then
        say "Node clients: fetching"
        rm -rf "$cache/kafkajs"
        mkdir -p "$cache/kafkajs"
        cp "$clients/kafkajs/package.json" "$clients/kafkajs/package-lock.json" "$cache/kafkajs/"
        (cd "$cache/kafkajs" && retry npm ci --silent --ignore-scripts --no-audit --no-fund) ||
            fail "npm could not fetch kafkajs"
        stamp kafkajs "$hash"
    fi
    (cd "$cache/kafkajs" && node -e 'require("kafkajs")') || fail "kafkajs does not load"
}

install_java() {
    local hash
    need_command java default-jre-headless
    hash=$(hash_of "$clients/java/pom.xml")
    if ! stamped kafka "$hash" || [ ! -d "$cache/kafka/libs" ]; then
        need_command mvn maven
        say "Apache Kafka's tools: fetching"
        rm -rf "$cache/kafka"
        mkdir -p "$cache/kafka"
        retry mvn --batch-mode --quiet -f "$clients/java/pom.xml" dependency:copy-dependencies \
            -DincludeScope=runtime -DoutputDirectory="$cache/kafka/libs" >&2 ||
            fail "mvn could not fetch Apache Kafka's tools"
        stamp kafka "$hash"
    fi
    java -cp "$cache/kafka/libs/*" org.apache.kafka.tools.TopicCommand --version >/dev/null ||
        fail "kafka-topics does not run"
}

install_go() {
    local hash
    hash=$(hash_of "$clients"/franz-go/*.go "$clients"/franz-go/go.mod "$clients"/franz-go/go.sum)
    if ! stamped franz-go "$hash" || [ ! -x "$cache/bin/franz-go-client" ]; then
        need_command go golang-go
        say "franz-go client: building"
        mkdir -p "$cache/bin"
        (cd "$clients/franz-go" && retry go build -trimpath -o "$cache/bin/franz-go-client" .) ||
            fail "the franz-go client does not build"
        stamp franz-go "$hash"
    fi
    "$cache/bin/franz-go-client" version >/dev/null || fail "the franz-go client does not run"
}

install_containers() {
    need_command dockerd docker.io
    need_command docker docker.io
    need_command docker-compose docker-compose
    need_command iptables iptables
    dockerd --version >/dev/null && docker-compose --version >/dev/null || fail "Docker does not run"
}

# Jaeger's module has a `replace` and depends on modules that the public checksum database does not
# know, so neither `go install` nor a wrapper module can build it. Its own go.sum has all checksums:
# the module itself is fetched and checked as usual, and built as the main module.
install_jaeger() {
    local source
    if ! stamped jaeger "$jaeger_version" || [ ! -x "$cache/bin/jaeger" ]; then
        need_command go golang-go
        say "Jaeger $jaeger_version: fetching and building, this takes minutes"
        rm -rf "$cache/jaeger-build"
        mkdir -p "$cache/jaeger-build/fetch" "$cache/bin"
        printf 'module fetch\n' >"$cache/jaeger-build/fetch/go.mod"
        source=$(cd "$cache/jaeger-build/fetch" && GOFLAGS=-mod=mod retry go mod download -json \
            "github.com/jaegertracing/jaeger@$jaeger_version" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
        [ -n "$source" ] || fail "the Jaeger module could not be fetched"
        cp -r "$source" "$cache/jaeger-build/source"
        chmod -R u+w "$cache/jaeger-build/source"
        (cd "$cache/jaeger-build/source" && CGO_ENABLED=0 GOFLAGS="-p=1" retry nice -n 19 \
            go build -trimpath -ldflags='-s -w' -o "$cache/bin/jaeger" ./cmd/jaeger) ||
            fail "Jaeger does not build"
        rm -rf "$cache/jaeger-build"
        stamp jaeger "$jaeger_version"
    fi
    "$cache/bin/jaeger" version >/dev/null || fail "Jaeger does not run"
}

mkdir -p "$cache"
exec 9>"$cache/.lock"
flock 9 # Two test runs share the cache; one of them fetches.
case "${1:-clients}" in
clients)
    install_kcat
    install_python
    install_node
    install_java
    install_go
    ;;
containers) install_containers ;;
jaeger) install_jaeger ;;
*) fail "unknown part: $1" ;;
esac
say "${1:-clients} ready in $cache"
