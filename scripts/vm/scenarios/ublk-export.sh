#!/bin/bash
# ublk disks: file systems, verified I/O on one and two queues, discard, zeroes, flush, partitions, read-only.
# timeout: 1200
# long: 6.12 newest
source "$VM_DIR/lib.sh"
source "$VM_DIR/ublk.sh"
need_ublk
setup_scratch 1024
must cp -r "$REPO_DIR/ublk-poll" /run/copied
truncate -s 256M /scratch/disk.img
truncate -s 64M /scratch/ro.img
echo 'read-only contents' | dd of=/scratch/ro.img conv=notrunc status=none
start_ublk
must urpc bdev_uring_create '{"name": "File0", "filename": "/scratch/disk.img", "block_size": 512}' >/dev/null
must urpc bdev_uring_create '{"name": "Ro0", "filename": "/scratch/ro.img", "block_size": 512}' >/dev/null
must urpc bdev_malloc_create '{"name": "Mem0", "num_blocks": 32768, "block_size": 4096}' >/dev/null
refused "no disk without a target" ublk_create_target ublk_start_disk '{"bdev_name": "File0", "ublk_id": 1}'

# exercise TEXT: what every configuration of the target must do.
exercise() {
  local text=$1 dev=/dev/ublkb1
  check "$text: a disk of the file" start_disk File0 1 || return
  check_eq "$text: it has the size of the file" "$(blockdev --getsize64 $dev)" "$(stat -c %s /scratch/disk.img)"
  check "$text: mkfs.ext4 and mount" bash -c "mkfs.ext4 -q -F $dev && mkdir -p /mnt/u && mount $dev /mnt/u"
  check "$text: copy the sources, sync" bash -c "cp -r /run/copied /mnt/u/ && sync -f /mnt/u"
  check "$text: unmount; fsck finds nothing" bash -c "umount /mnt/u && e2fsck -fn $dev"
  check "$text: what was copied is there after all caches are gone" bash -c "echo 3 >/proc/sys/vm/drop_caches &&
    mount -o ro $dev /mnt/u && diff -r /run/copied /mnt/u/copied && umount /mnt/u"
  check "$text: fio 4k depth 32, every block verified" fio_verify $dev 4k
  check "$text: fio 512k depth 32, every block verified" fio_verify $dev 512k 32
  check "$text: fio with a flush after every 8 writes" env FIO_EXTRA=--fsync=8 bash -c "$(declare -f fio_verify); fio_verify $dev 4k 2 8 1"
  check "$text: stop" stop_disk 1
}

must urpc ublk_create_target '{"disable_user_copy": false}' >/dev/null
refused "one target only" "already" ublk_create_target '{}'
exercise "user copy"

say "two queues"
must start_disk Mem0 2 '"num_queues": 2, "queue_depth": 64'
check_eq "the kernel has two queues" "$(ls /sys/block/ublkb2/mq | wc -l)" 2
check_eq "they are on two reactors" "$(urpc ublk_get_disks '{"ublk_id": 2}' |
  python3 -c 'import json, sys; print(len(set(json.load(sys.stdin)[0]["reactors"])))')" 2
