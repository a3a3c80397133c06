#!/bin/bash
# With the adaptive policy the target sleeps without a client, and with a connected one that has nothing to do.
# timeout: 200
# long: 6.12 6.12/soft
source "$VM_DIR/lib.sh"
setup_net 1
cat >/run/target.json <<'JSON'
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 131072, "block_size": 512}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_create_export", "params": {"device_path": "Malloc0", "bdev_name": "Malloc0"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "10.9.1.1"}}]}]}
JSON
start_target /run/target.json -m '[0-1]'
load_rnbd_client
check_asleep "no client" 30
dev=$(map_device s1 "$(path_spec 1)" Malloc0) || die "map"
check "the device works" fio_verify "$dev" 4k 1
sleep 1
check_asleep "a connected client" 30
must unmap_device "$dev"
stop_target
finish
