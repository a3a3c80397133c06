#!/bin/bash
# What the README shows: an unmodified kernel client maps a disk of rnbd-target, a file system and fio run on it.
# timeout: 280
# ci: 6.12/tap
# long: 6.12 6.1 6.1/soft,VM_MTU=1500 newest
source "$VM_DIR/lib.sh"
setup_net 1
# The shipped example as it is, listening on every address that has an RDMA device behind it.
say "rnbd-target -c configs/target.json"
start_target "$REPO_DIR/configs/target.json"
load_rnbd_client
say "echo 'sessname=demo path=ip:10.9.1.1 device_path=disk0' > $RNBD_CTL/map_device"
dev=$(map_device demo "$(path_spec 1)" disk0) || die "the kernel client could not map disk0"
lsblk -o NAME,SIZE,LOG-SEC,RO "$dev"
mkdir -p /mnt/demo
check "mkfs.ext4 and mount" bash -c "mkfs.ext4 -q -F $dev && mount $dev /mnt/demo"
check "copy the sources onto it" cp -r "$REPO_DIR/rtrs-poll" /mnt/demo/
check "unmount; fsck finds nothing" bash -c "umount /mnt/demo && e2fsck -fn $dev"
check "fio: 4k random reads and writes, every block verified (crc32c)" fio_verify "$dev" 4k 8
say "fio: 5 s of 4k random reads, queue depth 32"
fio --name=randread --filename="$dev" --rw=randread --bs=4k --iodepth=32 --direct=1 --ioengine=libaio --time_based \
  --runtime=5 --eta=always --eta-newline=1 --output="$OUT_DIR/fio.json" --output-format=json 2>&1 | tr '\r' '\n' || fail "fio"
python3 - "$OUT_DIR/fio.json" <<'PY'
import json, sys
text = open(sys.argv[1]).read()
r = json.loads(text[text.index("{"):])["jobs"][0]["read"]
p = r["clat_ns"]["percentile"]
print(f"\n  {'IOPS':>10} {'MiB/s':>8} {'mean us':>9} {'p50 us':>9} {'p99 us':>9} {'p99.9 us':>9}")
print(f"  {r['iops']:10.0f} {r['bw_bytes'] / 2**20:8.1f} {r['clat_ns']['mean'] / 1e3:9.0f}"
      + "".join(f" {p[k] / 1e3:9.0f}" for k in ("50.000000", "99.000000", "99.900000")))
print("  (an emulated CPU: the figures say nothing about real hardware)\n")
PY
say "what the target says"
rpc rnbd_get_sessions
must unmap_device "$dev"
stop_target
finish
