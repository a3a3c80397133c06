#!/bin/bash
# The main job, shown on this machine alone, without RDMA, VM or root: builds both programs, serves a disk with
# rnbd-target, maps it with rnbd-initiator (RoCEv2 in user space between 127.0.0.1 and 127.0.0.2), and runs fio on it.
# Usage: scripts/demo.sh [nbd-socket|nbd|ublk] [SECONDS_PER_RUN]
# The device is /dev/ublkbN or /dev/nbdN where this user may make one, else a unix socket that speaks NBD.
# Root is only needed if Debian packages are missing. Everything stays in build/.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n== %s\n' "$*"; }
say() { printf '$ %s\n' "$*"; }

dir=build/demo target='' initiator=''
cleanup() {
  [[ -z $initiator ]] || kill -INT "$initiator" 2>/dev/null || true
  [[ -z $initiator ]] || wait "$initiator" || true
  [[ -z $target ]] || kill -TERM "$target" 2>/dev/null || true
  [[ -z $target ]] || wait "$target" || true
}
trap cleanup EXIT

# wait_for FILE WORD PID: until the program has said it.
wait_for() {
  for ((i = 0; i < 300; i++)); do
    grep -q -- "$2" "$1" && return
    kill -0 "$3" 2>/dev/null || break
    sleep 0.1
  done
  echo "no '$2' from the program; it said:" >&2
  cat "$1" >&2
  return 1
}

# The best kind of device that this user may make.
usable() {
  modprobe -q ublk_drv 2>/dev/null || true
  modprobe -q nbd 2>/dev/null || true
  if [[ -w /dev/ublk-control ]]; then echo ublk; elif [[ -w /dev/nbd0 ]]; then echo nbd; else echo nbd-socket; fi
}

# free_nbd: the first kernel NBD device that nobody uses.
free_nbd() {
  local d
  for d in /sys/block/nbd*; do
    [[ -e $d/pid || $(cat "$d/size") != 0 ]] || { echo "/dev/${d##*/}"; return; }
  done
}

step "1/4 packages"
scripts/packages.sh build fio
echo "all there"

step "2/4 build"
cargo build --release -p rnbd-target -p rnbd-initiator
bin=$(cargo metadata --format-version 1 --no-deps | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')/release

step "3/4 a remote disk"
mkdir -p "$dir"
rm -f "$dir"/*
kind=${1:-$(usable)} seconds=${2:-8}
# Both programs want the RoCE port (UDP 4791), so each gets an address of its own.
sed 's/"0.0.0.0"/"127.0.0.1"/' configs/target.json >"$dir/target.json"
say "rnbd-target -c configs/target.json          # listening on 127.0.0.1"
: >"$dir/target.log"
"$bin/rnbd-target" -c "$dir/target.json" -r "$dir/target.sock" -m 0x1 >"$dir/target.log" 2>&1 &
target=$!
wait_for "$dir/target.log" ready "$target"

case $kind in
  ublk) use=(--ublk) ;;
  nbd) use=(--nbd "$(free_nbd)") ;;
  nbd-socket) use=(--nbd-socket "$dir/disk0.sock") ;;
  *) echo "no such device: $kind; use nbd-socket, nbd or ublk" >&2 && exit 1 ;;
esac
map=(map sessname=demo path=ip:127.0.0.2@ip:127.0.0.1 device_path=disk0 "${use[@]}")
say "rnbd-initiator ${map[*]}"
cores=0x1
[[ $(nproc) -lt 2 ]] || cores=0x2
: >"$dir/initiator.log"
"$bin/rnbd-initiator" "${map[@]}" -m "$cores" -r "$dir/initiator.sock" >"$dir/initiator.log" 2>&1 &
initiator=$!
wait_for "$dir/initiator.log" '^ready:' "$initiator"
cat "$dir/initiator.log"
place=$(sed -n 's/^ready: \([^ ]*\) .*/\1/p' "$dir/initiator.log")

step "4/4 fio on $place"
case $place in
  nbd*) engine=(--ioengine=nbd "--uri=$place") ;;
  *) engine=(--ioengine=libaio --direct=1 "--filename=$place") ;;
esac
# run NAME FIO_OPTIONS...
run() {
  local name=$1
  shift
  printf '%s\n' "$name"
  fio --name="$name" "${engine[@]}" --size=128m "$@" --eta=always --eta-newline=1 \
    --output="$dir/${name// /_}.json" --output-format=json 2>&1 | progress
}
# On a terminal fio rewrites its line; elsewhere each state is a line.
progress() { if [[ -t 1 ]]; then cat; else tr '\r' '\n' | grep -F 'eta' || true; fi; }
timed=(--time_based "--runtime=$seconds")
run "4k random write, verified" --rw=randwrite --bs=4k --iodepth=32 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --size=32m
run "4k random read, QD 1" --rw=randread --bs=4k --iodepth=1 "${timed[@]}"
run "4k random read, QD 32" --rw=randread --bs=4k --iodepth=32 "${timed[@]}"
run "4k random write, QD 32" --rw=randwrite --bs=4k --iodepth=32 "${timed[@]}"
run "128k read, QD 16" --rw=read --bs=128k --iodepth=16 "${timed[@]}"

python3 - "$dir" <<'PY'
import glob, json, os, sys
files = sorted(glob.glob(sys.argv[1] + "/*.json"), key=os.path.getmtime)
print(f"\n  {'':26} {'IOPS':>9} {'MiB/s':>8} {'p50 us':>8} {'p99 us':>8} {'p99.9 us':>9}")
for file in files:
    if file.endswith("target.json"):
        continue
    text = open(file).read()
    job = json.loads(text[text.index("{"):])["jobs"][0]
    if job["error"]:
        sys.exit(f"fio failed: {job['jobname']}: error {job['error']}")
    side = job["write"] if job["write"]["total_ios"] else job["read"]
    p = side["clat_ns"]["percentile"]
    cells = "".join(f" {p[k] / 1e3:{w}.0f}" for k, w in
                    (("50.000000", 8), ("99.000000", 8), ("99.900000", 9)))
    print(f"  {job['jobname']:26} {side['iops']:9.0f} {side['bw_bytes'] / 2**20:8.1f}{cells}")
cores = os.cpu_count()
print(f"\n  Everything shares this machine's {cores} core{'s' * (cores > 1)}: target, initiator and fio.")
PY
step "done; stopping"
kill -INT "$initiator"
wait "$initiator" || echo "rnbd-initiator ended with $?"
initiator=''
sed '1,/^ready:/d' "$dir/initiator.log"
