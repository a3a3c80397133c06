#!/bin/bash
# An NVMe drive under SPDK's driver, by uio_pci_generic and by vfio without IOMMU, served to the kernel client: file system, fio verify.
# timeout: 900
# by hand: it needs an installed SPDK
# qemu: nvme
source "$VM_DIR/lib.sh"
source "$VM_DIR/spdk.sh"
need_spdk
setup_net 1
setup_hugepages 500
mapfile -t addresses < <(nvme_addresses)
[[ ${#addresses[@]} == 2 ]] || die "QEMU has ${#addresses[@]} NVMe controllers: the scenario needs a line '# qemu: nvme'"
address=${addresses[0]} no_flush=${addresses[1]}
cat >/run/target.json <<JSON
{"subsystems": [
  {"subsystem": "spdk", "config": [
    {"method": "spdk_set_options", "params": {"pci_allowed": ["$address", "$no_flush"], "subsystems": [
      {"subsystem": "bdev", "config": [
        {"method": "bdev_nvme_set_options", "params": {"enable_flush": false}},
        {"method": "bdev_nvme_attach_controller", "params": {"name": "Nvme0", "trtype": "PCIe", "traddr": "$address"}},
        {"method": "bdev_nvme_attach_controller", "params": {"name": "Nvme1", "trtype": "PCIe", "traddr": "$no_flush"}},
        {"method": "bdev_wait_for_examine"}]}]}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_create_export", "params": {"device_path": "nvme0", "bdev_name": "Nvme0n1"}},
    {"method": "rnbd_create_export", "params": {"device_path": "no-flush", "bdev_name": "Nvme1n1"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "10.9.1.1"}}]}]}
JSON
load_rnbd_client

# serve DRIVER
serve() {
  local disk
  say "with $1"
  bind_nvme "$address" "$1"
  bind_nvme "$no_flush" "$1"
  start_target /run/target.json
  disk=$(map_device "by-$1" "$(path_spec 1)" nvme0) || die "map nvme0"
  check "fio randrw crc32c 4k QD32 x2" fio_verify "$disk" 4k 4
  check "fio randrw crc32c 512k QD32 x2" fio_verify "$disk" 512k 16
  check "discard" blkdiscard "$disk"
  check "mkfs" mkfs.ext4 -q -F "$disk"
  must mount "$disk" /mnt
  check "a file" dd if=/dev/urandom of=/mnt/file bs=1M count=16 conv=fsync status=none
  sum=$(md5sum </mnt/file)
  must umount /mnt
  must unmap_device "$disk"
  # SPDK would acknowledge flushes by itself, unless it is told otherwise, whatever its configuration says.
  disk=$(map_device "by-$1" "$(path_spec 1)" no-flush) || die "map no-flush"
  check "a write" dd if=/dev/zero of="$disk" bs=4k count=1 oflag=direct status=none
  check_fails "a flush, which the drive refuses" dd if=/dev/zero of="$disk" bs=4k count=1 oflag=direct conv=fsync,notrunc status=none
  must unmap_device "$disk"
  # Data went straight between chunks and the drive.
  check_fails "no data had to be copied for want of hugepages" grep 'no hugepages are left' "$TARGET_LOG"
  stop_target
  check "SPDK ended in order" grep 'SPDK stopped whole=true' "$TARGET_LOG"
  check_eq "no hugepage is left in use" "$(cat /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages)" 500
}

serve uio_pci_generic
if modprobe vfio enable_unsafe_noiommu_mode=1 2>/dev/null && [[ -e /sys/module/vfio/parameters/enable_unsafe_noiommu_mode ]]; then
  echo 1 >/sys/module/vfio/parameters/enable_unsafe_noiommu_mode
  serve vfio-pci
else
  say "NOT TESTED: this kernel's vfio has no mode without IOMMU"
fi

say "what was written is on the drive"
must modprobe nvme
echo "$address" >"/sys/bus/pci/devices/$address/driver/unbind"
echo nvme >"/sys/bus/pci/devices/$address/driver_override"
echo "$address" >/sys/bus/pci/drivers_probe
wait_for test -b /dev/nvme0n1 || die "the kernel's driver does not find the drive"
must mount -o ro /dev/nvme0n1 /mnt
check_eq "the file, by the kernel's driver" "$(md5sum </mnt/file)" "$sum"
must umount /mnt
finish
