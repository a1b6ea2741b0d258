#!/bin/sh
# Builds a Debian package, target/debian/echoserver.deb. Needs cargo-deb (cargo install cargo-deb).
set -eu
cd "$(dirname "$0")/.."
cargo build --release --locked
packaging/pages.sh target/release/echoserver
cargo deb --no-build --quiet --output target/debian/echoserver.deb
