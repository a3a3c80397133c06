#!/bin/bash
# Rotating keys (rotate_rkeys): the kernel client gets a new key with every answer, and fio verifies.
# timeout: 200
# long: 6.12 6.12/tap 6.12/soft,VM_MTU=1500
source "$VM_DIR/lib.sh"
setup_net 1
cat >/run/target.json <<'JSON'
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 131072, "block_size": 512}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_set_options", "params": {"rotate_rkeys": true, "queue_depth": 128}},
    {"method": "rnbd_create_export", "params": {"device_path": "Malloc0", "bdev_name": "Malloc0"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "10.9.1.1"}}]}]}
JSON
start_target /run/target.json -m '[0-1]'
load_rnbd_client
for n in 1 2; do
  dev=$(map_device rot "$(path_spec 1)" Malloc0) || die "map"
  check "fio randrw crc32c 4k QD32 x2" fio_verify "$dev" 4k 4
  check "fio randrw crc32c 512k QD32 x2" fio_verify "$dev" 512k 8
  check "discard and flush" bash -c "blkdiscard -o 0 -l 1M $dev && dd if=/dev/zero of=$dev bs=64k count=16 conv=fsync status=none"
  must unmap_device "$dev"
done
if [[ $VM_NET != rxe ]]; then
  say "statistics"
  check_eq "the listener's provider" "$(provider_of 1)" soft-roce
  # Two runs of 2 x (4 + 8) MiB, about half of it written, all of that read back.
  received=$(counter rx_bytes) sent=$(counter tx_bytes)
  say "$(counter rx_packets) packets, $received bytes received; $(counter tx_packets) packets, $sent bytes sent"
  check "what was written was counted" test "$received" -gt $((16 << 20))
  check "what was read was counted" test "$sent" -gt $((16 << 20))
  check_eq "no packet was malformed" "$(($(counter rx_drop_short) + $(counter rx_drop_icrc) + $(counter rx_drop_opcode)))" 0
fi
check_eq "no memory region was left pinned" "$(grep -c 'not deregistered' "$TARGET_LOG")" 0
stop_target
finish
