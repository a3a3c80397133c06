#!/bin/bash
# rnbd-initiator maps a disk of the kernel's server or of rnbd-target, as /dev/nbdN and /dev/ublkbN; everything is verified.
# timeout: 500
# ci: 6.12/rxe,REMOTE=kernel
# long: 6.12 6.12/soft 6.12/soft,REMOTE=kernel 6.12/rxe,REMOTE=kernel-static 6.1 newest newest/rxe,REMOTE=kernel
source "$VM_DIR/lib.sh"
setup_remote 1
initiator_config 1 >/run/initiator.json
start_initiator /run/initiator.json
check "the bdev is there" irpc bdev_get_bdevs '{"name": "Remote0", "timeout": 150000}'

if [[ $REMOTE == kernel* && $VM_NET == rxe ]]; then
  # It listens on all addresses, of which the kernel says "not available" to whoever asks for one of them.
  cat >/run/second.json <<JSON
{"subsystems": [{"subsystem": "rnbd", "config": [{"method": "rnbd_create_listener", "params": {"traddr": "$(remote_addr 1)"}}]}]}
JSON
  on_server "$BIN_DIR/rnbd-target -c /run/second.json -r /run/second.sock" >"$OUT_DIR/second.log" 2>&1 &&
    fail "a second server on the port"
  check "a second server on the port is told that another has it" grep -q 'another listener has this port' "$OUT_DIR/second.log"
fi

zeroes() { cmp -n "$2" "$1" /dev/zero; }
filled() { ! cmp -s -n "$2" "$1" /dev/zero; }
drop_caches() { echo 3 >/proc/sys/vm/drop_caches; }

use_disk() {
  local dev=$1
  check "fio randrw crc32c 4k QD32 x2 on $dev" fio_verify "$dev" 4k 4
  check "fio randrw crc32c 512k QD32 x2 on $dev" fio_verify "$dev" 512k 16
  must dd if=/dev/urandom of="$dev" bs=1M count=8 oflag=direct status=none
  if [[ $(cat "/sys/block/${dev##*/}/queue/discard_max_bytes") != 0 ]]; then
    check "blkdiscard of 4 MiB" blkdiscard -o 0 -l 4M "$dev"
    drop_caches
    check "discarded blocks read as zeroes" zeroes "$dev" 4194304
  else
    fail "$dev offers no discard"
  fi
  check "blkdiscard -z of 8 MiB" blkdiscard -z -o 0 -l 8M "$dev"
  drop_caches
  check "they read as zeroes" zeroes "$dev" 8388608
  check "write and fsync" dd if=/dev/urandom of="$dev" bs=1M count=4 conv=fsync status=none
  drop_caches
  check "what was written is there" filled "$dev" 4194304

  echo 'start=2048, size=65536, type=83' | sfdisk -q "$dev" || fail "sfdisk $dev"
  check "the partition is seen" wait_for test -b "${dev}p1"
  check "mkfs.ext4 ${dev}p1" mkfs.ext4 -q -F "${dev}p1"
  mkdir -p /mnt/disk
  must mount "${dev}p1" /mnt/disk
  check "copy a tree" cp -r "$VM_DIR/../../rtrs-proto/src" /mnt/disk/
  check "compare it" diff -r "$VM_DIR/../../rtrs-proto/src" /mnt/disk/src
  must umount /mnt/disk
  check "fsck -fn is clean" e2fsck -fn "${dev}p1"
  must wipefs -qa "$dev"
}

for export in nbd ublk; do
  need_export $export || { say "no $export in this kernel"; continue; }
  say "$export"
  if dev=$(start_export $export Remote0); then
    ok "$export export: $dev"
    check_eq "its size" "$(blockdev --getsize64 "$dev")" 134217728
    use_disk "$dev"
    check "stop $dev" stop_export $export "$dev"
  else
    fail "$export export"
  fi
done

say "read-only"
check "unmap" irpc bdev_rnbd_unmap '{"name": "Remote0"}'
check "map ro" irpc bdev_rnbd_map "{\"name\": \"Remote0\", \"sessname\": \"s1\", \"device_path\": \"$REMOTE_PATH\", \"access_mode\": \"ro\",
  \"paths\": [{\"src\": \"$(local_addr 1)\", \"dst\": \"$(remote_addr 1)\"}]}"
for export in nbd ublk; do
  need_export $export || continue
  dev=$(start_export $export Remote0) || { fail "$export export of a read-only disk"; continue; }
  check_eq "$dev is read-only" "$(blockdev --getro "$dev")" 1
  check "$dev reads" dd if="$dev" of=/dev/null bs=64k count=16 iflag=direct status=none
  check_fails "$dev refuses writes" dd if=/dev/zero of="$dev" bs=64k count=1 oflag=direct status=none
  check "stop $dev" stop_export $export "$dev"
done
check "unmap" irpc bdev_rnbd_unmap '{"name": "Remote0"}'
stop_initiator
[[ $REMOTE != target ]] || stop_target
finish
