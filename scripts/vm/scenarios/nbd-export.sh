#!/bin/bash
# Kernel NBD devices: file systems, verified I/O, discard, zeroes, flush, partitions, read-only, resize.
# timeout: 600
# long: 6.1 6.12 newest
source "$VM_DIR/lib.sh"
source "$VM_DIR/nbd.sh"
need_nbd
setup_scratch 1024
truncate -s 128M /scratch/disk.img
truncate -s 64M /scratch/small.img
nbd_config >/run/target.json
start_target /run/target.json -m "${NBD_CPUMASK:-0x3}"

# exercise TEXT BDEV [JSON_MEMBERS]: what every kind of disk must do.
exercise() {
  local text=$1
  check "$text: start" start_disk "$2" 1 "${3:-}" || return
  check "$text: mkfs.ext4 and mount" bash -c "mkfs.ext4 -q -F /dev/nbd1 && mkdir -p /mnt/n && mount /dev/nbd1 /mnt/n"
  check "$text: copy, sync" bash -c "cp -r $REPO_DIR/nbd-poll/src /mnt/n/ && sync -f /mnt/n"
  check "$text: unmount; fsck finds nothing" bash -c "umount /mnt/n && e2fsck -fn /dev/nbd1"
  check "$text: what was copied is there after all caches are gone" bash -c "echo 3 >/proc/sys/vm/drop_caches &&
    mount -o ro /dev/nbd1 /mnt/n && diff -r $REPO_DIR/nbd-poll/src /mnt/n/src && umount /mnt/n"
  check "$text: fio 4k depth 32, every block verified" fio_verify /dev/nbd1 4k 4
  check "$text: fio 512k depth 32, every block verified" fio_verify /dev/nbd1 512k 16
  check "$text: stop" stop_disk 1
}
exercise "file" File0
exercise "memory, 4 KiB blocks, 4 sockets" Mem0 '"connections": 4'
exercise "by ioctl" File0 '"control": "ioctl"'

say "what the kernel is told"
check_eq "the first free device is chosen" "$(rpc nbd_start_disk '{"bdev_name": "File0"}')" /dev/nbd0
check_eq "the size" "$(blockdev --getsize64 /dev/nbd0)" "$(stat -c %s /scratch/disk.img)"
check_eq "volatile cache" "$(cat /sys/block/nbd0/queue/write_cache)" "write back"
check_eq "FUA" "$(cat /sys/block/nbd0/queue/fua)" 1
check_eq "nbd_get_disks" "$(rpc nbd_get_disks | tr -d ' \n')" '[{"bdev_name":"File0","nbd_device":"/dev/nbd0"}]'
refused "an unknown one" "no disk" nbd_get_disks '{"nbd_device": "/dev/nbd9"}'
check_eq "it was made by the target" "$(cat /sys/block/nbd0/pid)" "$TARGET_PID"
blocks() { stat -c %b /scratch/disk.img; }
must dd if=/dev/urandom of=/dev/nbd0 bs=1M count=16 oflag=direct status=none
before=$(blocks)
check "blkdiscard" blkdiscard -o 0 -l 8M /dev/nbd0
check "blkdiscard frees space of the file" test "$(blocks)" -le $((before - 8 * 2048 + 64))
check "blkdiscard -z" blkdiscard -z -o 8M -l 8M /dev/nbd0
check "the range reads as zeroes" bash -c 'dd if=/dev/nbd0 bs=1M skip=8 count=8 iflag=direct status=none | cmp -n $((8 << 20)) - /dev/zero'
check "buffered writes are on the file after fsync" bash -c 'dd if=/dev/urandom of=/run/rnd bs=1M count=2 status=none &&
  dd if=/run/rnd of=/dev/nbd0 bs=1M conv=notrunc,fsync status=none && cmp -n $((2 << 20)) /run/rnd /scratch/disk.img'
check "odd sizes" bash -c 'dd if=/run/rnd of=/dev/nbd0 bs=512 count=1023 seek=7 oflag=direct conv=notrunc status=none &&
  dd if=/dev/nbd0 bs=512 count=1023 skip=7 iflag=direct status=none | cmp -n $((1023 * 512)) - /run/rnd'
echo 4096 >/sys/block/nbd0/queue/max_sectors_kb
check "requests of 4 MiB" bash -c 'dd if=/dev/urandom of=/run/big bs=4M count=2 status=none &&
  dd if=/run/big of=/dev/nbd0 bs=4M oflag=direct conv=notrunc status=none &&
  dd if=/dev/nbd0 bs=4M count=2 iflag=direct status=none | cmp - /run/big'
must dd if=/run/rnd of=/dev/nbd0 bs=1M seek=64 conv=notrunc status=none
check "stop" stop_disk 0
check "buffered writes before the stop are on the file" cmp -n $((2 << 20)) -i 0:$((64 << 20)) /run/rnd /scratch/disk.img
refused "it is stopped once" "no disk" nbd_stop_disk '{"nbd_device": "/dev/nbd0"}'

say "a bdev that grows"
for control in netlink ioctl; do
  must start_disk File0 1 "\"control\": \"$control\""
  truncate -s +32M /scratch/disk.img
  must rpc bdev_uring_rescan '{"name": "File0"}' >/dev/null
  grown() { [[ $(blockdev --getsize64 /dev/nbd1) == $(stat -c %s /scratch/disk.img) ]]; }
  check "$control: the device grows too" wait_for grown
  check "$control: its end is read" dd if=/dev/nbd1 of=/dev/null bs=1M skip=$(($(stat -c %s /scratch/disk.img) / 1048576 - 1)) count=1 iflag=direct status=none
  must stop_disk 1
done

say "a partition table"
must start_disk File0 1
must dd if=/dev/zero of=/dev/nbd1 bs=4k count=1 oflag=direct conv=notrunc status=none
# One primary partition, type 83, from sector 2048 on, 65536 sectors: little-endian.
must bash -c 'printf "\0\0\0\0\x83\0\0\0\0\x08\0\0\0\0\x01\0" | dd of=/dev/nbd1 bs=1 seek=446 conv=notrunc,fsync status=none &&
  printf "\x55\xaa" | dd of=/dev/nbd1 bs=1 seek=510 conv=notrunc,fsync status=none'
must stop_disk 1
must start_disk File0 1
check "is found by a start" test -b /dev/nbd1p1
check "a file system on it" bash -c "mkfs.ext4 -q -F /dev/nbd1p1 && mount /dev/nbd1p1 /mnt/n"
refused "a stop while it is mounted" "/dev/nbd1p1 is mounted on /mnt/n" nbd_stop_disk '{"nbd_device": "/dev/nbd1"}'
check "it goes on" bash -c "echo yes >/mnt/n/it && sync -f /mnt/n"
must umount /mnt/n
check "a stop afterwards" stop_disk 1

say "read-only"
must dd if=/run/rnd of=/scratch/small.img bs=1M conv=notrunc status=none
must start_disk Small0 2 '"readonly": true'
check_eq "the kernel knows" "$(blockdev --getro /dev/nbd2)" 1
check "it reads" cmp -n $((1 << 20)) /dev/nbd2 /run/rnd
check_fails "a write is refused" dd if=/dev/zero of=/dev/nbd2 bs=4k count=1 oflag=direct status=none
check_fails "a discard is refused" blkdiscard /dev/nbd2
must stop_disk 2
must cmp -n $((1 << 20)) /scratch/small.img /run/rnd

stop_target
check_fails "no error in the log" grep -E ' ERROR ' "$TARGET_LOG"
finish
