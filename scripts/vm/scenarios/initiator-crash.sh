#!/bin/bash
# rnbd-initiator is killed with -9 under verified load and started again: the device survives, no error reaches fio.
# timeout: 500
# long: 6.12 6.12/rxe,REMOTE=kernel
source "$VM_DIR/lib.sh"
setup_remote 1

# crash EXPORT CONFIG_CALLS MEMBERS: the restart takes everything from the configuration that the first start saved.
crash() {
  local export=$1 more=$2 dev n bad=0
  say "$export"
  initiator_config 1 '"reconnect_delay_sec": 1' >/run/initiator.json
  start_initiator /run/initiator.json
  check "the bdev is there" irpc bdev_get_bdevs '{"name": "Remote0", "timeout": 150000}'
  dev=$(start_export "$export" Remote0 "$more") || { fail "$export export"; return; }
  must save_config /run/saved.json
  start_load "$dev" 4k
  check "I/O moves" load_moves
  for n in 1 2 3; do
    kill_initiator
    sleep 2
    start_initiator /run/saved.json
    wait_for load_moves || bad=$((bad + 1))
  done
  check_eq "3 times: killed, started again, I/O goes on" "$bad" 0
  check "no error reached fio" stop_load
  check "stop $dev" stop_export "$export" "$dev"
  stop_initiator
}
# What `save_config` of SPDK's client does.
save_config() {
  python3 - "$VM_DIR/rpc.py" "$INITIATOR_SOCK" >"$1" <<'PY'
import json, subprocess, sys
def call(method, params=None):
    args = [sys.argv[1], sys.argv[2], method] + ([json.dumps(params)] if params else [])
    return json.loads(subprocess.run(args, check=True, capture_output=True).stdout)
subsystems = [s["subsystem"] for s in call("framework_get_subsystems")]
print(json.dumps({"subsystems": [
    {"subsystem": s, "config": call("framework_get_config", {"name": s})} for s in subsystems]}, indent=2))
PY
}
for export in nbd ublk; do
  need_export $export || { say "no $export in this kernel"; continue; }
  crash $export "$([[ $export != nbd ]] || echo '"dead_conn_timeout_sec": 60')"
done
[[ $REMOTE != target ]] || stop_target
finish
