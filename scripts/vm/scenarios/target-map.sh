#!/bin/bash
# The kernel client maps malloc, file and null bdevs of rnbd-target in every access mode; fio verifies them.
# timeout: 400
# A link that loses and reorders (VM_LOSSY) makes it slower by what the retransmission timers wait, 0.3 s each for rxe.
# ci: 6.12
# long: 6.1 6.12/soft,VM_MTU=1500 6.12/tap 6.12/soft,VM_MTU=1500,VM_LOSSY=yes newest
source "$VM_DIR/lib.sh"
# shellcheck disable=SC2034 # for net.sh
VM_SPARE_REQUESTS=yes
setup_net 1
setup_scratch 512
truncate -s 128M /scratch/disk.img
cat >/run/target.json <<'JSON'
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 262144, "block_size": 512}},
    {"method": "bdev_malloc_create", "params": {"name": "Malloc4k", "num_blocks": 16384, "block_size": 4096}},
    {"method": "bdev_null_create", "params": {"name": "Null0", "num_blocks": 262144, "block_size": 512}},
    {"method": "bdev_uring_create", "params": {"name": "File0", "filename": "/scratch/disk.img", "block_size": 512}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_create_export", "params": {"device_path": "disk0", "bdev_name": "Malloc0"}},
    {"method": "rnbd_create_export", "params": {"device_path": "file0", "bdev_name": "File0"}},
    {"method": "rnbd_create_export", "params": {"device_path": "mine", "bdev_name": "Malloc4k", "allow": [{"session": "somebody-else"}]}},
    {"method": "rnbd_create_export", "params": {"device_path": "Null0", "bdev_name": "Null0"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "10.9.1.1"}}]}]}
JSON
start_target /run/target.json
load_rnbd_client
paths=$(path_spec 1)

say "access modes, two sessions, each with its own rules"
for bdev in disk0 file0 Null0; do
  ro=$(map_device modes "$paths" "$bdev" ro) || die "map $bdev ro"
  check_eq "$bdev is read-only at the client" "$(blockdev --getro "$ro")" 1
  check "$bdev ro reads" dd if="$ro" of=/dev/null bs=64k count=16 iflag=direct status=none
  must unmap_device "$ro"
  mig=$(map_device modes "$paths" "$bdev" migration) || die "map $bdev migration"
  check "$bdev migration writes" dd if=/dev/zero of="$mig" bs=64k count=16 oflag=direct status=none
  check_fails "$bdev rw is refused beside a writer" map_device modes2 "$paths" "$bdev" rw
  must unmap_device "$mig"
done
check_fails "an export for another session is refused" map_device modes "$paths" mine rw
check_fails "and so is the bdev behind it" map_device modes "$paths" Malloc4k rw
check_fails "no such device" map_device modes "$paths" nothing rw
check_fails ".. is refused" map_device modes "$paths" a/../disk0 rw

say "verified load"
disk=$(map_device s1 "$paths" disk0) || die "map disk0"
file=$(map_device s1 "" file0) || die "map file0"
null=$(map_device s1 "" Null0) || die "map Null0"
for dev in "$disk" "$file"; do
  check "fio randrw crc32c 4k QD32 x2 on $dev" fio_verify "$dev" 4k 4
  check "fio randrw crc32c 512k QD32 x2 on $dev" fio_verify "$dev" 512k 16
done
check "fio 4k randread on the null bdev" fio --name=null --filename="$null" --rw=randread --bs=4k --iodepth=32 --direct=1 \
  --ioengine=libaio --time_based --runtime=3 --eta=never
must unmap_device "$null"

if [[ -n ${VM_NETEM:-} ]]; then
  say "the client's requests are lost, too, one at a time"
  disturb_requests 1
  for bs in 4k 64k; do
    check "fio randrw crc32c $bs, a second after each" fio --name=single --eta=never --filename="$disk" --direct=1 --ioengine=libaio \
      --rw=randrw --bs="$bs" --io_size="$((8 * ${bs%k}))k" --size="$((8 * ${bs%k}))k" --thinktime=1s --verify=crc32c --verify_fatal=1 --do_verify=1
  done
  spare_requests 1
fi

zeroes() { cmp -n "$2" "$1" /dev/zero; }
filled() { ! cmp -s -n "$2" "$1" /dev/zero; }
for dev in "$disk" "$file"; do
  say "discard, zeroes, flush on $dev"
  must dd if=/dev/urandom of="$dev" bs=1M count=8 oflag=direct status=none
  check "blkdiscard of 4 MiB on $dev" blkdiscard -o 0 -l 4M "$dev"
  echo 3 >/proc/sys/vm/drop_caches
  check "discarded blocks of $dev read as zeroes" zeroes "$dev" 4194304
  check "blkdiscard -z of the rest on $dev" blkdiscard -z -o 4M -l 4M "$dev"
  echo 3 >/proc/sys/vm/drop_caches
  check "$dev reads as zeroes" zeroes "$dev" 8388608
  check "write and fsync on $dev" dd if=/dev/urandom of="$dev" bs=1M count=4 conv=fsync status=none
  check "what was written is there" filled "$dev" 4194304
done

say "a file system on each"
mkdir -p /mnt/rnbd
for dev in "$disk" "$file"; do
  check "mkfs.ext4 $dev" mkfs.ext4 -q -F "$dev"
  must mount "$dev" /mnt/rnbd
  check "copy a tree" cp -r "$VM_DIR/../../rtrs-proto/src" /mnt/rnbd/
  check "compare it" diff -r "$VM_DIR/../../rtrs-proto/src" /mnt/rnbd/src
  must umount /mnt/rnbd
  check "fsck -fn is clean" e2fsck -fn "$dev"
done
check "unmap" unmap_device "$disk"
check "unmap" unmap_device "$file"
no_session() { [[ $(rpc rnbd_get_sessions | tr -d ' \n') == "[]" ]]; }
check "no session is left" wait_for no_session
stop_target
finish
