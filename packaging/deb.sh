#!/bin/sh
# Builds a Debian package, target/debian/echoserver.deb. Needs cargo-deb (cargo install cargo-deb).
set -eu
cd "$(dirname "$0")/.."
cargo build --release --locked
mkdir -p target/pages
for page in man man-check man-load man-plot bash zsh fish; do
  target/release/echoserver --generate "$page" >"target/pages/$page"
done
cargo deb --no-build --quiet --output target/debian/echoserver.deb
