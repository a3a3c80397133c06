#!/bin/bash
# The kernel's client with one path, fio verify ten times; with SAFE_POLICY= (run.sh -o) it shows the fault of Linux 7's default.
# timeout: 900
# long: 6.12 newest newest/rxe,SERVER=target
# SERVER (run.sh -o): kernel (default), or target.
source "$VM_DIR/lib.sh"
SERVER=${SERVER:-kernel}
setup_net 1
if [[ $SERVER == kernel ]]; then
  setup_ram 1 64
  load_rnbd_server
  disk=/dev/ram0
else
  cat >/run/target.json <<'JSON'
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 131072, "block_size": 512}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_create_export", "params": {"device_path": "Malloc0", "bdev_name": "Malloc0"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "10.9.1.1"}}]}]}
JSON
  start_target /run/target.json
  disk=Malloc0
fi
load_rnbd_client
dev=$(map_device s1 "$(path_spec 1)" "$disk") || die "map $disk"
say "policy: $(cat /sys/class/rtrs-client/s1/mpath_policy)"
for round in $(seq 1 10); do
  check "round $round of 10" fio_verify "$dev" 4k 8
done
say "what the client said of failed requests: $(dmesg | grep -c 'RTRS failed to transfer IO') lines"
dmesg | grep 'RTRS failed to transfer IO' | head -n 3
must unmap_device "$dev"
[[ $SERVER == kernel ]] || stop_target
finish
