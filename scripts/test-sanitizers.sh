#!/bin/bash
# AddressSanitizer and LeakSanitizer on the native tests: unit and integration tests of the workspace, the NBD suites with
# instrumented programs, and the fuzz targets' seeds. Usage: scripts/test-sanitizers.sh [unit|native|fuzz]...
#
# -Zsanitizer is not stable yet; RUSTC_BOOTSTRAP=1 lets the pinned stable compiler take it, which brings the run-time library
# along. Only here: nothing that is shipped is built so.
set -euo pipefail
cd "$(dirname "$0")/.."
host=$(rustc -vV | sed -n 's/^host: //p')
export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="-Zsanitizer=address -Cforce-frame-pointers=yes"
# SIGBUS is the product's own: memory that a front end has taken away.
export ASAN_OPTIONS=handle_sigbus=0:detect_stack_use_after_return=1:strict_string_checks=1:${ASAN_OPTIONS:-}
# Naming the host keeps the flags from build scripts and procedural macros.
build=(--target "$host" --target-dir build/asan)
[[ $# -gt 0 ]] || set -- unit native fuzz
for part in "$@"; do
  case $part in
    unit) scripts/test-unit.py --lib --bins --tests "${build[@]}" ;;
    native)
      cargo build "${build[@]}" -p rnbd-target -p rnbd-initiator
      scripts/test-nbd.sh "build/asan/$host/debug"
      scripts/test-nbd-client.sh "build/asan/$host/debug"
      ;;
    # CARGO_TARGET_DIR is relative to fuzz/.
    fuzz) CARGO_TARGET_DIR=../build/asan-fuzz fuzz/run.sh 20 ;;
    *) echo "test-sanitizers.sh: there is no part \"$part\"; there are: unit native fuzz" >&2; exit 2 ;;
  esac
done
