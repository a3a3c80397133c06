#!/bin/bash
# Tests of SPDK's bdevs, against an installed SPDK (SPDK_DIR, or pkg-config finds it; docs/spdk.md): the conformance suite on
# malloc, volumes and aio, a target that serves a volume, what may go wrong (spdk-checks.py), and SPDK's client. Once as an
# ordinary user without hugepages, and once with hugepages where this user may have them. SPDK's own target, spdk_tgt, is the
# peer of some checks: of SPDK_DIR, or in PATH. Exits 77 without SPDK.
# Usage: scripts/test-spdk.sh [BIN_DIR]        where rtrs-load is (default build/release)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
bin=$(realpath "${1:-build/release}")

if [[ -z ${SPDK_DIR:-} ]] && ! pkg-config --exists spdk_bdev 2>/dev/null; then
  echo "SKIPPED: SPDK is not installed here, nothing of it was tested; set SPDK_DIR to its prefix (docs/spdk.md)"
  exit 77
fi
[[ -x $bin/rtrs-load ]] || { echo "no $bin/rtrs-load: cargo build --release -p perf"; exit 1; }

echo "==== lints"
cargo clippy -p bdev -p engine -p rnbd-target -p rnbd-initiator --all-targets \
  --features bdev/spdk,engine/spdk,rnbd-target/spdk,rnbd-initiator/spdk -- -D warnings

echo "==== build"
built=$(mktemp)
cargo test -p bdev -p engine --features bdev/spdk,engine/spdk --lib --test spdk --test spdk_life --no-run \
  --message-format=json-render-diagnostics >"$built"
mapfile -t tests < <(python3 - "$built" <<'PY'
import json, sys
for line in open(sys.argv[1]):
    m = json.loads(line)
    if m.get("executable") and m["profile"]["test"]:
        print(m["executable"])
PY
)
cargo build -p rnbd-target --features spdk --message-format=json-render-diagnostics >"$built"
target=$(python3 - "$built" <<'PY'
import json, sys
print([m["executable"] for m in map(json.loads, open(sys.argv[1])) if m.get("executable")][-1])
PY
)
rm "$built"

dir=$(mktemp -d "${TMPDIR:-/tmp}/rnbd-spdk-test.XXXXXX")
pid=''
cleanup() {
  [[ -z $pid ]] || kill -KILL "$pid" 2>/dev/null || true
  rm -rf "$dir"
}
trap cleanup EXIT
mkdir "$dir/files"
cp "${tests[@]}" "$dir/"
cp "$target" "$dir/rnbd-target"
cp "$bin/rtrs-load" scripts/spdk-checks.py scripts/nbd_raw.py scripts/vm/rpc.py "$dir/"
peer=${SPDK_DIR:+$SPDK_DIR/bin/}spdk_tgt
peer=$(command -v "$peer" || true)
# Own addresses, so that it runs beside whatever else speaks RoCE on this host.
server=127.94.0.1 client=127.94.0.2
sed "s/0\.0\.0\.0/$server/" configs/spdk.json >"$dir/no-huge.json"
sed '/"no_huge"/d; s/"mem_size": 1024/"no_pci": true/' "$dir/no-huge.json" >"$dir/huge.json"
as=()
if [[ $(id -u) == 0 ]]; then
  chown -R nobody "$dir"
  as=(setpriv --reuid=nobody --regid=nogroup --clear-groups --inh-caps=-all --bounding-set=-all)
fi

# run_tests [VARIABLE=VALUE]... -- [COMMAND...]: every test program, one after the other.
run_tests() {
  local env=() test
  while [[ $1 != -- ]]; do env+=("$1"); shift; done
  shift
  for test in "${tests[@]}"; do
    echo "-- $(basename "$test")"
    (cd "$dir" && env "${env[@]}" TEST_FILES="$dir/files" "$@" "$dir/$(basename "$test")")
  done
}

# start CONFIG [COMMAND...]: the target, until it is ready.
start() {
  local config=$1
  shift
  : >"$dir/target.log"
  "$@" "$dir/rnbd-target" -c "$config" -r "$dir/rpc.sock" -m 0x1 >"$dir/target.log" 2>&1 &
  pid=$!
  wait_while "$pid" "the target is ready" grep -q ' ready ' "$dir/target.log" || { cat "$dir/target.log"; return 1; }
}

stop() {
  kill -TERM "$pid"
  wait "$pid"
  pid=''
  grep 'SPDK stopped whole=true' "$dir/target.log"
}

rpc() { scripts/vm/rpc.py "$dir/rpc.sock" "$@"; }

# Ticks of 10 ms that the target has used.
cpu() { awk '{print $14 + $15}' "/proc/$pid/stat"; }

