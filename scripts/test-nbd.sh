#!/bin/bash
# The NBD server with the clients of this world, over unix sockets and TCP on the loopback device: libnbd's tools and
# Python binding, qemu, nbdkit, fio. Data are compared; no privileges are needed but to install missing packages.
# Usage: scripts/test-nbd.sh [BIN_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
bin=$(realpath "${1:-build/release}")
rpc=$(realpath scripts/vm/rpc.py)
checks=$(realpath scripts/nbd-checks.py)
export PATH=/usr/bin:$PATH # libnbd's Python binding belongs to the system's Python.

scripts/packages.sh libnbd-bin python3-libnbd qemu-utils nbdkit fio procps openssl

dir=$(mktemp -d "${TMPDIR:-/tmp}/rnbd-nbd.XXXXXX")
target='' passed=0
cleanup() {
  [[ -z $target ]] || kill -KILL "$target" 2>/dev/null || true
  rm -rf "$dir"
}
trap cleanup EXIT
cp "$bin/rnbd-target" "$dir/"
[[ ! -x $bin/rnbd-initiator ]] || cp "$bin/rnbd-initiator" "$dir/"
cd "$dir"

port='' tls_port=''
free_port port
free_port tls_port
# How long a handshake may take; checks wait for its end.
# Whatever the machine is like, it is not the default: that is not saved.
handshake_ms=$(limit 5)001
truncate -s 64M file.img

# An authority, a server, two clients that it knows, and one of another authority.
mkdir -p pki alice bob mallory
authority() { # DIRECTORY
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj "/CN=authority of $1" \
    -keyout "$1/ca-key.pem" -out "$1/ca-cert.pem" 2>/dev/null
}
certificate() { # AUTHORITY DIRECTORY server|client COMMON_NAME
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/O=test/CN=$4" -keyout "$2/$3-key.pem" \
    -out "$2/$3.csr" 2>/dev/null
  openssl x509 -req -in "$2/$3.csr" -CA "$1/ca-cert.pem" -CAkey "$1/ca-key.pem" -CAcreateserial -days 2 \
    -extfile <(echo "subjectAltName=DNS:localhost,IP:127.0.0.1"; echo "extendedKeyUsage=${3}Auth") \
    -out "$2/$3-cert.pem" 2>/dev/null
  [[ $2 == "$1" ]] || cp -n "$1/ca-cert.pem" "$2/"
}
authority pki
authority mallory
certificate pki pki server localhost
certificate pki alice client alice
certificate pki bob client bob
certificate mallory mallory client alice
cp pki/ca-cert.pem mallory/
cat >target.json <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "M0", "num_blocks": 131072, "block_size": 512}},
    {"method": "bdev_malloc_create", "params": {"name": "M1", "num_blocks": 16384, "block_size": 4096}},
    {"method": "bdev_uring_create", "params": {"name": "F0", "filename": "$dir/file.img", "block_size": 512}}]},
  {"subsystem": "nbd_server", "config": [
    {"method": "nbd_server_set_options", "params": {"handshake_timeout_ms": $handshake_ms}},
    {"method": "nbd_server_create_export", "params": {"name": "disk", "bdev_name": "M0", "description": "a disk in memory"}},
    {"method": "nbd_server_create_export", "params": {"name": "readonly", "bdev_name": "M0", "read_only": true}},
    {"method": "nbd_server_create_export", "params": {"name": "4k", "bdev_name": "M1"}},
    {"method": "nbd_server_create_export", "params": {"name": "file", "bdev_name": "F0"}},
    {"method": "nbd_server_add_listener", "params": {"path": "$dir/nbd.sock", "export": "disk"}},
    {"method": "nbd_server_create_export", "params": {"name": "secret", "bdev_name": "M0", "allow": [{"tls_cn": "alice"}]}},
    {"method": "nbd_server_add_listener", "params": {"path": "$dir/newstyle.sock", "dialect": "newstyle"}},
    {"method": "nbd_server_add_listener", "params": {"path": "$dir/oldstyle.sock", "dialect": "oldstyle", "export": "disk"}},
    {"method": "nbd_server_add_listener", "params": {"path": "$dir/1997.sock", "dialect": "1997", "export": "disk"}},
    {"method": "nbd_server_add_listener", "params": {"path": "$dir/tls.sock", "tls": "require",
     "tls_certificates": "$dir/pki", "tls_verify_peer": true}},
    {"method": "nbd_server_add_listener", "params": {"traddr": "127.0.0.1", "trsvcid": "$tls_port", "tls": "allow",
     "tls_certificates": "$dir/pki", "export": "disk"}},
    {"method": "nbd_server_add_listener", "params": {"traddr": "127.0.0.1", "trsvcid": "$port"}}]}]}
