#!/bin/bash
# The kernel client on SPDK's malloc bdevs, a volume and an aio bdev of rnbd-target, with hugepages; fio verifies them.
# timeout: 600
# by hand: it needs an installed SPDK
source "$VM_DIR/lib.sh"
source "$VM_DIR/spdk.sh"
need_spdk
setup_net 1
setup_hugepages 700
setup_scratch 256
truncate -s 64M /scratch/disk.img
# The bdev section of an spdk_tgt, with a section of a subsystem that is not linked.
cat >/run/spdk_tgt.json <<'JSON'
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 131072, "block_size": 512}},
    {"method": "bdev_malloc_create", "params": {"name": "Malloc4k", "num_blocks": 16384, "block_size": 4096}},
    {"method": "bdev_malloc_create", "params": {"name": "Base", "num_blocks": 262144, "block_size": 512}},
    {"method": "bdev_aio_create", "params": {"name": "Aio0", "filename": "/scratch/disk.img", "block_size": 512}},
    {"method": "bdev_wait_for_examine"}]},
  {"subsystem": "nvmf", "config": [{"method": "nvmf_set_max_subsystems", "params": {"max_subsystems": 1024}}]}]}
JSON
cat >/run/target.json <<'JSON'
{"subsystems": [
  {"subsystem": "spdk", "config": [
    {"method": "spdk_set_options", "params": {"no_pci": true, "config_file": "/run/spdk_tgt.json"}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_set_options", "params": {"offer_bdevs": true}},
    {"method": "rnbd_create_export", "params": {"device_path": "disk0", "bdev_name": "Malloc0"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "10.9.1.1"}}]}]}
JSON
start_target /run/target.json
load_rnbd_client
paths=$(path_spec 1)

say "SPDK's methods through our socket"
check "a store" rpc bdev_lvol_create_lvstore '{"bdev_name": "Base", "lvs_name": "store"}'
check "a thin volume" rpc bdev_lvol_create '{"lvs_name": "store", "lvol_name": "v", "size_in_mib": 64, "thin_provision": true}'
check_fails "a name of SPDK's is taken" rpc bdev_malloc_create '{"name": "Malloc0", "num_blocks": 100, "block_size": 512}'
check_fails "what a store has claimed is not written" map_device s1 "$paths" Base rw
check_fails "nor read" map_device s1 "$paths" Base ro

say "verified load"
disk=$(map_device s2 "$paths" disk0) || die "map disk0"
disk4k=$(map_device s2 "" Malloc4k) || die "map Malloc4k"
volume=$(map_device s2 "" store/v) || die "map the volume"
aio=$(map_device s2 "" Aio0) || die "map Aio0"
check_eq "blocks of 4096" "$(blockdev --getss "$disk4k")" 4096
for dev in "$disk" "$disk4k" "$volume" "$aio"; do
  check "fio randrw crc32c 4k QD32 x2 on $dev" fio_verify "$dev" 4k 4
  check "fio randrw crc32c 512k QD32 x2 on $dev" fio_verify "$dev" 512k 16
done
check_fails "a disk that is mapped is not taken by a store" rpc bdev_lvol_create_lvstore '{"bdev_name": "Malloc0", "lvs_name": "other"}'

say "discard and zeroes"
check "discard" blkdiscard "$volume"
check "zeroes" blkdiscard -z -o 0 -l 1M "$disk"
check_eq "they read as zeroes" "$(dd if="$disk" bs=64k count=16 iflag=direct status=none | tr -d '\0' | wc -c)" 0
check "a file system on the volume" mkfs.ext4 -q -F "$volume"
must mount "$volume" /mnt
check "files" cp -r /etc/modprobe.d /mnt/
must umount /mnt

say "hot removal"
start_load "$disk" 4k 4
check "load runs" load_moves
check "the bdev goes while it is written" rpc spdk_rpc '{"method": "bdev_malloc_delete", "params": {"name": "Malloc0"}}'
stop_load >/dev/null 2>&1
check_fails "and is gone" rpc bdev_get_bdevs '{"name": "Malloc0"}'
LOAD_PID=
check "the target lives" target_lives
for dev in "$disk" "$disk4k" "$volume" "$aio"; do unmap_device "$dev" force || unmap_device "$dev"; done
stop_target
check "SPDK ended in order" grep 'SPDK stopped whole=true' "$TARGET_LOG"
check_eq "no hugepage is left in use" "$(cat /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages)" 700
start_target /run/target.json
check "a second start at once" rpc bdev_get_bdevs '{"name": "Malloc4k"}'
stop_target
finish
