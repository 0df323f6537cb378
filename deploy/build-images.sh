#!/bin/sh
# Builds the images chronik-controller, chronik-broker and chronik-gateway from this tree.
#
#   deploy/build-images.sh [TAG]      TAG: local where not given
#
# The binaries are linked statically against glibc, so that an image needs nothing besides. Only
# the last step of the build differs from `cargo build --release`: no dependency is built anew.
# DOCKER names another client, such as podman.
set -eu
cd "$(dirname "$0")/.."
tag=${1:-local}
docker=${DOCKER:-docker}
target=${CARGO_TARGET_DIR:-target}

for service in controller broker gateway; do
    cargo rustc --release -p "chronik-$service" --bin "chronik-$service" -- \
        -C target-feature=+crt-static
    context=$target/images/$service
    mkdir -p "$context/data"
    cp "$target/release/chronik-$service" "$context/"
    # The classic builder is enough, and is what a machine without buildx has.
    DOCKER_BUILDKIT=${DOCKER_BUILDKIT:-0} "$docker" build --quiet \
        -f "deploy/Dockerfile.$service" -t "chronik-$service:$tag" "$context"
    echo "built chronik-$service:$tag"
done