JSON

: >target.log
# is_ready N: the program has said so N times.
is_ready() { [[ $(grep -c ' ready ' target.log) == "$1" ]]; }
start() {
  ./rnbd-target -c target.json -r rpc.sock -m 0x1 >>target.log 2>&1 &
  target=$!
  wait_while "$target" "ready" is_ready "$1" || { cat target.log; exit 1; }
}

# What hangs has failed.
hang=$(limit 600)
for tool in nbdinfo nbdcopy qemu-img qemu-io fio; do
  eval "$tool() { timeout -k 5 $hang /usr/bin/$tool \"\$@\"; }"
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
tls() { echo "nbds+unix:///$2?socket=$dir/tls.sock&tls-certificates=$dir/$1"; } # CERTIFICATES EXPORT

lists_exports() {
  nbdinfo --list --json "$(tcp '')" >list.json
  /usr/bin/python3 - <<'PY'
import json, os
exports = {e["export-name"]: e for e in json.load(open("list.json"))["exports"]}
assert sorted(exports) == ["4k", "disk", "file", "readonly"], exports
assert exports["disk"]["description"] == "a disk in memory", exports["disk"]
assert exports["4k"]["block_size_minimum"] == 4096 and exports["disk"]["block_size_minimum"] == 512
for name, e in exports.items():
    assert e["export-size"] == 64 << 20 and e["can_multi_conn"] and e["can_flush"], e
    assert e["is_read_only"] == (name == "readonly"), e
    assert e["can_trim"] == e["can_zero"] == e["can_fua"] == e["can_fast_zero"] == (name != "readonly"), e
    assert e["can_df"], e
    assert e["contexts"] == ["base:allocation"], e
device = os.stat("file.img").st_dev
queues = [f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/{up}queue/rotational" for up in ("", "../")]
spins = any(os.path.exists(q) and open(q).read().strip() == "1" for q in queues)
assert exports["file"]["is_rotational"] == spins and not exports["disk"]["is_rotational"], (spins, exports)
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

maps_holes() {
  qemu-io -f raw -c 'discard 0 64M' -c 'write -P 1 1M 64k' -c 'write -P 2 32M 128k' -c flush "$(uri file)"
  qemu-img map --output=json -f raw "$(uri file)" >qemu.json
  nbdinfo --map --json "$(uri file)" >nbdinfo.json
  /usr/bin/python3 - <<'PY'
import json
wanted = [(0, 1 << 20, 0), (1 << 20, 65536, 1), ((1 << 20) + 65536, (31 << 20) - 65536, 0), (32 << 20, 131072, 1),
          ((32 << 20) + 131072, (32 << 20) - 131072, 0)]
qemu = [(e["start"], e["length"], int(e["data"])) for e in json.load(open("qemu.json"))]
libnbd = [(e["offset"], e["length"], int(e["type"] == 0)) for e in json.load(open("nbdinfo.json"))]
assert qemu == wanted, qemu
assert libnbd == wanted, libnbd
PY
  # A copy that looks for holes leaves them out.
  nbdcopy "$(uri file)" sparse.img
  cmp sparse.img file.img
  [[ $(stat -c %b sparse.img) -lt 1024 ]]
}

encrypts() {
  nbdinfo "$(tls alice disk)" | grep -q 'TLS'
  nbdcopy --connections=2 "$dir/random.img" "$(tls alice disk)"
  rm -f back.img
  nbdcopy --connections=4 "$(tls bob disk)" "$dir/back.img"
  cmp random.img back.img
  # TCP, where nobody needs a certificate, with GnuTLS by libnbd and by qemu.
  nbdcopy "nbds://localhost:$tls_port/disk?tls-certificates=$dir/pki" back.img
  cmp random.img back.img
  qemu-img compare --object "tls-creds-x509,id=t,endpoint=client,dir=$dir/pki" --image-opts \
    "driver=raw,file.driver=file,file.filename=$dir/random.img" \
    "driver=nbd,host=localhost,port=$tls_port,export=disk,tls-creds=t"
  nbdcopy "nbd://127.0.0.1:$tls_port/disk" back.img
  cmp random.img back.img
}

lets_in_whom_it_knows() {
  nbdinfo --size "$(tls alice secret)"
  fails nbdinfo --size "$(tls bob secret)"
  fails nbdinfo --size "$(tls mallory disk)"
  # Without a certificate, and without TLS.
  fails nbdinfo --size "$(tls pki disk)"
  fails nbdinfo --size "nbd+unix:///disk?socket=$dir/tls.sock"
  fails nbdinfo --size "$(uri secret)"
  nbdinfo --list "$(uri '')" | grep -q disk
  if nbdinfo --list "$(uri '')" | grep secret; then return 1; fi
}

refuses_qemu_writes() {
  fails qemu-io -f raw -c 'write 0 4k' "$(uri readonly)"
  qemu-io -r -f raw -c 'read 0 4k' "$(uri readonly)"
}

through_nbdkit() {
  nbdkit -U "$dir/kit.sock" --foreground nbd uri="$(tcp disk)" shared=true &
  local kit=$! rc=0
  wait_while "$kit" "nbdkit" listens "$dir/kit.sock" && nbdcopy random.img "nbd+unix:///?socket=$dir/kit.sock" && nbdcopy "nbd+unix:///?socket=$dir/kit.sock" kit.img &&
    cmp random.img kit.img || rc=$?
  kill "$kit"
  wait "$kit" || true
  return $rc
}

serves_standard_input() { # PROGRAM
  cat >single.json <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "S0", "num_blocks": 131072, "block_size": 512}}]},
  {"subsystem": "nbd_server", "config": [
    {"method": "nbd_server_create_export", "params": {"name": "a", "bdev_name": "S0"}},
    {"method": "nbd_server_create_export", "params": {"name": "b", "bdev_name": "S0", "read_only": true}}]}]}
