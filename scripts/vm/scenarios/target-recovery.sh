#!/bin/bash
# One path: server-side disconnect, and kill -9 with restart; the client comes back and every flushed write is there.
# timeout: 400
# long: 6.12 6.12/tap newest
source "$VM_DIR/lib.sh"
setup_net 1
setup_scratch 256
truncate -s 64M /scratch/disk.img
cat >/run/target.json <<'JSON'
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_uring_create", "params": {"name": "File0", "filename": "/scratch/disk.img", "block_size": 512}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_create_export", "params": {"device_path": "File0", "bdev_name": "File0"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "10.9.1.1"}}]}]}
JSON
start_target /run/target.json
load_rnbd_client
dev=$(map_device s1 "$(path_spec 1)" File0) || die "map"
dev_is() { [[ $(dev_state "$dev") == "$1" ]]; }

say "server-side disconnect"
check "rnbd_disconnect_session" rpc rnbd_disconnect_session '{"session": "s1"}'
check "the device closes" wait_for dev_is closed
check "the device comes back by itself" wait_for dev_is open
check "and works" fio_verify "$dev" 4k 2

# Writes numbered blocks one after another, each flushed before its number is reported.
cat >/run/writer.py <<'PY'
import mmap, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
buf = mmap.mmap(-1, 4096)
n = 0
try:
    while n < 12000:
        buf[:] = struct.pack("<Q", n) * 512
        os.pwrite(fd, buf, n * 4096)
        os.fdatasync(fd)
        n += 1
        print(n, flush=True)
except OSError as e:
    print("stopped:", e, file=sys.stderr)
PY
cat >/run/checker.py <<'PY'
import struct, sys
flushed = int(sys.argv[2])
with open(sys.argv[1], "rb") as f:
    for n in range(flushed):
        if f.read(4096) != struct.pack("<Q", n) * 512:
            sys.exit(f"block {n} of {flushed} flushed ones is wrong")
print(flushed, "flushed blocks are there")
PY
say "kill -9 under flushed writes"
python3 /run/writer.py "$dev" >/run/written 2>/run/writer.err &
writer=$!
sleep 8
kill_target
wait "$writer"
cat /run/writer.err
flushed=$(tail -n 1 /run/written)
check "some writes were flushed before the crash" test "${flushed:-0}" -gt 20
check "the file has all $flushed flushed blocks" python3 /run/checker.py /scratch/disk.img "$flushed"
start_target /run/target.json
check "the device comes back after the restart" wait_for dev_is open
echo 3 >/proc/sys/vm/drop_caches
check "the client reads all flushed blocks" python3 /run/checker.py "$dev" "$flushed"
check "and works" fio_verify "$dev" 4k 2
must unmap_device "$dev"
stop_target
finish
