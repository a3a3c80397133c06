#!/bin/bash
# Runs the tests, in one of three tiers. Installs what it needs; logs are in build/logs/.
#
#   scripts/test.sh            what CI runs: everything deterministic, and each front end once against a real kernel
#   scripts/test.sh --quick    the inner loop: format, lints, unit and property tests
#   scripts/test.sh --long     everything: all VM scenarios and kernels, peers of newer Debians, fuzzing
#   scripts/test.sh [TIER] --list            the stages of a tier
#   scripts/test.sh [TIER] --only REGEX      those stages of a tier whose names match; repeatable
#
# The tier of a stage is the first word of its line below. VM scenarios say theirs in their "# ci:" and "# long:" lines.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

usage() { sed -n '4,8s/^#  *//p' scripts/test.sh; }
tier=ci list='' only=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --quick | --long) tier=${1#--} ;;
    --list) list=yes ;;
    --only) [[ $# -ge 2 ]] || { usage >&2; exit 2; }; only+=("$2"); shift ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
  esac
  shift
done

logs=build/logs
mkdir -p "$logs"
# A line for each stage that has ended: "passed NAME", "failed NAME", "skipped NAME", "repeated NAME: why". Stages that run
# beside each other write to it.
results=$logs/results
# A list may be asked for while a run is under way.
[[ -n $list ]] || : >"$results"

# wanted TIER NAME: the stage belongs to what is run now.
wanted() {
  local pattern
  case $1 in
    quick) ;;
    ci) [[ $tier != quick ]] || return 1 ;;
    long) [[ $tier == long ]] || return 1 ;;
    *) echo "test.sh: stage $2 has no tier \"$1\"" >&2; exit 2 ;;
  esac
  [[ ${#only[@]} -gt 0 ]] || return 0
  for pattern in "${only[@]}"; do [[ ! $2 =~ $pattern ]] || return 0; done
  return 1
}

# How much slower this machine is, now, than the one on which the limits of tests were set: at least 1. Whatever waits for
# something multiplies its limit by it. No verdict depends on time otherwise.
measure_speed() {
  TIME_SCALE=$(python3 - <<'PY'
import time
def loop():
    start = time.monotonic()
    sum(i * i for i in range(1_000_000))
    return time.monotonic() - start
print(max(1, round(max(loop() for _ in range(3)) / 0.1)))
PY
  ) || TIME_SCALE=4
  export TIME_SCALE
}

# stage TIER NAME COMMAND...: a line when it begins and one when it has ended, the output in a file, the end of it on the
# console when it fails.
stage() {
  local level=$1 name=$2 rc=0 start=$SECONDS log=$logs/$2.log
  shift 2
  wanted "$level" "$name" || return 0
  if [[ -n $list ]]; then
    printf '%-6s %s\n' "$level" "$name"
    return 0
  fi
  printf '        %s ...\n' "$name"
  measure_speed
  "$@" >"$log" 2>&1 </dev/null || rc=$?
  case $rc in
    0) verdict passed ok "$(summary "$log")" ;;
    77) verdict skipped SKIPPED "$(tail -n 1 "$log")" ;;
    *) verdict failed FAILED "status $rc, see $log
$(tail -n 40 "$log" | sed 's/^/    /')" ;;
  esac
  # What scripts/vm/run.sh says of a run that told nothing of what was to be checked.
  ! grep -aq 'running once more$' "$log" || echo "repeated $name: $(grep -a -m 1 'running once more$' "$log")" >>"$results"
  return 0
}
# verdict RESULT WORD TEXT, of the stage under way.
verdict() {
  echo "$1 $name" >>"$results"
  printf '%-7s %-36s %4d s  %s\n' "$2" "$name" $((SECONDS - start)) "$3"
}

# How many tests a stage ran, in the words of its runner.
summary() {
  awk '/^test result:/ {p += $4; f += $6; seen = 1} /^[0-9]+ passed, [0-9]+ failed/ {p += $1; f += $3; seen = 1}
       END {if (seen) printf "%d tests passed, %d failed", p, f}' "$1"
}