JSON
  /usr/bin/python3 - "$1" <<'PY'
import sys
import nbd
def single(export, wanted=None):
    h = nbd.NBD()
    if wanted is not None:
        h.set_export_name(wanted)
    h.connect_command([f"./{sys.argv[1]}", "-c", "single.json", "-r", "single.sock", "-L", "ERROR", "--single", export])
    return h
h = single("a")
assert h.get_size() == 64 << 20 and not h.is_read_only()
data = open("random.img", "rb").read()
for at in range(0, len(data), 1 << 20):
    h.pwrite(data[at:at + (1 << 20)], at)
assert b"".join(h.pread(1 << 20, at) for at in range(0, len(data), 1 << 20)) == data
h.shutdown()
assert single("b").is_read_only() and single("", "b").is_read_only()
try:
    single("a", "none")
except nbd.Error as e:
    assert "none" in str(e) or "unknown" in str(e), e
else:
    raise AssertionError("an export that is not there")
PY
  local rc=0
  timeout -k 5 "$hang" "./$1" -c single.json -r single.sock --single a </dev/null 2>single.log || rc=$?
  [[ $rc == 1 ]] && grep -q 'standard input is no connected socket' single.log
}

is_activated() {
  # What systemd does: it listens, and starts the program with the sockets from descriptor 3 on.
  cat >activated.json <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_null_create", "params": {"name": "N0", "num_blocks": 2048, "block_size": 512}}]},
  {"subsystem": "nbd_server", "config": [
    {"method": "nbd_server_create_export", "params": {"name": "a", "bdev_name": "N0"}},
    {"method": "nbd_server_add_listener", "params": {"activated": "nbd"}},
    {"method": "nbd_server_add_listener", "params": {"activated": "0"}}]}]}
JSON
  /usr/bin/python3 - "$rpc" "$hang" <<'PY'
import importlib.util, os, socket, subprocess, sys
import nbd
first, second = socket.socket(socket.AF_UNIX), socket.socket()
first.bind("activated.sock")
second.bind(("127.0.0.1", 0))
for s in (first, second):
    s.listen()
def environment():
    os.dup2(first.fileno(), 13), os.dup2(second.fileno(), 14)
    os.dup2(13, 3), os.dup2(14, 4)
    for fd in (3, 4):
        os.set_inheritable(fd, True)
command = 'export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=other:nbd; exec ./rnbd-target -c activated.json -r activated-rpc.sock'
program = subprocess.Popen(["/bin/sh", "-c", command], preexec_fn=environment, pass_fds=(3, 4))
for s in (first, second):
    s.close()
# Clients that come before the program is ready wait in the socket.
h = nbd.NBD()
h.connect_uri("nbd+unix:///a?socket=activated.sock")
assert h.get_size() == 1 << 20
h.shutdown()
spec = importlib.util.spec_from_file_location("rpc", sys.argv[1])
rpc = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rpc)
def call(method, **params):
    return rpc.call("activated-rpc.sock", method, params or None)
