#!/bin/bash
# A guest's vhost-user-blk disks: file system, verified load, discard, zeroes, resize, crash of the target under load.
# timeout: 1500
# qemu: vhost
# ci: 6.12/tap
# long: 6.1/tap newest/tap
source "$VM_DIR/lib.sh"
source "$VM_DIR/vhost.sh"
setup_scratch
truncate -s 256M /scratch/disk.img
truncate -s 256M /scratch/disk2.img
cat >/run/target.json <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 131072, "block_size": 512}},
    {"method": "bdev_malloc_create", "params": {"name": "Malloc4k", "num_blocks": 16384, "block_size": 4096}},
    {"method": "bdev_null_create", "params": {"name": "Null0", "num_blocks": 262144, "block_size": 512}},
    {"method": "bdev_uring_create", "params": {"name": "File0", "filename": "/scratch/disk.img", "block_size": 512}},
    {"method": "bdev_uring_create", "params": {"name": "File1", "filename": "/scratch/disk2.img", "block_size": 512}}]},
  {"subsystem": "vhost_blk", "config": [
    {"method": "vhost_create_blk_controller", "params": {"ctrlr": "$HOST_JOB_DIR/file0", "dev_name": "File0"}},
    {"method": "vhost_create_blk_controller", "params": {"ctrlr": "$HOST_JOB_DIR/file1", "dev_name": "File1", "packed_ring": true}}]}]}
JSON
start_target /run/target.json

# tell FILE: its only line.
tell() { cat "/sys/block/${1#/dev/}/$2"; }
# all_bytes DEVICE OFFSET LENGTH BYTE(octal): every byte of the range is that.
all_bytes() {
  local odd
  odd=$(dd if="$1" iflag=direct,skip_bytes,count_bytes skip="$2" count="$3" bs=64k status=none | tr -d "\\$4" | wc -c)
  [[ $odd == 0 ]]
}
fill() { tr '\0' "\\$4" </dev/zero | dd of="$1" oflag=direct,seek_bytes seek="$2" count="$(($3 / 4096))" bs=4096 iflag=fullblock status=none; }
sessions() { rpc vhost_get_controllers | python3 -c 'import json,sys; print(sum(len(c["sessions"]) for c in json.load(sys.stdin)))'; }

