#!/bin/bash
# The NBD server with the clients of this world, over unix sockets and TCP on the loopback device: libnbd's tools and
# Python binding, qemu, nbdkit, fio. Data are compared; no privileges are needed but to install missing packages.
# Usage: scripts/test-nbd.sh [BIN_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(realpath "${1:-build/release}")
rpc=$(realpath scripts/vm/rpc.py)
checks=$(realpath scripts/nbd-checks.py)
export PATH=/usr/bin:$PATH # libnbd's Python binding belongs to the system's Python.

packages=(libnbd-bin python3-libnbd qemu-utils nbdkit fio procps)
missing=()
for p in "${packages[@]}"; do
  [[ $(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null) == installed ]] || missing+=("$p")
done
if [[ ${#missing[@]} -gt 0 ]]; then
  [[ $(id -u) == 0 ]] || { echo "skipped: run as root once, or install ${missing[*]}"; exit 77; }
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq -o DPkg::Lock::Timeout=600 update
  apt-get -qq -o DPkg::Lock::Timeout=600 install --no-install-recommends "${missing[@]}" >/dev/null
fi

dir=$(mktemp -d "${TMPDIR:-/tmp}/rnbd-nbd.XXXXXX")
target='' passed=0
cleanup() {
  [[ -z $target ]] || kill -KILL "$target" 2>/dev/null || true
  rm -rf "$dir"
}
trap cleanup EXIT
cp "$bin/rnbd-target" "$dir/"
cd "$dir"

# Tests run beside each other: a port that is free now.
port=$(/usr/bin/python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
truncate -s 64M file.img
cat >target.json <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "M0", "num_blocks": 131072, "block_size": 512}},
    {"method": "bdev_malloc_create", "params": {"name": "M1", "num_blocks": 16384, "block_size": 4096}},
    {"method": "bdev_uring_create", "params": {"name": "F0", "filename": "$dir/file.img", "block_size": 512}}]},
  {"subsystem": "nbd_server", "config": [
    {"method": "nbd_server_create_export", "params": {"name": "disk", "bdev_name": "M0", "description": "a disk in memory"}},
    {"method": "nbd_server_create_export", "params": {"name": "readonly", "bdev_name": "M0", "read_only": true}},
    {"method": "nbd_server_create_export", "params": {"name": "4k", "bdev_name": "M1"}},
    {"method": "nbd_server_create_export", "params": {"name": "file", "bdev_name": "F0"}},
    {"method": "nbd_server_add_listener", "params": {"path": "$dir/nbd.sock", "export": "disk"}},
    {"method": "nbd_server_add_listener", "params": {"path": "$dir/old.sock", "dialect": "newstyle"}},
    {"method": "nbd_server_add_listener", "params": {"traddr": "127.0.0.1", "trsvcid": "$port"}}]}]}
JSON

: >target.log
start() {
  ./rnbd-target -c target.json -r rpc.sock -m 0x1 >>target.log 2>&1 &
  target=$!
  for ((i = 0; i < 100; i++)); do
    [[ $(grep -c ' ready ' target.log) == "$1" ]] && return
    kill -0 "$target" || { cat target.log; exit 1; }
    sleep 0.1
  done
  cat target.log
  exit 1
}

# Nothing here takes long; what hangs has failed.
for tool in nbdinfo nbdcopy qemu-img qemu-io fio; do
  eval "$tool() { timeout -k 5 300 /usr/bin/$tool \"\$@\"; }"
done

# check NAME COMMAND...: in a shell of its own, which ends at the first failure.
check() {
  local name=$1 rc=0
  shift
  set +e
  (set -e; "$@") >check.log 2>&1 </dev/null
  rc=$?
  set -e
  passed "$name" $rc
}

passed() { # NAME STATUS
  [[ $2 == 0 ]] || { echo "FAILED: $1"; cat check.log; tail -n 20 target.log; exit 1; }
  echo "ok: $1"
  passed=$((passed + 1))
}

uri() { echo "nbd+unix:///$1?socket=$dir/nbd.sock"; }
tcp() { echo "nbd://127.0.0.1:$port/$1"; }

lists_exports() {
  nbdinfo --list --json "$(tcp '')" >list.json
  /usr/bin/python3 - <<'PY'
import json
exports = {e["export-name"]: e for e in json.load(open("list.json"))["exports"]}
assert sorted(exports) == ["4k", "disk", "file", "readonly"], exports
assert exports["disk"]["description"] == "a disk in memory", exports["disk"]
assert exports["4k"]["block_size_minimum"] == 4096 and exports["disk"]["block_size_minimum"] == 512
for name, e in exports.items():
    assert e["export-size"] == 64 << 20 and e["can_multi_conn"] and e["can_flush"], e
    assert e["is_read_only"] == (name == "readonly"), e
    assert e["can_trim"] == e["can_zero"] == e["can_fua"] == (name != "readonly"), e
PY
}

