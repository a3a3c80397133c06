#!/bin/bash
# The tools of perf/ for a moment each: a comparison with the peers that are here, a page of it, plots. Whether they work, not
# how fast anything is. Usage: scripts/test-perf.sh [BIN_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
bin=$(realpath "${1:-build/release}")
scripts/packages.sh fio nbdkit nbd-server qemu-utils libnbd-bin procps
dir=$(mktemp -d "${TMPDIR:-/tmp}/rnbd-test-perf.XXXXXX")
trap 'rm -rf "$dir"' EXIT

# A machine with other work may let a contender wait for all of its time, so there is more of it the next time.
for seconds in 0.5 "$(limit 5)" "$(limit 30)"; do
  rc=0
  python3 -B perf/compare --bin "$bin" --rounds 2 --seconds "$seconds" -o "$dir/compare.json" --report "$dir/compare.html" \
    bdev nbd vhost roce
  python3 - "$dir" <<'PY' || rc=$?
import json, sys
runs = json.load(open(f"{sys.argv[1]}/compare.json"))
ours = [r for r in runs if r["label"].startswith("rnbd")]
cases = {r["case"] for r in ours}
assert len(cases) >= 19, sorted(cases)
assert all(r["format"] == "rnbd-perf-1" and not r.get("errors") for r in runs)
idle = [case for case in cases if not any(r["iops"] > 0 for r in ours if r["case"] == case)]
if idle:
    print("not one request of", idle)
    sys.exit(75)
page = open(f"{sys.argv[1]}/compare.html").read()
assert all(f">{r['case']}<" in page for r in ours) and page.count("<svg") > 20, page[:300]
print(f"{len(runs)} runs, a page of {len(page)} bytes")
PY
  [[ $rc == 75 ]] || break
done
[[ $rc == 0 ]]
"$bin/rnbd-perf" report "$dir/compare.json" -o "$dir/again.html" --svg "$dir/svg"
count=$(find "$dir/svg" -name '*.svg' | wc -l)
[[ $count -gt 20 ]] || { echo "only $count plots"; exit 1; }
truncate -s 16M "$dir/file"
for kind in read write; do
  DEVICE=$dir/file KIND=$kind SECONDS_PER_ROW=1 fio perf/fio/block.fio --output="$dir/fio.txt" || { cat "$dir/fio.txt"; exit 1; }
done
DEVICE=$dir/file SIZE=8M fio perf/fio/verify.fio --output="$dir/fio.txt" || { cat "$dir/fio.txt"; exit 1; }
