#!/bin/bash
# 50 map, export, use, stop, unmap cycles of each export leave no device, session, descriptor or memory behind.
# timeout: 600
# long: 6.12 6.12/soft 6.1
source "$VM_DIR/lib.sh"
setup_remote 1
echo '{"subsystems": []}' >/run/initiator.json
start_initiator /run/initiator.json
exports='"vhost"'
for export in nbd ublk; do
  ! need_export $export || exports+=", \"$export\""
done
cat >/run/cycles.json <<JSON
{"initiator": "$INITIATOR_SOCK", "target": "$TARGET_SOCK", "pid": $INITIATOR_PID, "cycles": ${CYCLES:-50},
 "exports": [$exports], "rnbd_perf": "$BIN_DIR/rnbd-perf",
 "map": {"name": "Remote0", "sessname": "s1", "device_path": "$REMOTE_PATH",
   "paths": [{"src": "$(local_addr 1)", "dst": "$(remote_addr 1)"}]}}
JSON
python3 "$VM_DIR/initiator_cycles.py" /run/cycles.json | tee "$OUT_DIR/cycles.txt"
check_eq "cycles of $exports" "${PIPESTATUS[0]}" 0
check_fails "an error in the initiator's log" grep -aE ' ERROR ' "$INITIATOR_LOG"
stop_initiator
stop_target
finish
