#!/bin/bash
# With a connected, idle client the adaptive policy uses under 1 % of a core.
# timeout: 200
# ci: 6.12 6.12/soft
source "$VM_DIR/lib.sh"
setup_net 1
cat >/run/target.json <<'JSON'
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 131072, "block_size": 512}}]},
  {"subsystem": "rnbd", "config": [{"method": "rnbd_create_listener", "params": {"traddr": "10.9.1.1"}}]}]}
JSON
start_target /run/target.json -m '[0-1]'
load_rnbd_client
ticks() { target_proc stat | awk '{print $14 + $15}'; }
idle() {
  local before after
  before=$(ticks)
  sleep 30
  after=$(ticks)
  say "$1: $((after - before)) ticks of 10 ms in 30 s"
  check "$1: under 1 % of a core" test $((after - before)) -lt 30
}
idle "no client"
dev=$(map_device s1 "$(path_spec 1)" Malloc0) || die "map"
check "the device works" fio_verify "$dev" 4k 1
sleep 1
idle "a connected client"
must unmap_device "$dev"
stop_target
finish
