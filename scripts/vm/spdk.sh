# A target with SPDK's bdevs. For scenarios: source "$VM_DIR/spdk.sh" after lib.sh. SPDK comes from the machine that built
# the program (docs/spdk.md), since the guest sees the host's files.
# shellcheck shell=bash

# need_spdk: skips the scenario if the program was built without SPDK, as CI's is.
need_spdk() {
  need_target
  # A parameter that only such a program knows.
  grep -aq hugepage_single_segments "$BIN_DIR/$TARGET_PROGRAM" ||
    skip "$BIN_DIR/$TARGET_PROGRAM was built without SPDK: cargo build --release -p rnbd-target --features spdk"
}

# setup_hugepages COUNT: of 2 MiB each, and the file system that SPDK takes them from.
setup_hugepages() {
  echo "$1" >/proc/sys/vm/nr_hugepages
  [[ $(cat /proc/sys/vm/nr_hugepages) == "$1" ]] || die "the guest has no $1 hugepages"
  grep -q ' hugetlbfs ' /proc/mounts || { mkdir -p /dev/hugepages && must mount -t hugetlbfs nodev /dev/hugepages; }
}

# nvme_addresses: the PCI addresses of QEMU's controllers ("# qemu: nvme"), in order.
nvme_addresses() {
  local device
  for device in /sys/bus/pci/devices/*; do
    [[ $(cat "$device/class") != 0x010802 ]] || basename "$device"
  done
}

# bind_nvme ADDRESS DRIVER: takes it from whoever has it.
bind_nvme() {
  local device=/sys/bus/pci/devices/$1
  must modprobe "$2"
  [[ ! -e $device/driver ]] || echo "$1" >"$device/driver/unbind"
  echo "$2" >"$device/driver_override"
  echo "$1" >/sys/bus/pci/drivers_probe
  check_eq "the controller belongs to $2" "$(basename "$(readlink -f "$device/driver")")" "$2"
}