# scenarios: each VM scenario on the kernels and networks that it names: "# ci: SERIES[/NET[,KEY=VALUE]...] ..." for the tiers
# ci and long, "# long: …" for long; see scripts/vm/run.sh.
scenarios() {
  local file name level where parts args kv
  for file in scripts/vm/scenarios/*.sh; do
    name=$(basename "$file" .sh)
    grep -Eq '^# (ci|long|by hand):' "$file" || { echo "test.sh: $file names no tier" >&2; exit 2; }
    for level in ci long; do
      for where in $(sed -n "s/^# $level: *//p" "$file"); do
        IFS=/, read -r -a parts <<<"$where"
        args=(-k "${parts[0]}")
        [[ -z ${parts[1]:-} ]] || args+=(-n "${parts[1]}")
        for kv in "${parts[@]:2}"; do args+=(-o "$kv"); done
        # CI builds nothing for release but the budgets' program.
        [[ $tier == long ]] || args+=(-o "BIN_DIR=$PWD/build/debug")
        stage "$level" "vm-$name-${where//[\/,]/-}" scripts/vm/run.sh -q "${args[@]}" "$name"
      done
    done
  done
}

packages() { scripts/packages.sh build valgrind openssl; }
loom() {
  RUSTFLAGS="--cfg loom" cargo test -p reactor --lib --target-dir build/loom waker &&
    RUSTFLAGS="--cfg loom" cargo test -p roce-proto --lib --target-dir build/loom keys
}
docs() { RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps; }
# Instructions per request on the hot paths, against a stored budget: no other load on the machine changes them.
budget() { cargo build --release -p hot-paths --bins && build/release/instruction-budget check; }
peers() { scripts/peers.sh build && scripts/peers.sh versions; }
tree_is_clean() { git diff --exit-code HEAD --stat && [[ -z $(git status --porcelain) && ! -e target/debug && ! -e target/release ]]; }

# What takes programs that cargo test has built: they have debug assertions and overflow checks.
use_programs() {
  # Whatever starts a program here starts it in its filter of system calls: one that is missing there ends it.
  local -x RNBD_SANDBOX=kill
  stage quick unit scripts/test-unit.py &
  stage quick nbd scripts/test-nbd.sh build/debug
  stage ci nbd-client scripts/test-nbd-client.sh build/debug
  stage ci spdk-client scripts/test-spdk-client.sh build/debug/rnbd-target
  stage ci native scripts/test-native.sh build/debug 20
  stage ci units scripts/test-units.sh
  stage ci paths scripts/test-paths.sh build/debug
  stage long wireguard scripts/test-wireguard.sh build/debug
  stage long perf scripts/test-perf.sh build/debug
  wait
}
# What builds something else. It keeps the processors busy while the above waits for states.
build_more() {
  stage ci loom loom
  stage ci docs docs
  stage ci budget budget
  stage ci vm-build scripts/vm/build.sh -k 6.12
  stage long vm-build-all scripts/vm/build.sh -k 6.12 -k 6.1 -k newest
  stage long release cargo build --release --workspace --bins
}

# Nobody builds twice in CI.
[[ -z ${CI:-} ]] || export CARGO_INCREMENTAL=0
stage quick packages packages
stage quick fmt cargo fmt --all --check
stage quick clippy cargo clippy --workspace --all-targets -- -D warnings
stage quick build cargo test --workspace --no-run
if [[ $tier == quick || -n $list ]]; then
  use_programs
  build_more
else
  use_programs &
  build_more
  wait
fi
scenarios
stage long peers peers
for suite in trixie sid; do
  stage long "nbd-$suite" scripts/peers.sh run "$suite" scripts/test-nbd.sh build/debug
  stage long "nbd-client-$suite" scripts/peers.sh run "$suite" scripts/test-nbd-client.sh build/debug
done
stage long fuzz fuzz/run.sh 60
# Without SPDK it says SKIPPED.
stage long spdk scripts/test-spdk.sh build/release
[[ -z ${CI:-} ]] || stage ci tree-is-clean tree_is_clean
[[ -z $list ]] || exit 0

count() { grep -c "^$1 " "$results"; }
passed=$(count passed) failed=$(count failed) skipped=$(count skipped) repeated=$(count repeated)
echo
if [[ $repeated != 0 ]]; then
  echo "repeated once, for a reason that is not what was to be checked:"
  sed -n 's/^repeated /  /p' "$results"
  # One such accident is bad luck. Two are a fault.
  [[ $repeated == 1 ]] || { failed=$((failed + 1)); echo "more than one repetition in a run is a failure"; }
fi
[[ $failed == 0 ]] || sed -n 's/^failed /failed: /p' "$results"
printf '%d min %d s\n' $((SECONDS / 60)) $((SECONDS % 60))
echo "$passed passed, $failed failed, $skipped skipped"
# In CI nothing that a stage needs may be missing.
[[ $failed == 0 && $passed -gt 0 && (-z ${CI:-} || $skipped == 0) ]]
