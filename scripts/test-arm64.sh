#!/bin/bash
# The workspace for arm64: built in the root of Debian unstable with its compiler, and its unit, property and integration tests
# run under qemu-user. What cannot run there is named below. Usage: scripts/test-arm64.sh [CARGO_TEST_ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu
out=$PWD/build/arm64
suite=sid

scripts/peers.sh build "$suite"
scripts/peers.sh run "$suite" dpkg --add-architecture arm64
scripts/peers.sh install "$suite" cargo rustc libstd-rust-dev:arm64 qemu-user gcc-aarch64-linux-gnu g++-aarch64-linux-gnu \
  libc6-dev-arm64-cross cmake make pkg-config clang libclang-dev
# The crates come from this host's Cargo: a root has no registry.
mkdir -p "$out"
cargo vendor --locked --versioned-dirs "$out/vendor" 2>"$out/vendor.log" | sed "s#^directory = .*#directory = \"$out/vendor\"#" >"$out/vendor.toml"
[[ $# -gt 0 ]] || set -- --workspace --no-fail-fast
exec scripts/peers.sh run "$suite" env \
  CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
  CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
  cargo --config "$out/vendor.toml" test --offline --target "$target" --target-dir "$out" "$@"
