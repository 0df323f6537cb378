#!/bin/sh
# Builds the images chronik-controller, chronik-broker and chronik-gateway from this tree.
#
#   deploy/build-images.sh [TAG]      TAG: local where not given
#
# An image holds the binary that the tests ran, less its debug information, and the shared libraries
# that it is linked to on this machine; nothing is compiled for the image alone. DOCKER names another client, such as
# podman.
set -eu
cd "$(dirname "$0")/.."
tag=${1:-local}
docker=${DOCKER:-docker}
target=${CARGO_TARGET_DIR:-target}

# The packages of `make run`: another selection would build dependencies with other features.
cargo build --release --locked \
    -p chronik-cli -p chronik-controller -p chronik-broker -p chronik-gateway

for service in controller broker gateway; do
    binary=$target/release/chronik-$service
    context=$target/images/$service
    rm -rf "$context"
    mkdir -p "$context/data" "$context/rootfs/usr/local/bin"
    strip --strip-debug -o "$context/rootfs/usr/local/bin/chronik-$service" "$binary"
    # "libm.so.6 => /lib/.../libm.so.6 (0x...)", and the loader as "/lib64/ld-... (0x...)".
    ldd "$binary" | awk '{ for (i = 1; i <= NF; i++) if ($i ~ /^\//) print $i }' |
        while read -r library; do
            cp -L --parents "$library" "$context/rootfs/"
        done
    # The classic builder is enough, and is what a machine without buildx has.
    DOCKER_BUILDKIT=${DOCKER_BUILDKIT:-0} "$docker" build --quiet \
        -f "deploy/Dockerfile.$service" -t "chronik-$service:$tag" "$context"
    echo "built chronik-$service:$tag"
done