say "every kind of ring"
for ring in split packed; do
  on=off
  [[ $ring == split ]] || on=on
  must create_controller "m-$ring" Malloc0 '"packed_ring":true'
  disk=$(plug "m-$ring" "\"packed\":\"$on\",\"num-queues\":2") || die "plug $ring"
  check_eq "$ring: size" "$(blockdev --getsize64 "$disk")" $((64 << 20))
  check_eq "$ring: two queues" "$(find "/sys/block/${disk#/dev/}/mq" -mindepth 1 -maxdepth 1 -type d | wc -l)" 2
  check "$ring: fio verify 4k" fio_verify "$disk" 4k 4
  check "$ring: fio verify 512k" fio_verify "$disk" 512k 16
  say "$ring: file system"
  must mkfs.ext4 -q -F "$disk"
  mkdir -p /mnt/v
  must mount -o discard "$disk" /mnt/v
  check "$ring: copy" cp -r /usr/share/doc/bash /mnt/v/
  check "$ring: sync" sync -f /mnt/v
  must umount /mnt/v
  check "$ring: fsck" fsck.ext4 -f -n "$disk"
  must mount "$disk" /mnt/v
  check "$ring: the files are the same" diff -r /usr/share/doc/bash /mnt/v/bash
  check "$ring: fstrim" fstrim /mnt/v
  must umount /mnt/v
  check "$ring: fsck after trim" fsck.ext4 -f -n "$disk"
  must unplug "m-$ring" "$disk"
  check "$ring: delete the controller" rpc vhost_delete_controller "{\"ctrlr\":\"$HOST_JOB_DIR/m-$ring\"}"
done

say "operations"
disk=$(plug file0 '"num-queues":2') || die "plug file0"
check_fails "a controller in use is not deleted" rpc vhost_delete_controller "{\"ctrlr\":\"$HOST_JOB_DIR/file0\"}"
must fill "$disk" 0 $((8 << 20)) 245
check "write zeroes" blkdiscard --zeroout --offset 4096 --length $((1 << 20)) "$disk"
check "are zeroes" all_bytes "$disk" 4096 $((1 << 20)) 000
check "the block before is as it was" all_bytes "$disk" 0 4096 245
check "the block behind is as it was" all_bytes "$disk" $(((1 << 20) + 4096)) 65536 245
check "discard" blkdiscard --offset $((4 << 20)) --length $((2 << 20)) "$disk"
check "discarded blocks of a file read as zeroes" all_bytes "$disk" $((4 << 20)) $((2 << 20)) 000
check "flush" blockdev --flushbufs "$disk"
check "fsync of every write" fio --name=sync --filename="$disk" --rw=randwrite --bs=4k --size=1m --fsync=1 --direct=1
say "partition table"
# A DOS label with one partition of 64 MiB at 1 MiB, and nothing in the other entries.
must dd if=/dev/zero of="$disk" bs=4096 count=1 oflag=direct status=none
printf '\0\0\0\0\x83\0\0\0\0\x08\0\0\0\0\x02\0' | dd of="$disk" bs=1 seek=446 conv=notrunc status=none
printf '\x55\xaa' | dd of="$disk" bs=1 seek=510 conv=notrunc status=none
sync
must blockdev --rereadpt "$disk"
check "the partition is there" wait_for test -b "${disk}1"
check_eq "its size" "$(blockdev --getsize64 "${disk}1")" $((64 << 20))
check "it takes a file system" mkfs.ext4 -q -F "${disk}1"

say "write cache"
check_eq "write back at first" "$(tell "$disk" cache_type)" "write back"
check "write through" sh -c "echo 'write through' >/sys/block/${disk#/dev/}/cache_type"
check "verified load in write through" fio_verify "$disk" 4k 4
check "write back" sh -c "echo 'write back' >/sys/block/${disk#/dev/}/cache_type"

say "read-only, large blocks, resize"
must create_controller ro Malloc0 '"readonly":true'
ro=$(plug ro) || die "plug ro"
check_eq "read-only" "$(blockdev --getro "$ro")" 1
check "it reads" dd if="$ro" of=/dev/null bs=64k count=16 iflag=direct status=none
check_fails "it does not write" dd if=/dev/zero of="$ro" bs=4k count=1 oflag=direct status=none
must unplug ro "$ro"
must create_controller big Malloc4k
big=$(plug big) || die "plug big"
check_eq "blocks of 4096 bytes" "$(blockdev --getss "$big")" 4096
check "fio verify 4k" fio_verify "$big" 4k 4
must unplug big "$big"
must create_controller null Null0
null=$(plug null) || die "plug null"
check_eq "size" "$(blockdev --getsize64 "$null")" $((128 << 20))
must rpc bdev_null_resize '{"name":"Null0","new_size":192}' >/dev/null
check "the guest sees the new size" wait_for sh -c "[ \$(blockdev --getsize64 $null) = $((192 << 20)) ]"
must unplug null "$null"

sleep 2
check_asleep "an idle disk"

say "a crash of the target under verified load"
packed=$(plug file1 '"packed":"on","num-queues":2') || die "plug file1"
for round in 1 2 3; do
  for dev in "$disk" "$packed"; do
    fio --name=crash --filename="$dev" --rw=randwrite --bs=4k --iodepth=32 --ioengine=libaio --direct=1 --size=32m \
      --verify=crc32c --verify_fatal=1 --do_verify=1 --eta=never >"$OUT_DIR/fio-${dev#/dev/}-$round.log" 2>&1 &
    eval "fio_${dev#/dev/}=\$!"
  done
  sleep $((2 + round))
  kill_target
  sleep 1
  start_target /run/target.json
  for dev in "$disk" "$packed"; do
    pid=fio_${dev#/dev/}
    if wait "${!pid}"; then
      ok "round $round: $dev: all blocks are right"
    else
      fail "round $round: $dev: fio"
      tail -n 20 "$OUT_DIR/fio-${dev#/dev/}-$round.log"
    fi
  done
done
check_eq "two virtual disks are connected" "$(sessions)" 2
check "no I/O error in the guest" sh -c '! dmesg | grep -E "I/O error|blk_update_request"'

say "the bdev goes away"
must rpc bdev_uring_delete '{"name":"File0"}' >/dev/null
check_fails "reads fail" dd if="$disk" of=/dev/null bs=4k count=1 iflag=direct status=none
must unplug file0 "$disk"
must unplug file1 "$packed"
check "delete the controller of the removed bdev" rpc vhost_delete_controller "{\"ctrlr\":\"$HOST_JOB_DIR/file0\"}"
check "the target ends in order" stop_target
finish
