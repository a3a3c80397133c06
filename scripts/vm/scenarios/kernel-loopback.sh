# The bench itself: kernel client and kernel server over rxe; map, verify, file system, two paths, unmap.
# timeout: 240
# long: 6.12 newest
# shellcheck shell=bash
# shellcheck source=scripts/vm/lib.sh
source "$VM_DIR/lib.sh"

setup_rxe 2
setup_ram 1 128
load_rnbd_server
load_rnbd_client

dev=$(map_device s1 "$(path_spec 1 2)" /dev/ram0 rw) || die "map /dev/ram0"
ok "mapped as $dev"
check "both paths are connected" path_is s1 1 connected
check "both paths are connected" path_is s1 2 connected
check_eq "the capacity is the server's" "$(blockdev --getsize64 "$dev")" $((128 << 20))
check "fio verify 4k" fio_verify "$dev" 4k 4
check "fio verify 512k" fio_verify "$dev" 512k 32
check "mkfs.ext4" mkfs.ext4 -q -F "$dev"
mkdir -p /mnt/t
check "mount" mount "$dev" /mnt/t
check "copy" cp -r "$VM_DIR" /mnt/t/
check "unmount" umount /mnt/t
check "fsck" fsck.ext4 -fn "$dev"
check_fails "a device that does not exist is refused" map_device s1 "" /dev/nothing rw
check "unmap" unmap_device "$dev"
check "the session is gone" wait_for test ! -e /sys/class/rtrs-client/s1
finish