# Milliseconds of the clock, and how often the reactor and the control thread have gone to sleep by themselves.
sleeps() {
  local task name
  date +%s%3N
  for task in "/proc/$pid/task"/*; do
    name=$(<"$task/comm")
    [[ $name != reactor_* && $name != rnbd-target ]] || awk '/^voluntary/ {print $2}' "$task/status"
  done
}

# sleeping: for three seconds both threads sleep, and wake up to look after SPDK fifty times a second, not a hundred. Whatever
# else the machine does, a thread that polls does not sleep, and one that sleeps does not wake up more often for it.
sleeping() {
  local before after i ms
  mapfile -t before < <(sleeps)
  sleep 3
  mapfile -t after < <(sleeps)
  ms=$((after[0] - before[0]))
  ((${#before[@]} == 3 && ${#after[@]} == 3)) || return 1
  for i in 1 2; do
    ((after[i] - before[i] >= 3 && (after[i] - before[i]) * 10 <= ms)) || return 1
  done
  printf 'wakes up %s and %s times in %s ms\n' $((after[1] - before[1])) $((after[2] - before[2])) "$ms" >"$dir/idle"
}

# serve CONFIG [COMMAND...]: verified load, idle share, saved configuration, second start.
serve() {
  local config=$1 before volumes
  shift
  start "$config" "$@"
  "$dir/rtrs-load" "$server" disk0 -p soft-roce --src "$client" -m 0x2 -w verify -o 4096 -q 32 -t 5 --json "$dir/load.json"
  python3 - "$dir/load.json" <<'PY'
import json, sys
load = json.load(open(sys.argv[1]))
assert load["iops"] > 0 and load["first_error"] is None and load["verify"], load
print("verified:", load["verify"])
PY
  volumes=$(rpc bdev_lvol_get_lvols)
  grep -q '"name": "disk0"' <<<"$volumes" || { echo "SPDK's methods cannot be called: $volumes"; return 1; }
  before=$(cpu)
  wait_while "$pid" "an idle target sleeps" sleeping
  echo "idle: $(<"$dir/idle"), $(($(cpu) - before)) ticks of 10 ms"
  rpc framework_get_config '{"name": "spdk"}' >"$dir/saved.txt"
  python3 - "$dir/saved.txt" "$dir/saved.json" <<'PY'
import json, sys
config = json.load(open(sys.argv[1]))
json.dump({"subsystems": [{"subsystem": "spdk", "config": config}]}, open(sys.argv[2], "w"))
PY
  stop
  chmod a+r "$dir/saved.json"
  start "$dir/saved.json" "$@"
  # Contents of a disk in memory are gone, and the volumes on it.
  rpc bdev_get_bdevs '{"name": "SpdkMalloc0"}' >/dev/null
  stop
}

echo "==== ordinary user, no hugepages"
run_tests SPDK_TEST_NO_HUGE=1 -- "${as[@]}"
serve "$dir/no-huge.json" "${as[@]}"
XDG_RUNTIME_DIR=$dir "${as[@]}" /usr/bin/python3 "$dir/spdk-checks.py" "$dir/files" "$dir/rnbd-target" ${peer:+"$peer"}

echo "==== SPDK's client of the same release"
start "$dir/no-huge.json" "${as[@]}"
venv=build/spdk-client-of-release
release=$(grep -h -o 'version="v[0-9.]*"' "$dir/target.log" | tail -n 1 | tr -d '"a-z=' | sed 's/\.0/./')
if "$venv/bin/pip" show spdk 2>/dev/null | grep -q "^Version: $release" ||
  { python3 -m venv "$venv" && "$venv/bin/pip" install -q --disable-pip-version-check "spdk==$release"; }; then
  spdk() { "$venv/bin/spdk-rpc" -s "$dir/rpc.sock" "$@"; }
  # Another release's parameters of this method are refused by SPDK.
  refused=$(spdk bdev_nvme_attach_controller -b N -t tcp -a 127.0.0.1 -s 9 -f ipv4 -n nqn.x:y 2>&1) && exit 1
  # EIO: nobody is there. Parameters of another release would be refused.
  grep -q '"code": -5,' <<<"$refused" || { echo "$refused"; exit 1; }
  spdk bdev_passthru_create -b store/disk0 -p P >/dev/null
  spdk bdev_wait_for_examine
  answer=$(spdk bdev_get_bdevs -b P)
  grep -q '"passthru": {' <<<"$answer" || { echo "$answer"; exit 1; }
  answer=$(spdk save_config)
  grep -q bdev_passthru_create <<<"$answer" || { echo "$answer"; exit 1; }
  echo "spdk $release: ok"
else
  echo "NOT TESTED: spdk $release cannot be installed from PyPI (python3-venv and a network are needed)"
fi
stop

echo "==== hugepages"
free=$(cat /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages 2>/dev/null || echo 0)
if ((free < 512)) || ! grep -q ' hugetlbfs ' /proc/mounts || [[ $(id -u) != 0 ]]; then
  echo "NOT TESTED: hugepages ($free are free; root, 512 of 2 MiB and a hugetlbfs are needed:" \
    "sysctl vm.nr_hugepages=600; mount -t hugetlbfs nodev /dev/hugepages)"
else
  run_tests --
  echo "-- as if there were PCI devices: data go through SPDK's memory"
  run_tests SPDK_TEST_DEVICES=1 --
  serve "$dir/huge.json"
fi
echo "SPDK $(grep -h -o 'version="v[0-9.]*"' "$dir/target.log" | tail -n 1): done"
