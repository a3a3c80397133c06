#!/bin/bash
# The target is killed with -9 under verified load on its kernel NBD device: the next run takes it over, no I/O fails.
# timeout: 900
# long: 6.12 6.1 newest
source "$VM_DIR/lib.sh"
source "$VM_DIR/nbd.sh"
need_nbd
setup_scratch 512
truncate -s 64M /scratch/disk.img
truncate -s 32M /scratch/small.img
start_call() { echo "{\"method\": \"nbd_start_disk\", \"params\": {\"bdev_name\": \"$1\"${2:+, $2}}}"; }

# survive TEXT MEMBERS: crashes under load, each followed by a start with the same configuration.
survive() {
  local text=$1 bad=0
  nbd_config "$(start_call File0 "$2")" >/run/nbd.json
  start_target /run/nbd.json -m 0x3
  check "$text: the disk is there" test -e /sys/block/nbd0/pid
  start_load /dev/nbd0 4k 16
  check "$text: I/O moves" load_moves
  for pause in 0 1; do
    kill_target
    sleep "$pause"
    start_target /run/nbd.json -m 0x3
    load_moves || bad=$((bad + 1))
  done
  check_eq "$text: twice killed and started, I/O goes on" "$bad" 0
  check "$text: no error reached fio, every block is right" stop_load
  check_eq "$text: the same device" "$(rpc nbd_get_disks | tr -d ' \n')" '[{"bdev_name":"File0","nbd_device":"/dev/nbd0"}]'
  check "$text: stop" stop_disk 0
  stop_target
}
survive "one socket" '"nbd_device": "/dev/nbd0", "connections": 1, "timeout_sec": 5'
survive "three sockets, device not named" '"connections": 3, "timeout_sec": 5'

say "mounted, and the bdev has grown meanwhile"
nbd_config >/run/bare.json
start_target /run/bare.json
must start_disk File0 4 '"dead_conn_timeout_sec": 600'
must mkfs.ext4 -q -F /dev/nbd4
must mkdir -p /mnt/n
must mount /dev/nbd4 /mnt/n
must cp -r "$REPO_DIR/nbd-poll/src" /mnt/n
must sync -f /mnt/n
must start_disk Mem0 5
kill_target
truncate -s 96M /scratch/disk.img
# Waits in the kernel.
dd if=/dev/nbd4 of=/run/back bs=1M skip=3 count=4 iflag=direct status=none & reader=$!
start_target /run/bare.json
refused "not for another bdev" "was bdev File0" nbd_start_disk '{"bdev_name": "Small0", "nbd_device": "/dev/nbd4"}'
check "for the same bdev" start_disk File0 4 '"dead_conn_timeout_sec": 600'
check "it has the new size" wait_for sh -c "[ \$(blockdev --getsize64 /dev/nbd4) = $((96 << 20)) ]"
rc=0
wait "$reader" || rc=$?
check_eq "the read that waited ends well" "$rc" 0
check "with the right data" cmp -i 0:$((3 << 20)) -n $((4 << 20)) /run/back /scratch/disk.img
check "the file system lives" bash -c "cp -r $REPO_DIR/nbd-poll/tests /mnt/n && sync -f /mnt/n && diff -r $REPO_DIR/nbd-poll/src /mnt/n/src"
check "a device whose bdev lost its contents is made anew while nobody uses it" start_disk Mem0 5
must mkfs.ext4 -q -F /dev/nbd5
must mkdir -p /mnt/m
must mount /dev/nbd5 /mnt/m

say "an orderly end while it is mounted"
stop_target
check "the device stays" test -e /sys/block/nbd4/pid
start_target /run/bare.json
check "and is taken over" start_disk File0 4
check "the file system lives" bash -c "echo yes >/mnt/n/it && sync -f /mnt/n"
check "unmount; fsck finds nothing" bash -c "umount /mnt/n && e2fsck -fn /dev/nbd4"
check "what would lose its contents was disconnected, mounted or not" bash -c "! dd if=/dev/nbd5 of=/dev/null bs=4k count=1 iflag=direct status=none"
umount /mnt/m 2>/dev/null
check "stop" stop_disk 4

say "a device by ioctl ends with the program"
must start_disk File0 6 '"control": "ioctl"'
kill_target
check "it is free" wait_for is_free 6
start_target /run/bare.json
check "and can be made again" start_disk File0 6
must stop_disk 6
stop_target
finish