listeners = call("nbd_server_get_listeners")["result"]
(tcp,) = [l for l in listeners if l["activated"] == "nbd"]
h = nbd.NBD()
h.connect_uri(f"nbd://127.0.0.1:{tcp['trsvcid']}/a")
h.shutdown()
for name, text in (("nbd", "was taken by another listener"), ("7", "has passed 2 sockets")):
    answer = call("nbd_server_add_listener", activated=name)
    assert text in answer["error"]["message"], answer
saved = call("framework_get_config", name="nbd_server")["result"]
assert {"activated": "nbd", "dialect": "auto"} in [c["params"] for c in saved], saved
program.terminate()
assert program.wait(float(sys.argv[2])) == 0
assert os.path.exists("activated.sock"), "the file is systemd's"
PY
  # libnbd's tools start servers so.
  sed -i '/"activated": "nbd"/d' activated.json
  nbdinfo --size -- [ ./rnbd-target -c activated.json -r activated-rpc.sock ]
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

is_loaded() { "$rpc" rpc.sock nbd_server_get_connections | grep '"num_write_ops": *[1-9]'; }
ends_in_order() {
  fio --name=load --ioengine=nbd --uri="$(uri file)" --rw=randwrite --bs=16k --iodepth=32 --size=48M --time_based \
    --runtime="$hang" >fio.log 2>&1 &
  local fio=$! rc=0
  wait_while "$fio" "load" is_loaded || { cat fio.log; return 1; }
  kill -TERM "$target"
  wait "$target" || rc=$?
  target=''
  # Without its server the load fails, or it ends by itself.
  kill "$fio" 2>/dev/null
  wait "$fio"
  [[ $rc == 0 && ! -e nbd.sock && ! -e newstyle.sock && ! -e tls.sock ]] || { echo "status $rc"; ls; return 1; }
  ! grep 'giving up' target.log
}

# without_terminal: a program that was started by nohup stays when the terminal goes, and has no work because of it; another
# ends in order.
without_terminal() {
  local pid rc=0
  (trap '' HUP && exec ./rnbd-target -r nohup.sock >nohup.log 2>&1) &
  pid=$!
  wait_while $pid "an answer" "$rpc" nohup.sock rpc_get_methods || return
  kill -HUP $pid
  wait_while $pid "that it rests" rests $pid || return
  kill -TERM $pid
  wait $pid || { echo "status $?"; return 1; }
  # Whoever runs this may have been started by nohup, too.
  env --default-signal=HUP ./rnbd-target -r hup.sock >hup.log 2>&1 &
  pid=$!
  wait_while $pid "an answer" "$rpc" hup.sock rpc_get_methods || return
  kill -HUP $pid
  wait_for "its end" is_gone $pid || { kill -KILL $pid; return 1; }
  wait $pid || rc=$?
  [[ $rc == 0 ]] && grep -q 'shutting down' hup.log && [[ ! -e hup.sock ]] || { echo "status $rc"; cat hup.log; return 1; }
}
is_gone() { [[ ! -e /proc/$1 || $(awk '{print $3}' "/proc/$1/stat") == Z ]]; }
# rests PID: every thread sleeps, in 20 looks.
rests() {
  local i
  for ((i = 0; i < 20; i++)); do
    [[ -z $(awk '{print $3}' "/proc/$1/task/"*/stat | grep -v S) ]] || return 1
    sleep 0.02
  done
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
check "holes are known to qemu-img map, nbdinfo and nbdcopy" maps_holes
check "TLS: libnbd and qemu, with and without certificates of clients" encrypts
check "TLS: who is let in" lets_in_whom_it_knows
check "nbdkit's nbd plugin" through_nbdkit
check "fio verify 4k" verifies "$(uri disk)" 4k 32
check "fio verify 512k, TCP" verifies "$(tcp disk)" 512k 32
check "fio verify 4k on a file" verifies "$(uri file)" 4k 32
check "fio trim" trims "$(uri disk)"
CALLS=$(grep -c nbd_server_ target.json) HANDSHAKE_MS=$handshake_ms check "libnbd: handshakes, refusals, limits, control" /usr/bin/python3 "$checks" "$dir" "$port" "$target" "$rpc"
check "one client on standard input" serves_standard_input rnbd-target
if [[ -x $dir/rnbd-initiator ]]; then
  check "one client on standard input of rnbd-initiator" serves_standard_input rnbd-initiator
else
  echo "skipped: standard input of rnbd-initiator, which is not built"
fi
check "sockets of systemd's" is_activated
check "the terminal goes" without_terminal
rc=0
survives_a_kill >check.log 2>&1 || rc=$?
passed "a flushed copy survives kill -9, and the socket is taken over" $rc
ends_in_order >check.log 2>&1 || rc=$?
passed "the end with I/O in flight" $rc
echo "$passed passed, 0 failed"
