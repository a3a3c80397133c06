#!/bin/bash
# Builds the VM bench: installs the Debian packages it needs, takes the newest Debian kernels whose source, headers
# and image agree, builds their rtrs and rnbd modules (Debian ships none), and packs one initramfs per kernel.
# Everything made lands in build/vm/ and is kept; a second run only checks the stamps.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source=scripts/vm/common.sh
source "$here/common.sh"

usage() {
  cat <<USAGE
Usage: scripts/vm/build.sh [-k SERIES]... [--update] [--packages-only]
  -k SERIES        kernel series to build, "6.12" or "6.1"; repeatable, default: ${VM_SERIES[*]}
  --update         look for a newer kernel even if one is built already
  --packages-only  only install the Debian packages of the bench and of its scenarios
First command: scripts/vm/build.sh && scripts/vm/run.sh kernel-loopback
USAGE
}

# What peers and scenarios run in the guest (which sees the host's root), and what building needs.
packages=(
  qemu-system-x86 busybox-static cpio kmod xz-utils
  rdma-core ibverbs-providers ibverbs-utils rdmacm-utils perftest
  iproute2 nftables iputils-ping fio e2fsprogs fdisk nbd-client xfsprogs util-linux coreutils procps psmisc strace python3
  gcc make bc bison flex libelf-dev libssl-dev
)

apt_get() {
  DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 -o APT::Sandbox::User=root "$@"
}

installed() { [[ $(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null) == installed ]]; }

need_root() {
  [[ $(id -u) == 0 ]] || vm_die "root is needed to install packages: $*"
}

updated=
apt_update_once() {
  [[ -n $updated ]] && return
  need_root "apt-get update"
  vm_say "apt-get update"
  apt_get update
  updated=yes
}

# Debian's qemu-utils breaks a qemu-system of another version, and apt would rather remove it than say so: name it
# in the same transaction, at the version that goes with the qemu-system on offer.
keep_qemu_utils() {
  installed qemu-utils || return 0
  local version
  version=$(apt-cache policy qemu-system-x86 | awk '/Candidate:/ {print $2}')
  if apt-cache madison qemu-utils | awk '{print $3}' | grep -qxF "$version"; then
    echo "qemu-utils=$version"
  fi
}

