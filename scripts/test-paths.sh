#!/bin/bash
# rnbd-initiator with two paths to rnbd-target over soft-roce, in network namespaces of its own: what happens when one of
# them is cut, and when the target is killed, under a load that verifies. How long the longest request took is reported.
# Usage: scripts/test-paths.sh [BIN_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
[[ $(id -u) == 0 ]] || { echo "network namespaces need root"; exit 77; }
# The namespace has no way out to fetch anything.
[[ ${IN_NAMESPACE:-} == 1 ]] || scripts/packages.sh fio iproute2 procps
# Everything below runs in a namespace that goes with this process.
[[ ${IN_NAMESPACE:-} == 1 ]] || IN_NAMESPACE=1 exec unshare -n -- "$0" "$@"
. scripts/lib.sh
bin=$(realpath "${1:-build/release}")
rpc=$(realpath scripts/vm/rpc.py)

dir=$(mktemp -d "${TMPDIR:-/tmp}/rnbd-paths.XXXXXX")
far='' target='' initiator='' load=''
cleanup() {
  for pid in $load $initiator $target $far; do kill -KILL "$pid" 2>/dev/null || true; done
  rm -rf "$dir"
}
trap cleanup EXIT
cp "$bin/rnbd-target" "$bin/rnbd-initiator" "$dir/"
cd "$dir"
passed=0
passed() { passed=$((passed + 1)); echo "ok: $*"; }
fail() { echo "FAILED: $*"; tail -n 30 target.log initiator.log; exit 1; }

ip link set lo up
unshare -n -- sleep infinity &
far=$!
on_far() { nsenter -t "$far" -n -- "$@"; }
is_apart() { [[ $(readlink "/proc/$far/ns/net") != $(readlink /proc/self/ns/net) ]]; }
wait_while "$far" "the other namespace" is_apart
on_far ip link set lo up
for n in 1 2; do
  ip link add "near$n" type veth peer name "far$n"
  ip link set "far$n" netns "$far"
  ip address add "10.77.$n.1/24" dev "near$n"
  ip link set "near$n" up
  on_far ip address add "10.77.$n.2/24" dev "far$n"
  on_far ip link set "far$n" up
done

cat >target.json <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_uring_create", "params": {"name": "F0", "filename": "$dir/disk.img", "block_size": 512}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_create_export", "params": {"device_path": "disk", "bdev_name": "F0"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "10.77.1.2", "provider": "soft-roce"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "10.77.2.2", "provider": "soft-roce"}}]}]}
JSON
cat >initiator.json <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_rnbd_map", "params": {"name": "R0", "sessname": "s", "device_path": "disk", "provider": "soft-roce",
      "paths": ["ip:10.77.1.1@ip:10.77.1.2", "ip:10.77.2.1@ip:10.77.2.2"], "reconnect_delay_sec": 1,
      "ack_timeout_ms": 1000, "connect_timeout_sec": 2}}]},
  {"subsystem": "nbd_server", "config": [
    {"method": "nbd_server_create_export", "params": {"name": "disk", "bdev_name": "R0"}},
    {"method": "nbd_server_add_listener", "params": {"path": "$dir/nbd.sock"}}]}]}
JSON
truncate -s 64M disk.img
: >target.log
: >initiator.log
start_target() { # N: it says "ready" for the Nth time
  nsenter -t "$far" -n -- ./rnbd-target -c target.json -r target.sock -m 0x1 >>target.log 2>&1 &
  target=$!
  is_ready() { [[ $(grep -c ' ready ' target.log) == "$1" ]]; }
  wait_while "$target" "the target" is_ready "$1" || fail "the target does not start"
}
start_target 1
./rnbd-initiator -c initiator.json -r initiator.sock -m 0x2 >initiator.log 2>&1 &
initiator=$!
wait_while "$initiator" "the initiator" grep -q ' ready ' initiator.log || fail "the initiator does not start"

# path_is N STATE, of the Nth path.
path_is() {
  "$rpc" initiator.sock bdev_rnbd_get_sessions | python3 -c "
import json, sys
(session,) = json.load(sys.stdin)
states = {p['path'].split('@')[0]: p['state'] for p in session['paths']}
sys.exit(states['10.77.$1.1'] != '$2')"
}
both_connected() { path_is 1 connected && path_is 2 connected; }
is_lost() { ! path_is "$1" connected; }
wait_while "$initiator" "both paths" both_connected || fail "two paths"

