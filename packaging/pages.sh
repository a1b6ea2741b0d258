#!/bin/sh
# Generates the man pages, and the completions of shells, in target/pages: packaging/pages.sh PROGRAM.
set -eu
program=$(realpath "$1")
cd "$(dirname "$0")/.."
rm -rf target/pages
mkdir -p target/pages/man target/pages/completions
for page in man man-check man-load man-plot; do
  "$program" --generate "$page" >"target/pages/man/echoserver${page#man}.1"
done
for shell in bash zsh fish; do
  "$program" --generate "$shell" >"target/pages/completions/$shell"
done
