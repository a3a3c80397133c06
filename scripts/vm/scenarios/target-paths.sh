#!/bin/bash
# Two paths to rnbd-target, reads in one message: one path is cut under verified load, and the server disconnects; no error reaches fio.
# timeout: 400
# long: 6.12 6.12/soft,VM_MTU=1500
source "$VM_DIR/lib.sh"
setup_net 2
cat >/run/target.json <<'JSON'
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 131072, "block_size": 512}},
    {"method": "bdev_delay_create", "params": {"name": "Slow0", "base_bdev_name": "Malloc0", "avg_read_latency": 2000,
      "p99_read_latency": 5000, "avg_write_latency": 2000, "p99_write_latency": 5000}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_set_options", "params": {"one_message_reads": true}},
    {"method": "rnbd_create_export", "params": {"device_path": "Slow0", "bdev_name": "Slow0"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "10.9.1.1"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "10.9.2.1"}}]}]}
JSON
start_target /run/target.json -m '[0-1]'
load_rnbd_client
dev=$(map_device mp "$(path_spec 1 2)" Slow0) || die "map"
check "both paths are connected" path_is mp 1 connected
check "both paths are connected" path_is mp 2 connected

start_load "$dev" 4k 16
check "I/O moves" load_moves
say "cutting path 1"
cut_path 1
check "the client notices" wait_for path_is mp 1 disconnected
check "I/O moves on path 2" load_moves
heal_path 1
check "path 1 comes back" wait_for path_is mp 1 connected
check "I/O moves" load_moves

say "the server disconnects path 2"
check "rnbd_disconnect_path" rpc rnbd_disconnect_path '{"session": "mp", "path": "ip:10.9.2.2@ip:10.9.2.1"}'
check "the client notices" wait_for path_is mp 2 disconnected
check "I/O moves on path 1" load_moves
check "path 2 comes back by itself" wait_for path_is mp 2 connected
check "I/O moves" load_moves
check "no error and no wrong block reached fio" stop_load
must unmap_device "$dev"
stop_target
finish