fio --name=load --ioengine=nbd --uri="nbd+unix:///disk?socket=$dir/nbd.sock" --rw=randrw --bs=4k --iodepth=8 --size=32M \
  --verify=crc32c --verify_fatal=1 --verify_backlog=64 --time_based --runtime=100000 --rate_iops=500,500 \
  --output=load.json --output-format=json >fio.err 2>&1 &
load=$!
written() { "$rpc" initiator.sock nbd_server_get_connections | python3 -c "
import json, sys; print(sum(c['num_write_ops'] for c in json.load(sys.stdin)))"; }
moved() { [[ $(written) -gt $(($1 + 200)) ]]; }
moves() { local before; before=$(written); wait_while "$load" "the load to go on" moved "$before" || fail "$1: $(cat fio.err)"; passed "$1"; }
moves "the load begins"

echo "one path is cut"
on_far ip link set far1 down
wait_while "$initiator" "the path to be given up" is_lost 1 || fail "the path is not given up"
moves "the other path carries the load"
on_far ip link set far1 up
wait_while "$initiator" "the path to come back" both_connected || fail "the path does not come back"
moves "both carry it"

echo "the target stands still"
kill -STOP "$target"
wait_while "$initiator" "both paths to be given up" is_lost 1 || fail "the paths are not given up"
kill -CONT "$target"
wait_while "$initiator" "the paths to come back" both_connected || fail "the paths do not come back"
moves "after the pause"

echo "the target is killed"
kill -KILL "$target"
wait "$target" 2>/dev/null || true
wait_while "$initiator" "both paths to be given up" is_lost 2 || fail "the paths are not given up"
start_target 2
wait_while "$initiator" "the paths to come back" both_connected || fail "the paths do not come back"
moves "after the restart"

kill -INT "$load"
# Interrupted, it says 128; what counts is whether a request or a block was wrong.
wait "$load" || true
grep -q '"error" : 0' load.json || fail "the load: $(cat fio.err load.json)"
load=''
passed "no request failed, and every block is right"
grep -q 'has acknowledged nothing for too long' initiator.log || fail "the reason is not told"
passed "the log says why a path was given up"
python3 - <<'PY'
import json
text = open("load.json").read()
job = json.loads(text[text.index("{"):])["jobs"][0]
assert job["error"] == 0, job["error"]
for kind in ("read", "write"):
    print(f"{kind}: {job[kind]['total_ios']} requests, the longest {job[kind]['clat_ns']['max'] / 1e9:.2f} s")
PY
end() {
  for pid in "$initiator" "$target"; do
    kill -TERM "$pid"
    wait "$pid" || fail "a program does not end well"
  done
  initiator='' target=''
}
end

# Both on one host: the shipped configuration's listener, and the addresses that come to mind. "late": the initiator first.
one_host() { # ADDRESS early|late
  echo "one host, $1, the target comes $2"
  sed -e 's/10.77.1.2/0.0.0.0/' -e '/10.77.2.2/d' -e 's/\("provider": "soft-roce"}}\),$/\1]}]}/' target.json >any.json
  sed -e "s/\"paths\": .*\], /\"paths\": [\"ip:$1\"], /" initiator.json >near.json
  : >target.log
  : >initiator.log
  if [[ $2 == late ]]; then
    ./rnbd-initiator -c near.json -r initiator.sock -m 0x2 >initiator.log 2>&1 &
    initiator=$!
    wait_while "$initiator" "a first attempt" grep -q 'not open' initiator.log || fail "no attempt"
  fi
  ./rnbd-target -c any.json -r target.sock -m 0x1 >target.log 2>&1 &
  target=$!
  wait_while "$target" "the target" grep -q ' ready ' target.log || fail "the target does not start"
  if [[ $2 == early ]]; then
    ./rnbd-initiator -c near.json -r initiator.sock -m 0x2 >initiator.log 2>&1 &
    initiator=$!
  fi
  wait_while "$initiator" "the device" grep -q 'NBD export created' initiator.log || fail "the device does not come"
  wait_while "$initiator" "the device" grep -q 'device open' initiator.log || fail "the device does not open"
  timeout -k 5 "$(limit 300)" fio --name=near --ioengine=nbd --uri="nbd+unix:///disk?socket=$dir/nbd.sock" --rw=randrw \
    --bs=64k --iodepth=8 --size=32M --verify=crc32c --verify_fatal=1 >near.log 2>&1 || fail "$(cat near.log)"
  grep -h 'READ:\|WRITE:' near.log
  end
  passed "one host, $1, the target comes $2"
}
for address in 127.0.0.1 10.77.1.1; do
  one_host "$address" early
  one_host "$address" late
done
echo "$passed passed, 0 failed"
