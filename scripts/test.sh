#!/bin/bash
# Passes all tests: format, lints, unit and property tests, fuzz targets, the SPDK client, and the VM scenarios against
# real kernels. Installs what it needs. About 80 minutes on two cores; logs are in build/logs/.
#
#   scripts/test.sh            what CI runs
#   scripts/test.sh --quick    without fuzzing and VM scenarios
#   scripts/test.sh --all      VM scenarios on more kernels, networks and peers as well: another hour
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
logs=build/logs
mkdir -p "$logs"
passed=0 failed=0 skipped=0

# stage NAME COMMAND...: one line on the console, the output in a file, the end of it on the console when it fails.
stage() {
  local name=$1 rc=0 start=$SECONDS
  shift
  printf '%-32s ' "$name"
  "$@" >"$logs/$name.log" 2>&1 </dev/null || rc=$?
  if [[ $rc == 0 ]]; then
    passed=$((passed + 1))
    printf 'ok      %4d s  %s\n' $((SECONDS - start)) "$(summary "$logs/$name.log")"
  elif [[ $rc == 77 ]]; then
    skipped=$((skipped + 1))
    printf 'SKIPPED %4d s  %s\n' $((SECONDS - start)) "$(tail -n 1 "$logs/$name.log")"
  else
    failed=$((failed + 1))
    printf 'FAILED  %4d s  status %d, see %s\n' $((SECONDS - start)) "$rc" "$logs/$name.log"
    tail -n 40 "$logs/$name.log" | sed 's/^/    /'
  fi
  return 0
}

# How many tests a stage ran, in the words of its runner.
summary() {
  grep -a 'running once more$' "$1"
  awk '/^test result:/ {p += $4; f += $6; seen = 1} /^[0-9]+ passed, [0-9]+ failed/ {p += $1; f += $3; seen = 1}
       END {if (seen) printf "%d tests passed, %d failed", p, f}' "$1"
}

loom() {
  RUSTFLAGS="--cfg loom" cargo test -p reactor --lib --release --target-dir build/loom waker &&
    RUSTFLAGS="--cfg loom" cargo test -p roce-proto --lib --release --target-dir build/loom keys
}
tree_is_clean() { git diff --exit-code HEAD --stat && [[ -z $(git status --porcelain) && ! -e target/debug && ! -e target/release ]]; }
# Instructions per request on the hot paths, against a stored budget: no other load on the machine changes them.
budget() { build/release/instruction-budget check; }
docs() { RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps; }

stage packages scripts/packages.sh valgrind
stage fmt cargo fmt --all --check
stage clippy cargo clippy --workspace --all-targets -- -D warnings
stage unit cargo test --workspace --no-fail-fast
stage loom loom
stage docs docs
stage release cargo build --release --workspace --bins
stage budget budget
stage spdk-client scripts/test-spdk-client.sh build/release/rnbd-target
stage native scripts/test-native.sh build/release
stage nbd scripts/test-nbd.sh build/release
stage nbd-client scripts/test-nbd-client.sh build/release
# Without SPDK it says SKIPPED.
stage spdk scripts/test-spdk.sh build/release
stage perf scripts/test-perf.sh build/release
if [[ ${1:-} != --quick ]]; then
  stage fuzz fuzz/run.sh 10
  stage vm-build scripts/vm/build.sh
  for scenario in scripts/vm/scenarios/*.sh; do
    # "# ci: SERIES[/NET[,KEY=VALUE]...] ..." names the kernels and networks that CI runs a scenario on, without it the
    # first kernel and rxe; "# more: …" those that --all adds.
    places=$(sed -n 's/^# ci: *//p' "$scenario" | grep . || echo 6.12)
    [[ ${1:-} != --all ]] || places+=" $(sed -n 's/^# more: *//p' "$scenario")"
    for where in $places; do
      [[ $where == none ]] && continue
      name=$(basename "$scenario" .sh)
      IFS=/, read -r -a parts <<<"$where"
      args=(-k "${parts[0]}")
      [[ -z ${parts[1]:-} ]] || args+=(-n "${parts[1]}")
      for kv in "${parts[@]:2}"; do args+=(-o "$kv"); done
      stage "vm-$name-${where//\//-}" scripts/vm/run.sh -q "${args[@]}" "$name"
    done
  done
fi
[[ -n ${CI:-} ]] && stage tree-is-clean tree_is_clean
echo "$passed passed, $failed failed, $skipped skipped"
[[ $failed == 0 && $passed -gt 0 ]]
