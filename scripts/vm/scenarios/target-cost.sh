#!/bin/bash
# Where a request's time goes: the reactor's busy time per I/O beside the client's latency, for a RAM disk, malloc and null.
# timeout: 240
# by hand: it measures
source "$VM_DIR/lib.sh"
setup_rxe 1
setup_ram 1 64
must dd if=/dev/zero of=/dev/ram0 bs=1M count=64 oflag=direct status=none
cat >/run/target.json <<'JSON'
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 131072, "block_size": 512}},
    {"method": "bdev_null_create", "params": {"name": "Null0", "num_blocks": 131072, "block_size": 512}},
    {"method": "bdev_uring_create", "params": {"name": "Ram0", "filename": "/dev/ram0"}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_set_options", "params": {"one_message_reads": true}},
    {"method": "rnbd_create_export", "params": {"device_path": "Malloc0", "bdev_name": "Malloc0"}},
    {"method": "rnbd_create_export", "params": {"device_path": "Null0", "bdev_name": "Null0"}},
    {"method": "rnbd_create_export", "params": {"device_path": "Ram0", "bdev_name": "Ram0"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "10.9.1.1"}}]}]}
JSON
start_target /run/target.json -m 0x2
load_rnbd_client
busy() { rpc framework_get_reactors | python3 -c 'import json,sys; print(sum(r["busy"] for r in json.load(sys.stdin)["reactors"]))'; }
cost() { # NAME DEV RW BS DEPTH
  local b0 b1
  b0=$(busy)
  fio --name=c --filename="$2" --direct=1 --ioengine=libaio --rw="$3" --bs="$4" --iodepth="$5" --thread --time_based --runtime=4 \
    --randrepeat=1 --norandommap --eta=never --output-format=json --output="$OUT_DIR/fio.json"
  b1=$(busy)
  python3 - "$OUT_DIR/fio.json" "$1 $3 $4 QD$5" $((b1 - b0)) <<'PY'
import json, sys
r = json.load(open(sys.argv[1]))["jobs"][0]["read"]
print(f"{sys.argv[2]:30} {r['iops']:8.0f} IOPS  {r['clat_ns']['mean'] / 1e3:8.0f} us latency  "
      f"{int(sys.argv[3]) / r['total_ios'] / 1e3:7.1f} us of the reactor per I/O")
PY
}
for name in Ram0 Malloc0 Null0; do
  dev=$(map_device cost "$(path_spec 1)" "$name" ro) || die "map $name"
  cost "$name" "$dev" randread 4k 1
  cost "$name" "$dev" randread 4k 32
  cost "$name" "$dev" read 128k 8
  must unmap_device "$dev"
done
ok "measured"
stop_target
finish
