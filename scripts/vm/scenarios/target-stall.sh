#!/bin/bash
# A target that does not run for a while (paging, a migrated VM, a debugger) costs the kernel's client time and no error, with
# one path. ACK_DELAY=15 (run.sh -o) announces what rxe itself does, and shows the fault: half a second, and the client has EIO.
# timeout: 500
# long: 6.12/tap newest/tap 6.1/tap
source "$VM_DIR/lib.sh"
setup_net 1
cat >/run/target.json <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 131072, "block_size": 512}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_create_export", "params": {"device_path": "Malloc0", "bdev_name": "Malloc0"}},
    {"method": "rnbd_create_listener",
    "params": {"traddr": "10.9.1.1", "provider": "soft-roce"${ACK_DELAY:+, \"ack_delay\": $ACK_DELAY}}}]}]}
JSON
start_target /run/target.json
load_rnbd_client
dev=$(map_device s1 "$(path_spec 1)" Malloc0) || die "map"
start_load "$dev" 4k 8
check "the load runs" load_moves
for seconds in 0.5 1 2 4; do
  say "the target stands for $seconds s"
  on_server "kill -STOP $TARGET_PID; sleep $seconds; kill -CONT $TARGET_PID"
  check "the load goes on after $seconds s" load_moves
  check "the device was not closed" test "$(dev_state "$dev")" = open
done
check "no request failed, and every block is right" stop_load
check "the kernel tells of no failed request" bash -c '! dmesg | grep -q "RTRS failed to transfer IO\|I/O error, dev rnbd"'
must unmap_device "$dev"
stop_target
finish
