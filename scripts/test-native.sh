#!/bin/bash
# RNBD between two processes on the loopback device, without RDMA, privileges or kernel modules: rnbd-target over
# soft-roce, and rtrs-load writes stamped blocks and reads them back for SECONDS (default 60).
# Usage: scripts/test-native.sh [BIN_DIR [SECONDS]]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
bin=${1:-build/release} seconds=${2:-60}
# So that it runs beside whatever else speaks RoCE on this host.
server=$(own_address 0) client=$(own_address 1)

dir=$(mktemp -d "${TMPDIR:-/tmp}/rnbd-native.XXXXXX")
target=''
cleanup() {
  [[ -z $target ]] || kill -KILL "$target" 2>/dev/null || true
  rm -rf "$dir"
}
trap cleanup EXIT
cp "$bin/rnbd-target" "$bin/rtrs-load" "$dir/"
cat >"$dir/target.json" <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 131072, "block_size": 512}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_create_export", "params": {"device_path": "disk0", "bdev_name": "Malloc0"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "$server", "provider": "auto"}}]}]}
JSON
as=()
if [[ $(id -u) == 0 ]]; then
  chown -R nobody "$dir"
  as=(setpriv --reuid=nobody --regid=nogroup --clear-groups --inh-caps=-all --bounding-set=-all)
fi

: >"$dir/target.log"
"${as[@]}" "$dir/rnbd-target" -c "$dir/target.json" -r "$dir/rpc.sock" -m 0x1 >"$dir/target.log" 2>&1 &
target=$!
wait_while "$target" "ready" grep ' ready ' "$dir/target.log" || { cat "$dir/target.log"; exit 1; }
grep 'listening for RTRS' "$dir/target.log" | grep 'provider="soft-roce"' || { cat "$dir/target.log"; exit 1; }
echo "capabilities of the target: $(awk '/^CapEff/{print $2}' "/proc/$target/status"), user $(stat -c %U "/proc/$target")"
"${as[@]}" "$dir/rtrs-load" "$server" disk0 -p soft-roce --src "$client" -m 0x2 -w verify -o 4096 -q 32 -t "$seconds" \
  --json "$dir/load.json"
scripts/vm/rpc.py "$dir/rpc.sock" rnbd_get_devices
kill -TERM "$target"
wait "$target"
target=''
python3 - "$dir/load.json" <<'PY'
import json, sys
load = json.load(open(sys.argv[1]))
assert load["iops"] > 0 and load["first_error"] is None and load["verify"], load
print("verified:", load["verify"])
PY
