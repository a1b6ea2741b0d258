#!/usr/bin/env bash
# Makes the files of a release, from a clean checkout: for x86_64 and for aarch64 a tarball with a static Linux binary, and a
# Debian package; and their SHA256SUMS. The same commit and the same Rust give the same bytes, in any folder.
#
#   packaging/release.sh FOLDER
#
# Needs Linux on x86_64 with Rust, and Debian's gcc-aarch64-linux-gnu and libc6-dev-arm64-cross. The binaries contain the list
# of their dependencies (an SBOM), which `rust-audit-info` and `cargo audit bin` read.
set -euo pipefail
folder=$(realpath -m "${1:?usage: packaging/release.sh FOLDER}")
cd "$(dirname "$0")/.."
. .ci/cross.sh
if [ -n "$(git status --porcelain)" ]; then
  echo "commit or remove the changes of this checkout first" >&2
  exit 1
fi
PATH="$(.ci/tools):$PATH"
command -v cargo-auditable >/dev/null || cargo install --quiet --locked cargo-auditable@0.7.7

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
# With --target the flags do not apply to build scripts.
RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=$PWD=/src"
RUSTFLAGS+=" --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo --remap-path-prefix=$(rustc --print sysroot)=/rust"
export RUSTFLAGS CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder"

# Builds for a target and packs its files: release TARGET ARCHITECTURE DEBIAN_ARCHITECTURE.
release() {
  local name=echoserver-$version-$2-linux binary=target/$1/release/echoserver
  cargo auditable build --release --locked --bin echoserver --target "$1"
  # The first program is one that runs here.
  [ -d target/pages ] || packaging/pages.sh "$binary"
  mkdir "$work/$name"
  cp -r "$binary" LICENSE.txt README.md CHANGELOG.md docs packaging target/pages/* "$work/$name"
  tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner --mode=go=rX,u+rw --mtime="@$SOURCE_DATE_EPOCH" \
    -c "$name" | gzip -n -9 >"$folder/$name.tar.gz"
  cargo deb --quiet --no-build --no-strip --target "$1" --output "$folder/echoserver_${version}_$3.deb" >/dev/null
}

rm -rf target/pages
release x86_64-unknown-linux-gnu x86_64 amd64
if prepare_targets aarch64-unknown-linux-gnu; then
  if [ "$cross_from" = debian ]; then export RUSTC=$cross_dir/rustc; fi
  release aarch64-unknown-linux-gnu aarch64 arm64
fi
(cd "$folder" && sha256sum -- *.tar.gz *.deb >SHA256SUMS)
