#!/bin/bash
# Builds the VM bench: installs the Debian packages it needs, takes the newest Debian kernels whose source, headers
# and image agree, builds their rtrs and rnbd modules (Debian ships none), and packs one initramfs per kernel. Kernels of
# newer Debians are built in their roots (scripts/peers.sh), with their compilers.
# Everything made lands in build/vm/ and is kept; a second run only checks the stamps.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source=scripts/vm/common.sh
source "$here/common.sh"

usage() {
  cat <<USAGE
Usage: scripts/vm/build.sh [-k SERIES]... [--update] [--packages-only]
  -k SERIES        kernel series to build; repeatable, default: ${VM_SERIES[*]}. Those come from this host's archive, every
                   other one ("7.2") from a newer Debian's, see scripts/peers.sh; "newest" is the newest one there
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

# An archive is where the packages of a kernel come from: "host", or a suite whose root scripts/peers.sh makes. in_archive
# ARCHIVE COMMAND...: runs a command there; build/ is at the same path.
in_archive() {
  local archive=$1
  shift
  if [[ $archive == host ]]; then "$@"; else "$root/scripts/peers.sh" run "$archive" "$@"; fi
}

# offers ARCHIVE SERIES: it has the source of the series.
offers() { in_archive "$1" apt-cache madison "linux-source-$2" 2>/dev/null | grep -q .; }

# update_archive ARCHIVE: makes it, and renews its lists of packages.
update_archive() {
  if [[ $1 == host ]]; then
    apt_update_once
  else
    "$root/scripts/peers.sh" build "$1"
    in_archive "$1" apt-get -qq -o APT::Sandbox::User=root update
  fi
}

# archive_of SERIES: prints the archive that has it.
archive_of() {
  local suite
  if [[ " ${VM_SERIES[*]} " == *" $1 "* ]]; then
    update_archive host >&2
    echo host
    return
  fi
  for suite in sid trixie; do
    update_archive "$suite" >&2
    offers "$suite" "$1" && { echo "$suite"; return; }
  done
  vm_die "neither this host's archive nor those of scripts/peers.sh offer Linux $1"
}

# newest_series: prints the series of unstable's kernel, "7.2".
newest_series() {
  update_archive sid >&2
  in_archive sid apt-cache madison linux-image-amd64 | awk '{print $3}' | sort -V | tail -n 1 | cut -d. -f1-2
}

# discover ARCHIVE SERIES: prints "KVER PACKAGE_VERSION" of the newest version that source, headers and kernel share. The
# kernel is in linux-image-KVER-unsigned, or, since 7.x, in linux-binary-KVER.
discover() {
  local archive=$1 series=$2 pattern=${2//./\\.} names versions packages=() n
  names=$(in_archive "$archive" apt-cache pkgnames linux-headers- | grep -E "^linux-headers-$pattern\.[0-9].*-amd64$" |
    grep -Ev -- '-(cloud|rt)-amd64$' | sed 's/^linux-headers-//') || true
  versions=$(in_archive "$archive" apt-cache madison "linux-source-$series" 2>/dev/null | awk '{print $3}' | sort -u) || true
  [[ -n $names && -n $versions ]] ||
    vm_die "apt offers no linux $series; Debian 12 has it in bookworm, bookworm-security or bookworm-backports"
  for n in $names; do packages+=("linux-headers-$n" "linux-image-$n-unsigned" "linux-binary-$n"); done
  # One table of "package version"; of it, the names whose two packages both exist at a version of the source.
  in_archive "$archive" apt-cache madison "${packages[@]}" 2>/dev/null |
    awk -v sources="$versions" '
      BEGIN { n = split(sources, list, "\n"); for (i = 1; i <= n; i++) source[list[i]] = 1 }
      $3 in source {
        k = $1; sub(/^linux-(headers|image|binary)-/, "", k); sub(/-unsigned$/, "", k)
        kind = ($1 ~ /headers/) ? 1 : 2
        if (!(seen[k, $3, kind]++) && seen[k, $3, 3 - kind]) print k, $3
      }' | sort -k2,2V | tail -n 1
}

# fetch ARCHIVE DIR PACKAGE=VERSION: downloads and unpacks a package into DIR without installing it.
fetch() {
  local archive=$1 dir=$2 package=$3 tmp
  tmp=$(mktemp -d "$vm/fetch.XXXXXX")
  (cd "$tmp" && in_archive "$archive" apt-get -qq -o APT::Sandbox::User=root download "$package") ||
    vm_die "apt-get download $package failed"
  mkdir -p "$dir"
  dpkg -x "$tmp"/*.deb "$dir"
  rm -rf "$tmp"
}

# fetch_kernel ARCHIVE KVER VERSION DIR: vmlinuz and modules into DIR. Since 7.x they are in three packages, below usr/lib.
fetch_kernel() {
  local archive=$1 kver=$2 version=$3 dir=$4 part
  [[ -e $dir/.kernel ]] && return
  vm_say "$kver: download the kernel"
  if in_archive "$archive" apt-cache madison "linux-binary-$kver" | grep -q .; then
    for part in binary modules base; do fetch "$archive" "$dir/image" "linux-$part-$kver=$version"; done
    [[ -e $dir/image/lib ]] || ln -s usr/lib "$dir/image/lib"
    ln -sfn "image/usr/lib/modules/$kver/vmlinuz" "$dir/vmlinuz"
  else
    fetch "$archive" "$dir/image" "linux-image-$kver-unsigned=$version"
    ln -sfn "image/boot/vmlinuz-$kver" "$dir/vmlinuz"
  fi
  touch "$dir/.kernel"
}

# fetch_source ARCHIVE SERIES VERSION DIR: only the two drivers, side by side, out of Debian's patched source.
fetch_source() {
  local archive=$1 series=$2 version=$3 dir=$4 tmp
  [[ -e $dir/.source ]] && return
  vm_say "linux-source-$series $version: download, unpack rtrs and rnbd"
  tmp=$(mktemp -d "$vm/source.XXXXXX")
  fetch "$archive" "$tmp" "linux-source-$series=$version"
  rm -rf "$dir/src"
  mkdir -p "$dir/src"
  tar -xJf "$tmp/usr/src/linux-source-$series.tar.xz" -C "$tmp" \
    "linux-source-$series/drivers/infiniband/ulp/rtrs" "linux-source-$series/drivers/block/rnbd"
  mv "$tmp/linux-source-$series/drivers/infiniband/ulp/rtrs" "$tmp/linux-source-$series/drivers/block/rnbd" "$dir/src/"
  rm -rf "$tmp"
  touch "$dir/.source"
}

kbuild() {
  local archive=$1 kver=$2 log=$3
  shift 3
  in_archive "$archive" make -s -j"$(nproc)" -C "/usr/src/linux-headers-$kver" "$@" modules >>"$log" 2>&1 ||
    { tail -n 30 "$log" >&2; vm_die "module build failed, see $log"; }
}

# install_headers ARCHIVE KVER VERSION: and the compiler that goes with them.
install_headers() {
  local archive=$1 kver=$2 version=$3
  if [[ $archive == host ]]; then
    install_packages "linux-headers-$kver"
    [[ $(dpkg-query -W -f='${Version}' "linux-headers-$kver") == "$version" ]] ||
      apt_get install -y --allow-downgrades "linux-headers-$kver=$version" >/dev/null
  else
    "$root/scripts/peers.sh" install "$archive" make "linux-headers-$kver"
  fi
}

# build_modules ARCHIVE KVER VERSION DIR: rtrs-* and rnbd-* into the unpacked kernel's module tree, so that modprobe knows
# them.
build_modules() {
  local archive=$1 kver=$2 version=$3 dir=$4 src=$4/src log=$vm/logs/modules-$2.log extra
  [[ -e $dir/.modules ]] && return
  install_headers "$archive" "$kver" "$version"
  vm_say "$kver: build the rtrs and rnbd modules"
  : >"$log"
  kbuild "$archive" "$kver" "$log" M="$src/rtrs" CONFIG_INFINIBAND_RTRS=m CONFIG_INFINIBAND_RTRS_CLIENT=m \
    CONFIG_INFINIBAND_RTRS_SERVER=m
  # rnbd's Makefile reaches rtrs by a path below the kernel tree, which the headers package does not have.
  kbuild "$archive" "$kver" "$log" M="$src/rnbd" ccflags-y="-I$src/rtrs" KBUILD_EXTRA_SYMBOLS="$src/rtrs/Module.symvers" \
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
  local series=$1 archive kver version found
  if [[ -n $update || ! -e $vm/kernel-$series ]]; then
    archive=$(archive_of "$series")
    found=$(discover "$archive" "$series")
    [[ -n $found ]] || vm_die "no version of linux $series has source, headers and kernel alike"
    echo "$found $archive" >"$vm/kernel-$series.new"
    mv "$vm/kernel-$series.new" "$vm/kernel-$series"
  fi
  read -r kver version archive <"$vm/kernel-$series"
  fetch_kernel "$archive" "$kver" "$version" "$vm/$kver"
  fetch_source "$archive" "$series" "$version" "$vm/$kver"
  build_modules "$archive" "$kver" "$version" "$vm/$kver"
  build_initramfs "$kver" "$vm/$kver"
  vm_say "$series: $kver is ready in ${vm#"$root"/}/$kver"
}

# build_newest: whatever series that is today; run.sh -k newest finds it by the link.
build_newest() {
  local newest
  newest=$(readlink "$vm/kernel-newest" 2>/dev/null) || newest=
  newest=${newest#kernel-}
  if [[ -n $update || -z $newest ]]; then newest=$(newest_series); fi
  build_series "$newest"
  ln -sfn "kernel-$newest" "$vm/kernel-newest"
}

series=() update='' packages_only=''
while [[ $# -gt 0 ]]; do
  case $1 in
    -k) [[ $# -ge 2 ]] || vm_die "-k needs a kernel series: ${VM_SERIES[*]}, newest, …"; series+=("$2"); shift ;;
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
for s in "${series[@]}"; do
  if [[ $s == newest ]]; then build_newest; else build_series "$s"; fi
done
