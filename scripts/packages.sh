#!/bin/bash
# Installs Debian packages: those given as arguments, where the word "build" stands for what building needs, as it does
# without arguments. (libibverbs and librdmacm are loaded at run time, if present.) Exits 77 where that takes root.
set -euo pipefail
building=(gcc g++ make cmake clang libclang-dev pkg-config python3 python3-venv procps curl ca-certificates)
[[ $# -gt 0 ]] || set -- build
packages=()
for p in "$@"; do
  if [[ $p == build ]]; then packages+=("${building[@]}"); else packages+=("$p"); fi
done
missing=()
for p in "${packages[@]}"; do
  [[ $(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null) == installed ]] || missing+=("$p")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0
[[ $(id -u) == 0 ]] || { echo "packages.sh: run as root, or install first: ${missing[*]}" >&2; exit 77; }
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get -qq -o DPkg::Lock::Timeout=600 update
apt-get -qq -o DPkg::Lock::Timeout=600 install --no-install-recommends "${missing[@]}" >/dev/null