check "two queues: fio 4k depth 32, 4 jobs" fio_verify /dev/ublkb2 4k 8 32 4
check "two queues: fio 512k depth 32" fio_verify /dev/ublkb2 512k 16
# A ring keeps a worker thread once it had one (START_DEV, fallocate of the file): here none may have work.
worker_ticks() { cat "/proc/$UBLK_PID"/task/*/stat | awk '/iou-wrk/ {sum += $14 + $15} END {print sum + 0}'; }
start_load /dev/ublkb2 4k 32
check "I/O moves" wait_for load_moves
before=$(worker_ticks)
sleep 3
check_eq "no worker thread copies data" $(($(worker_ticks) - before)) 0
check "every block is right" stop_load
check_eq "blocks of 4096 bytes" "$(blockdev --getss /dev/ublkb2)" 4096
check "stop" stop_disk 2

say "what the kernel is told"
must start_disk File0 1
check_eq "volatile cache" "$(queue_attr 1 write_cache)" "write back"
check_eq "FUA" "$(queue_attr 1 fua)" 1
check_eq "largest request" "$(queue_attr 1 max_hw_sectors_kb)" 512
check "discards" test "$(queue_attr 1 discard_max_bytes)" -gt 0
check "zeroes" test "$(queue_attr 1 write_zeroes_max_bytes)" -gt 0
blocks() { stat -c %b /scratch/disk.img; }
all_zero() { cmp -n "$2" "$1" /dev/zero; }
must dd if=/dev/urandom of=/dev/ublkb1 bs=1M count=16 oflag=direct status=none
before=$(blocks)
check "blkdiscard" blkdiscard -o 0 -l 8M /dev/ublkb1
check "blkdiscard frees space of the file" test "$(blocks)" -le $((before - 8 * 2048 + 64))
check "blkdiscard -z" blkdiscard -z -o 8M -l 8M /dev/ublkb1
check "the range reads as zeroes" bash -c "$(declare -f all_zero); dd if=/dev/ublkb1 of=/run/part bs=1M skip=8 count=8 iflag=direct status=none &&
  all_zero /run/part $((8 << 20))"
check "buffered writes are on the file after fsync" bash -c 'dd if=/dev/urandom of=/run/rnd bs=1M count=2 status=none &&
  dd if=/run/rnd of=/dev/ublkb1 bs=1M conv=notrunc,fsync status=none && cmp -n $((2 << 20)) /run/rnd /scratch/disk.img'
check "odd sizes" bash -c 'dd if=/run/rnd of=/dev/ublkb1 bs=512 count=1023 seek=7 oflag=direct conv=notrunc status=none &&
  dd if=/dev/ublkb1 bs=512 count=1023 skip=7 iflag=direct status=none | cmp -n $((1023 * 512)) - /run/rnd'

say "buffered writes at a stop"
must dd if=/run/rnd of=/dev/ublkb1 bs=1M seek=64 conv=notrunc status=none
check "stop" stop_disk 1
check "they are on the file" cmp -n $((2 << 20)) -i 0:$((64 << 20)) /run/rnd /scratch/disk.img

say "a bdev that grows"
must start_disk File0 1
truncate -s 320M /scratch/disk.img
must urpc bdev_uring_rescan '{"name": "File0"}' >/dev/null
if grep -q 'driver with.*update_size' "$UBLK_LOG"; then
  check "the disk grows too" wait_for test "$(blockdev --getsize64 /dev/ublkb1)" = $((320 << 20))
else
  check "the log says that the disk cannot" wait_for grep -q 'ublkb1 keeps its size.*Linux 6.16' "$UBLK_LOG"
  must stop_disk 1
  must start_disk File0 1
  check_eq "a new start can" "$(blockdev --getsize64 /dev/ublkb1)" $((320 << 20))
fi
must stop_disk 1

say "a partition table"
must start_disk File0 1
must dd if=/dev/zero of=/dev/ublkb1 bs=4k count=1 oflag=direct conv=notrunc status=none
# One primary partition, type 83, from sector 2048 on, 65536 sectors: little-endian.
check "is written and read" bash -c 'printf "\0\0\0\0\x83\0\0\0\0\x08\0\0\0\0\x01\0" | dd of=/dev/ublkb1 bs=1 seek=446 conv=notrunc,fsync status=none &&
  printf "\x55\xaa" | dd of=/dev/ublkb1 bs=1 seek=510 conv=notrunc,fsync status=none && blockdev --rereadpt /dev/ublkb1'
check "its partition is there" wait_for test -b /dev/ublkb1p1
must stop_disk 1
must start_disk File0 1
check "and is found by a start" wait_for test -b /dev/ublkb1p1
check "a file system on it" bash -c "mkfs.ext4 -q -F /dev/ublkb1p1 && mount /dev/ublkb1p1 /mnt/u && cp -r $REPO_DIR/iobuf /mnt/u && umount /mnt/u && e2fsck -fn /dev/ublkb1p1"
must stop_disk 1

say "a mounted disk"
must start_disk File0 1
must wait_for test -b /dev/ublkb1p1
must mount /dev/ublkb1p1 /mnt/u
refused "is not stopped" "is mounted on /mnt/u" ublk_stop_disk '{"ublk_id": 1}'
check "and works on" bash -c 'echo x >/mnt/u/x && sync -f /mnt/u'
must umount /mnt/u
check "after that it stops" stop_disk 1

say "read-only"
must start_disk Ro0 3 '"read_only": true'
check_eq "the kernel knows" "$(blockdev --getro /dev/ublkb3)" 1
check_eq "it reads" "$(head -c 18 /dev/ublkb3)" "read-only contents"
check_fails "a write is refused" dd if=/dev/zero of=/dev/ublkb3 bs=4k count=1 oflag=direct status=none
check_fails "a discard is refused" blkdiscard /dev/ublkb3
check_eq "nothing has changed" "$(head -c 18 /scratch/ro.img)" "read-only contents"
must stop_disk 3

say "without user copy"
must urpc ublk_destroy_target >/dev/null
must urpc ublk_create_target '{"disable_user_copy": true}' >/dev/null
exercise "no user copy"
must urpc ublk_destroy_target >/dev/null
stop_ublk
check_fails "no error in the log" grep -E ' ERROR ' "$UBLK_LOG"
finish_ublk
