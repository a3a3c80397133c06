#!/bin/sh
# Builds and runs the fuzz targets with the pinned stable toolchain; cargo-fuzz is not needed, a C++ compiler is.
#
#   fuzz/run.sh SECONDS [TARGET]     SECONDS per target; all targets unless one is named
#
# corpus/TARGET/ holds the committed seeds and is only read. What a run finds goes to build/fuzz/corpus/TARGET/, and
# inputs that crash or hang to build/fuzz/artifacts/TARGET/. To repeat one: build/fuzz/HOST/release/TARGET FILE.
set -eu
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    sed -n '4,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
seconds=$1
# From here, so that .cargo/config.toml is found.
cd "$(dirname "$0")"
targets=${2:-$(sed -n 's|^path = "fuzz_targets/\(.*\)\.rs"|\1|p' Cargo.toml)}
out=${CARGO_TARGET_DIR:-../build/fuzz}

# What cargo-fuzz passes, less the sanitizers that need a nightly compiler: coverage counters and compared values.
RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing ${RUSTFLAGS:-}"
export RUSTFLAGS
# Naming the host keeps these flags from build scripts and procedural macros, which could not be linked with them.
host=$(rustc -vV | sed -n 's/^host: //p')

bins=
for target in $targets; do
    bins="$bins --bin $target"
    mkdir -p "$out/corpus/$target" "$out/artifacts/$target"
done
# shellcheck disable=SC2086 # a list of words
cargo build --quiet --release --target "$host" $bins

# As many at a time as there are CPUs; the output of each comes when it ends. Short inputs: no message of these protocols
# needs more, and they keep runs fast.
export seconds out host
# shellcheck disable=SC2016 # expanded by the inner shell
echo "$targets" | tr ' ' '\n' | xargs -P "$(nproc)" -n 1 sh -c '
    log=$out/$1.log rc=0
    "$out/$host/release/$1" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=4096 -verbosity=0 \
        -print_final_stats=1 -artifact_prefix="$out/artifacts/$1/" "$out/corpus/$1" "corpus/$1" >"$log" 2>&1 || rc=$?
    echo "== $1, $seconds s"
    cat "$log"
    [ $rc = 0 ] || { echo "FAILED: $1, status $rc"; exit 1; }' fuzz
