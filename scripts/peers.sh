#!/bin/bash
# Newer peers than this host's: roots of other Debian suites below build/peers/, made of Debian's own packages. The test
# scripts run in them, against the QEMU, libnbd, nbdkit, nbd and fio of that suite. The programs under test stay those that
# this host built.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/.." && pwd)

# Debian 13, and unstable.
PEER_SUITES=(trixie sid)
# Peers, and what the test scripts use beside them.
PEER_PACKAGES=(
  qemu-utils qemu-system-x86 libnbd-bin python3-libnbd nbdkit nbd-server nbd-client fio
  python3 python3-venv openssl procps iproute2 ca-certificates util-linux
)

usage() {
  cat <<USAGE
Usage: scripts/peers.sh build [SUITE...]               make the roots (2 minutes each), or add packages that are missing
       scripts/peers.sh update [SUITE...]              the same, and bring each package to the newest version of its suite
       scripts/peers.sh install SUITE PACKAGE...       add packages to a root
       scripts/peers.sh run SUITE COMMAND [ARGUMENT...]  run a command in a root, from this folder
       scripts/peers.sh versions [SUITE...]            list the peers' versions
       scripts/peers.sh path SUITE                     print the folder of a root
SUITE is one of: ${PEER_SUITES[*]}. Without one, all of them are meant. Root is needed.
First command: scripts/peers.sh build sid && scripts/peers.sh run sid scripts/test-nbd.sh
USAGE
}

die() {
  printf 'peers.sh: %s\n' "$*" >&2
  exit 2
}
say() { printf '[%4ds] %s\n' "$SECONDS" "$*" >&2; }
dir_of() { echo "$peers/$1"; }

need_suite() { [[ " ${PEER_SUITES[*]} " == *" $1 "* ]] || die "there is no suite \"$1\" here; there are: ${PEER_SUITES[*]}"; }
need_built() { [[ -e $(dir_of "$1")/.made ]] || die "$1 is not built; run: scripts/peers.sh build $1"; }

# in_root SUITE COMMAND...: runs it with mounts and a process table of its own, so nothing outlives it. This repository is at
# its own path, and the folder is the present one if that is below it.
in_root() {
  local dir
  dir=$(dir_of "$1")
  shift
  mkdir -p "$dir$root"
  # shellcheck disable=SC2016 # expanded by the inner shell
  unshare --mount --propagation private --pid --fork --kill-child -- bash -c '
    dir=$1 repo=$2 from=$3
    shift 3
    mount -t proc proc "$dir/proc" && mount --rbind /sys "$dir/sys" && mount --rbind /dev "$dir/dev" || exit 2
    mount -t tmpfs -o size=75% tmp "$dir/tmp" && mount -t tmpfs run "$dir/run" && mount --bind "$repo" "$dir$repo" || exit 2
    exec chroot "$dir" /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
      LANG=C.UTF-8 TERM="${TERM:-dumb}" TIME_SCALE="${TIME_SCALE:-1}" RNBD_PEERS="$(basename "$dir")" \
      /bin/bash -c "cd \"\$0\" && exec \"\$@\"" "$from" "$@"' peers "$dir" "$root" "$from" "$@"
}

# apt_in SUITE ARGUMENT...: apt-get in a root, with the host's way to look names up.
apt_in() {
  local dir
  dir=$(dir_of "$1")
  shift
  cp /etc/resolv.conf "$dir/etc/resolv.conf"
  in_root "${dir##*/}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o APT::Sandbox::User=root -y "$@" >>"$dir.log" 2>&1 ||
    { tail -n 20 "$dir.log" >&2; die "apt-get $1 failed in ${dir##*/}, see $dir.log"; }
}

# missing_in SUITE PACKAGE...: those that are not installed there.
missing_in() {
  local dir package
  dir=$(dir_of "$1")
  shift
  for package in "$@"; do
    [[ $(dpkg-query --admindir="$dir/var/lib/dpkg" -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
      echo "$package"
  done
}

install_in() { # SUITE PACKAGE...
  local suite=$1 packages
  shift
  mapfile -t packages < <(missing_in "$suite" "$@")
  [[ ${#packages[@]} -gt 0 ]] || return 0
  say "$suite: install ${packages[*]}"
  apt_in "$suite" update
  apt_in "$suite" install --no-install-recommends "${packages[@]}"
}

build() { # SUITE
  local dir
  dir=$(dir_of "$1")
  if [[ ! -e $dir/.made ]]; then
    "$here/packages.sh" debootstrap
    say "$1: unpack the base system"
    rm -rf "$dir"
    mkdir -p "$peers/cache"
    debootstrap --variant=minbase --cache-dir="$peers/cache" "$1" "$dir" >"$dir.log" 2>&1 ||
      { tail -n 20 "$dir.log" >&2; die "debootstrap failed, see $dir.log"; }
    # A root that can be made again needs no fsync for each file of it.
    echo force-unsafe-io >"$dir/etc/dpkg/dpkg.cfg.d/unsafe-io"
    # A mirror that has not been renewed for some weeks will do; its signature is checked all the same.
    echo 'Acquire::Check-Valid-Until "false";' >"$dir/etc/apt/apt.conf.d/old-mirror"
    # Only for what is named there and nowhere else, such as newer kernels.
    [[ $1 == sid ]] || sed "s/ $1 / $1-backports /" "$dir/etc/apt/sources.list" >"$dir/etc/apt/sources.list.d/backports.list"
    touch "$dir/.made"
  fi
  install_in "$1" "${PEER_PACKAGES[@]}"
}

versions() { # SUITE
  dpkg-query --admindir="$(dir_of "$1")/var/lib/dpkg" -W -f="$1"' ${Package} ${Version}\n' \
    qemu-utils libnbd-bin nbdkit nbd-server fio | column -t
}

[[ $# -ge 1 ]] || { usage >&2; exit 2; }
verb=$1 from=$PWD peers=$root/build/peers
shift
[[ $from/ == "$root"/* ]] || from=$root
case $verb in
  -h | --help) usage; exit 0 ;;
  build | update | versions)
    suites=("$@")
    [[ $# -gt 0 ]] || suites=("${PEER_SUITES[@]}")
    ;;
  run | install)
    [[ $# -ge 2 ]] || { usage >&2; die "$verb needs a suite and something to $verb"; }
    suites=("$1")
    shift
    ;;
  path) [[ $# == 1 ]] || die "path needs one suite"; suites=("$1") ;;
  *) usage >&2; die "unknown word \"$verb\"" ;;
esac
for suite in "${suites[@]}"; do need_suite "$suite"; done
[[ $verb == path ]] && { dir_of "${suites[0]}"; exit; }
[[ $(id -u) == 0 ]] || die "a root of another Debian needs root: it is entered with chroot"

case $verb in
  build | update | install)
    mkdir -p "$peers"
    exec 9>"$peers/.lock"
    flock 9
    ;;
  *) for suite in "${suites[@]}"; do need_built "$suite"; done ;;
esac
case $verb in
  build) for suite in "${suites[@]}"; do build "$suite"; done ;;
  update)
    for suite in "${suites[@]}"; do
      build "$suite"
      say "$suite: update"
      apt_in "$suite" update
      apt_in "$suite" dist-upgrade
    done
    ;;
  install) need_built "${suites[0]}"; install_in "${suites[0]}" "$@" ;;
  run) in_root "${suites[0]}" "$@" ;;
  versions) for suite in "${suites[@]}"; do versions "$suite"; done ;;
esac