copies() { # URI
  nbdcopy --connections=4 "$dir/random.img" "$1"
  rm -f back.img
  nbdcopy --connections=4 "$1" "$dir/back.img"
  cmp random.img back.img
}

through_qemu() {
  qemu-img convert -n -f raw -O raw random.img "$(uri disk)"
  qemu-img compare -f raw -F raw random.img "$(uri readonly)"
  qemu-io -f raw -c 'write -P 0x5a 1M 2M' -c 'read -P 0x5a 1M 2M' -c 'write -z 2M 64k' -c 'read -P 0 2M 64k' \
    -c 'write -zu 3M 64k' -c 'read -P 0 3M 64k' -c 'discard 4M 1M' -c 'read -P 0 4M 1M' -c flush \
    -c 'write -f -P 7 1000 5000' -c 'read -P 7 1000 5000' "$(uri "$1")"
}

refuses_qemu_writes() {
  if qemu-io -f raw -c 'write 0 4k' "$(uri readonly)"; then return 1; fi
  qemu-io -r -f raw -c 'read 0 4k' "$(uri readonly)"
}

through_nbdkit() {
  nbdkit -U "$dir/kit.sock" --foreground nbd uri="$(tcp disk)" shared=true &
  local kit=$! rc=0
  for ((i = 0; i < 50; i++)); do [[ -S kit.sock ]] && break; sleep 0.1; done
  nbdcopy random.img "nbd+unix:///?socket=$dir/kit.sock" && nbdcopy "nbd+unix:///?socket=$dir/kit.sock" kit.img &&
    cmp random.img kit.img || rc=$?
  kill "$kit"
  wait "$kit" || true
  return $rc
}

verifies() { # URI BLOCK_SIZE DEPTH
  fio --name=verify --ioengine=nbd --uri="$1" --rw=randrw --bs="$2" --iodepth="$3" --size=48M --io_size=96M \
    --verify=crc32c --verify_fatal=1 --fsync=64 --output-format=normal
}

trims() { # URI
  fio --name=trim --ioengine=nbd --uri="$1" --rw=randtrim --bs=64k --iodepth=8 --size=16M
}

# These two end the server, a child of this shell.
survives_a_kill() {
  nbdcopy --flush random.img "$(uri file)" || return
  kill -KILL "$target"
  wait "$target"
  [[ -S nbd.sock ]] || { echo "the stale socket is missing"; return 1; }
  cmp random.img file.img || return
  start 2
  nbdcopy "$(uri file)" back.img && cmp random.img back.img
}

ends_in_order() {
  fio --name=load --ioengine=nbd --uri="$(uri file)" --rw=randwrite --bs=16k --iodepth=32 --size=48M --time_based \
    --runtime=60 >fio.log 2>&1 &
  local fio=$! rc=0
  for ((i = 0; i < 100; i++)); do
    "$rpc" rpc.sock nbd_server_get_connections | grep -q '"num_write_ops": *[1-9]' && break
    sleep 0.1
  done
  [[ $i -lt 100 ]] || { echo "no load"; cat fio.log; return 1; }
  kill -TERM "$target"
  wait "$target" || rc=$?
  target=''
  # Without its server the load fails, or it ends by itself.
  kill "$fio" 2>/dev/null
  wait "$fio"
  [[ $rc == 0 && ! -e nbd.sock && ! -e old.sock ]] || { echo "status $rc"; ls; return 1; }
  ! grep 'giving up' target.log
}

dd if=/dev/urandom of=random.img bs=1M count=64 status=none
start 1
check "exports are listed with their properties" lists_exports
check "nbdcopy, 4 connections, unix socket" copies "$(uri disk)"
check "nbdcopy, 4 connections, TCP, 4096-byte blocks" copies "$(tcp 4k)"
check "qemu: convert, compare, write, zero, discard, FUA" through_qemu disk
check "qemu: 4096-byte blocks" through_qemu 4k
check "qemu: file" through_qemu file
check "qemu: read-only" refuses_qemu_writes
check "nbdkit's nbd plugin" through_nbdkit
check "fio verify 4k" verifies "$(uri disk)" 4k 32
check "fio verify 512k, TCP" verifies "$(tcp disk)" 512k 32
check "fio verify 4k on a file" verifies "$(uri file)" 4k 32
check "fio trim" trims "$(uri disk)"
check "libnbd: handshakes, refusals, limits, control" /usr/bin/python3 "$checks" "$dir" "$port" "$target" "$rpc"
rc=0
survives_a_kill >check.log 2>&1 || rc=$?
passed "a flushed copy survives kill -9, and the socket is taken over" $rc
ends_in_order >check.log 2>&1 || rc=$?
passed "the end with I/O in flight" $rc
echo "$passed passed, 0 failed"
