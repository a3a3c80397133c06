#!/bin/bash
# With every export of a remote disk in place and idle, the initiator sleeps.
# timeout: 200
# long: 6.12
source "$VM_DIR/lib.sh"
setup_remote 2
initiator_config 2 >/run/initiator.json
start_initiator /run/initiator.json -m '[0-1]'
check "the bdev is there" irpc bdev_get_bdevs '{"name": "Remote0", "timeout": 150000}'
for export in nbd ublk; do
  need_export $export || continue
  dev=$(start_export $export Remote0) || { fail "$export export"; continue; }
  check "$dev works" fio_verify "$dev" 4k 1
done
check "vhost-user-blk" irpc vhost_create_blk_controller '{"ctrlr": "/run/vhost.0", "dev_name": "Remote0"}'
sleep 2
check_pid_asleep "all exports idle" "$INITIATOR_PID" 30
stop_initiator
stop_target
finish
