#!/bin/bash
# rnbd-initiator under verified load: paths cut and healed, all of them cut, server killed, disconnected, itself killed.
# timeout: 600
# long: 6.12 6.12/rxe,REMOTE=kernel 6.12/rxe,EXPORT=ublk 6.12/soft 6.12/soft,REMOTE=kernel newest
source "$VM_DIR/lib.sh"
setup_remote 2
initiator_config 2 '"reconnect_delay_sec": 1' >/run/initiator.json
start_initiator /run/initiator.json
export=${EXPORT:-nbd}
need_export "$export" || die "no $export in this kernel"
check "the bdev is there" irpc bdev_get_bdevs '{"name": "Remote0", "timeout": 150000}'
dev=$(start_export "$export" Remote0 "${EXPORT_MORE:-}") || die "$export export"

connected() {
  [[ $(irpc bdev_rnbd_get_sessions | python3 -c 'import json, sys
print(sum(p["state"] == "connected" for s in json.load(sys.stdin) for p in s["paths"]))') == "$1" ]]
}
check "both paths are connected" wait_for connected 2
start_load "$dev" 4k
check "I/O moves" load_moves
lost=0
for n in $(seq 1 10); do
  cut_path 1
  wait_for connected 1 && load_moves || lost=$n
  heal_path 1
  # The kernel's server keeps the old path until its own heartbeat fails, and refuses the return until then.
  wait_for connected 2 || lost=$n
  [[ $lost == 0 ]] || die "cut $n of path 1: it did not die, I/O did not go on, or it did not come back"
done
ok "10 times: path 1 dies, I/O goes on, path 1 comes back"

say "all paths are cut for 10 s"
cut_path 1
cut_path 2
sleep 10
heal_path 1
heal_path 2
check "I/O goes on" wait_for load_moves
check "both paths come back" wait_for connected 2

if [[ $REMOTE == target ]]; then
  say "server-side disconnect"
  check "rnbd_disconnect_session" rpc rnbd_disconnect_session '{"session": "s1"}'
  check "both paths come back" wait_for connected 2
  check "I/O goes on" load_moves
  say "kill -9 of the target"
  kill_remote
  sleep 3
  start_remote
  check "both paths come back" wait_for connected 2
  check "I/O goes on" load_moves
else
  say "server-side disconnect"
  for i in 1 2; do
    for d in /sys/class/rtrs-server/s1/paths/*"$(remote_addr $i)"; do echo 1 >"$d/disconnect"; done
  done
  check "both paths come back" wait_for connected 2
  check "I/O goes on" load_moves
fi
check "no error reached fio" stop_load
check "stop $dev" stop_export "$export" "$dev"
check "unmap" irpc bdev_rnbd_unmap '{"name": "Remote0"}'
stop_initiator
[[ $REMOTE != target ]] || stop_target
finish
