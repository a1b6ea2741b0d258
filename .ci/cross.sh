# shellcheck shell=bash
# To build for other targets. To be sourced, in the root of the repository.
#
# The standard libraries of the targets come from rustup. If its server cannot be reached, they come from Debian's
# rustc-web packages, which are unpacked (not installed) in $CROSS_DIR: prebuilt for aarch64, and for other targets
# as sources that a nightly cargo builds. The first time takes some minutes. CROSS_DEBIAN=1 tries this way first.

cross_dir=${CROSS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/echoserver-ci/cross}

# Unpacks Debian's compiler, its standard library for aarch64 and its sources.
unpack_debian() {
  [ ! -e "$cross_dir/root/usr/lib/rustlib/aarch64-unknown-linux-gnu" ] || return 0
  command -v apt-get dpkg >/dev/null && [ "$EUID" -eq 0 ] || return 1
  local new=$cross_dir.new
  rm -rf "$cross_dir" "$new"
  mkdir -p "$new/debs" "$new/root" "$new/arm64/lists/partial" "$new/arm64/archives/partial"
  local get=(apt-get -qq -o APT::Sandbox::User=root)
  "${get[@]}" update || return 1
  local std llvm
  std=$(apt-cache depends libstd-rust-web-dev | sed -n 's/.*Depends: \(libstd-rust-web-[0-9.]*\)$/\1/p' | head -1)
  llvm=$(apt-cache depends "$std" | sed -n 's/.*Depends: \(libllvm[0-9]*\)$/\1/p' | head -1)
  # Lists of its own, so that the machine does not get another architecture.
  local arm64=("${get[@]}" -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State::status=/dev/null
    -o Dir::State="$new/arm64" -o Dir::Cache="$new/arm64")
  "${arm64[@]}" update || return 1
  (cd "$new/debs" && "${arm64[@]}" download libstd-rust-web-dev && "${get[@]}" download \
    rustc-web rust-web-src libstd-rust-web-dev "$std" "$llvm" binutils-mingw-w64-x86-64) || return 1
  local deb
  for deb in "$new"/debs/*.deb; do dpkg -x "$deb" "$new/root" || return 1; done
  rm -r "$new/debs" "$new/arm64"
  printf '#!/bin/sh\nexport LD_LIBRARY_PATH=%s\nexec %s "$@"\n' \
    "$cross_dir/root/usr/lib/x86_64-linux-gnu" "$cross_dir/root/usr/bin/rustc" > "$new/rustc"
  chmod +x "$new/rustc"
  mv "$new" "$cross_dir"
}

# Gets the standard libraries of the given targets, and fails if they cannot be had.
prepare_targets() {
  if [ -z "${CROSS_DEBIAN:-}" ] && timeout 120 rustup -q target add "$@" 2>/dev/null; then
    cross_from=rustup
  elif unpack_debian && { [ "$*" = aarch64-unknown-linux-gnu ] || rustup run nightly cargo --version >/dev/null 2>&1; }; then
    cross_from=debian
  else
    echo "skipped: the standard libraries of $* cannot be had here"
    return 1
  fi
}

# Runs cargo for a target: cargo_for TARGET SUBCOMMAND [ARGUMENT...].
cargo_for() {
  local target=$1 subcommand=$2
  shift 2
  local cargo=(cargo "$subcommand" --target "$target" --target-dir target/cross "$@")
  if [ "$cross_from" = rustup ]; then
    "${cargo[@]}"
  elif [ -d "$cross_dir/root/usr/lib/rustlib/$target" ]; then
    RUSTC=$cross_dir/rustc "${cargo[@]}"
  else
    PATH="$PATH:$cross_dir/root/usr/bin" RUSTC=$cross_dir/rustc RUSTC_BOOTSTRAP=1 \
      cargo +nightly "${cargo[@]:1}" -Zbuild-std
  fi
}
