#!/bin/bash
# The kernel's NBD client (nbd-client) on rnbd-target's NBD server, by TCP and unix socket: file system, verified load, ro.
# timeout: 300
# ci: 6.12
# long: 6.1 newest
source "$VM_DIR/lib.sh"
command -v nbd-client >/dev/null || die "nbd-client is missing: scripts/vm/build.sh installs it"
must modprobe nbd nbds_max=4
ip link set lo up
setup_scratch 512
truncate -s 128M /scratch/disk.img
cat >/run/target.json <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_uring_create", "params": {"name": "File0", "filename": "/scratch/disk.img", "block_size": 512}}]},
  {"subsystem": "nbd_server", "config": [
    {"method": "nbd_server_create_export", "params": {"name": "disk", "bdev_name": "File0"}},
    {"method": "nbd_server_create_export", "params": {"name": "ro", "bdev_name": "File0", "read_only": true}},
    {"method": "nbd_server_add_listener", "params": {"traddr": "127.0.0.1", "trsvcid": "10809"}},
    {"method": "nbd_server_add_listener", "params": {"path": "/run/nbd.sock"}}]}]}
JSON
start_target /run/target.json -m 0x3

use() { # TEXT NBD_CLIENT_ARGUMENT...
  local text=$1
  shift
  check "$text: nbd-client" nbd-client "$@" /dev/nbd0 || return
  check_eq "$text: size" "$(blockdev --getsize64 /dev/nbd0)" $((128 << 20))
  check "$text: fio verify 4k" fio_verify /dev/nbd0 4k 4
  check "$text: fio verify 512k" fio_verify /dev/nbd0 512k 16
  check "$text: mkfs.ext4" mkfs.ext4 -q -F /dev/nbd0
  mkdir -p /mnt/n
  must mount -o discard /dev/nbd0 /mnt/n
  check "$text: copy a tree, flush it" bash -c "cp -r '$REPO_DIR/nbd-proto/src' /mnt/n && sync -f /mnt/n"
  check "$text: fstrim" fstrim /mnt/n
  must umount /mnt/n
  check "$text: fsck" e2fsck -fn /dev/nbd0
  echo 3 >/proc/sys/vm/drop_caches
  must mount -o ro /dev/nbd0 /mnt/n
  check "$text: the files are the same" diff -r "$REPO_DIR/nbd-proto/src" /mnt/n/src
  must umount /mnt/n
  check "$text: disconnect" nbd-client -d /dev/nbd0
  check "$text: the device is free" wait_for bash -c '! nbd-client -c /dev/nbd0'
}
use "TCP, 2 connections" 127.0.0.1 10809 -N disk -C 2 -b 512
use "unix socket" -unix /run/nbd.sock -N disk -b 4096

check "read-only export" nbd-client -unix /run/nbd.sock -N ro /dev/nbd1
check_eq "the kernel knows" "$(blockdev --getro /dev/nbd1)" 1
check "it reads" dd if=/dev/nbd1 of=/dev/null bs=64k count=16 iflag=direct status=none
check_fails "it refuses writes" dd if=/dev/zero of=/dev/nbd1 bs=4k count=1 oflag=direct status=none
must nbd-client -d /dev/nbd1
check_fails "no export of that name" nbd-client 127.0.0.1 10809 -N nothing /dev/nbd2
stop_target
finish