install_packages() {
  local missing=() extra=() p
  for p in "$@"; do installed "$p" || missing+=("$p"); done
  [[ ${#missing[@]} == 0 ]] && return
  apt_update_once
  need_root "${missing[*]}"
  if [[ " ${missing[*]} " == *" qemu-system-x86 "* ]]; then mapfile -t extra < <(keep_qemu_utils); fi
  vm_say "apt-get install ${missing[*]} ${extra[*]}"
  apt_get install -y --no-install-recommends --allow-downgrades "${missing[@]}" "${extra[@]}" >"$vm/logs/apt.log" 2>&1 ||
    { tail -n 30 "$vm/logs/apt.log" >&2; vm_die "apt-get install failed, see $vm/logs/apt.log"; }
}

# discover SERIES: prints "KVER PACKAGE_VERSION" of the newest version that linux-source, -headers and -image share.
discover() {
  local series=$1 pattern=${1//./\\.} names versions packages=() n
  names=$(apt-cache pkgnames linux-headers- | grep -E "^linux-headers-$pattern\.[0-9].*-amd64$" |
    grep -Ev -- '-(cloud|rt)-amd64$' | sed 's/^linux-headers-//') || true
  versions=$(apt-cache madison "linux-source-$series" 2>/dev/null | awk '{print $3}' | sort -u) || true
  [[ -n $names && -n $versions ]] ||
    vm_die "apt offers no linux $series; Debian 12 has it in bookworm, bookworm-security or bookworm-backports"
  for n in $names; do packages+=("linux-headers-$n" "linux-image-$n-unsigned"); done
  # One table of "package version"; of it, the names whose two packages both exist at a version of the source.
  apt-cache madison "${packages[@]}" 2>/dev/null |
    awk -v sources="$versions" '
      BEGIN { n = split(sources, list, "\n"); for (i = 1; i <= n; i++) source[list[i]] = 1 }
      $3 in source {
        k = $1; sub(/^linux-(headers|image)-/, "", k); sub(/-unsigned$/, "", k)
        kind = ($1 ~ /headers/) ? 1 : 2
        if (!(seen[k, $3, kind]++) && seen[k, $3, 3 - kind]) print k, $3
      }' | sort -k2,2V | tail -n 1
}

# fetch DIR PACKAGE=VERSION: downloads and unpacks a package into DIR without installing it.
fetch() {
  local dir=$1 package=$2 tmp
  tmp=$(mktemp -d "$vm/fetch.XXXXXX")
  (cd "$tmp" && apt_get download "$package") || vm_die "apt-get download $package failed"
  mkdir -p "$dir"
  dpkg -x "$tmp"/*.deb "$dir"
  rm -rf "$tmp"
}

# fetch_kernel KVER VERSION DIR: vmlinuz and modules of the image package into DIR.
fetch_kernel() {
  local kver=$1 version=$2 dir=$3
  [[ -e $dir/.kernel ]] && return
  vm_say "$kver: download the image"
  fetch "$dir/image" "linux-image-$kver-unsigned=$version"
  ln -sfn "image/boot/vmlinuz-$kver" "$dir/vmlinuz"
  touch "$dir/.kernel"
}

# fetch_source SERIES VERSION DIR: only the two drivers, side by side, out of Debian's patched source.
fetch_source() {
  local series=$1 version=$2 dir=$3 tmp
  [[ -e $dir/.source ]] && return
  vm_say "linux-source-$series $version: download, unpack rtrs and rnbd"
  tmp=$(mktemp -d "$vm/source.XXXXXX")
  fetch "$tmp" "linux-source-$series=$version"
  rm -rf "$dir/src"
  mkdir -p "$dir/src"
  tar -xJf "$tmp/usr/src/linux-source-$series.tar.xz" -C "$tmp" \
    "linux-source-$series/drivers/infiniband/ulp/rtrs" "linux-source-$series/drivers/block/rnbd"
  mv "$tmp/linux-source-$series/drivers/infiniband/ulp/rtrs" "$tmp/linux-source-$series/drivers/block/rnbd" "$dir/src/"
  rm -rf "$tmp"
  touch "$dir/.source"
}

kbuild() {
  local kver=$1 log=$2
  shift 2
  make -s -j"$(nproc)" -C "/usr/src/linux-headers-$kver" "$@" modules >>"$log" 2>&1 ||
    { tail -n 30 "$log" >&2; vm_die "module build failed, see $log"; }
}

# build_modules KVER VERSION DIR: rtrs-* and rnbd-* into the unpacked image's module tree, so that modprobe knows them.
build_modules() {
  local kver=$1 version=$2 dir=$3 src=$3/src log=$vm/logs/modules-$1.log extra
  [[ -e $dir/.modules ]] && return
  install_packages "linux-headers-$kver"
  [[ $(dpkg-query -W -f='${Version}' "linux-headers-$kver") == "$version" ]] ||
    apt_get install -y --allow-downgrades "linux-headers-$kver=$version" >/dev/null
  vm_say "$kver: build the rtrs and rnbd modules"
  : >"$log"
  kbuild "$kver" "$log" M="$src/rtrs" CONFIG_INFINIBAND_RTRS=m CONFIG_INFINIBAND_RTRS_CLIENT=m CONFIG_INFINIBAND_RTRS_SERVER=m
  # rnbd's Makefile reaches rtrs by a path below the kernel tree, which the headers package does not have.
  kbuild "$kver" "$log" M="$src/rnbd" ccflags-y="-I$src/rtrs" KBUILD_EXTRA_SYMBOLS="$src/rtrs/Module.symvers" \
    CONFIG_BLK_DEV_RNBD_CLIENT=m CONFIG_BLK_DEV_RNBD_SERVER=m
  extra=$dir/image/lib/modules/$kver/extra
  mkdir -p "$extra"
  cp "$src"/rtrs/*.ko "$src"/rnbd/*.ko "$extra/"
  depmod -b "$dir/image" "$kver"
  touch "$dir/.modules"
}

# build_initramfs KVER DIR: busybox, the modules that reach the host's root, and init.sh. Repacked when an input changes.
build_initramfs() {
  local kver=$1 dir=$2 tree=$2/initramfs stamp m f name
  stamp=$(cat "$here/init.sh" "$here/build.sh" | sha256sum)
  [[ -e $dir/initrd.gz && $(cat "$dir/.initrd" 2>/dev/null) == "$stamp" ]] && return
  vm_say "$kver: pack the initramfs"
  rm -rf "$tree"
  mkdir -p "$tree"/{bin,dev,host,lower,modules,proc,run,sys,upper}
  cp "$(command -v busybox)" "$tree/bin/busybox"
  install -m 755 "$here/init.sh" "$tree/init"
  : >"$tree/modules/order"
  for m in virtio_pci virtio_console 9pnet_virtio 9p overlay; do
    while read -r f; do
      name=$(basename "${f%.xz}")
      grep -qxF "$name" "$tree/modules/order" && continue
      if [[ $f == *.xz ]]; then xz -dc "$f" >"$tree/modules/$name"; else cp "$f" "$tree/modules/$name"; fi
      echo "$name" >>"$tree/modules/order"
    done < <(modprobe -C /dev/null -d "$dir/image" -S "$kver" --show-depends "$m" | awk '$1 == "insmod" {print $2}')
  done
  (cd "$tree" && find . | cpio -o -H newc --quiet | gzip -1) >"$dir/initrd.new"
  mv "$dir/initrd.new" "$dir/initrd.gz"
  rm -rf "$tree"
  echo "$stamp" >"$dir/.initrd"
}

build_series() {
  local series=$1 kver version found
  if [[ -n $update || ! -e $vm/kernel-$series ]]; then
    apt_update_once
    found=$(discover "$series")
    [[ -n $found ]] || vm_die "no version of linux $series has source, headers and unsigned image alike"
    echo "$found" >"$vm/kernel-$series.new"
    mv "$vm/kernel-$series.new" "$vm/kernel-$series"
  fi
  read -r kver version <"$vm/kernel-$series"
  fetch_kernel "$kver" "$version" "$vm/$kver"
  fetch_source "$series" "$version" "$vm/$kver"
  build_modules "$kver" "$version" "$vm/$kver"
  build_initramfs "$kver" "$vm/$kver"
  vm_say "$series: $kver is ready in ${vm#"$root"/}/$kver"
}

series=() update='' packages_only=''
while [[ $# -gt 0 ]]; do
  case $1 in
    -k) [[ $# -ge 2 ]] || vm_die "-k needs a kernel series: ${VM_SERIES[*]}"; series+=("$2"); shift ;;
    --update) update=yes ;;
    --packages-only) packages_only=yes ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; vm_die "unknown argument \"$1\"" ;;
  esac
  shift
done
[[ ${#series[@]} -gt 0 ]] || series=("${VM_SERIES[@]}")
for s in "${series[@]}"; do vm_known "$s"; done

vm=$root/build/vm
mkdir -p "$vm/logs"
exec 9>"$vm/.lock"
flock -n 9 || { vm_say "another build.sh runs, waiting for it"; flock 9; }
install_packages "${packages[@]}"
[[ -n $packages_only ]] && exit 0
for s in "${series[@]}"; do build_series "$s"; done
