#!/bin/bash
# The recipe of docs/access.md: RNBD through WireGuard, so that an address is the holder of a key. A client with a key maps its
# disk and verifies what it writes; somebody in the same network without one, who gives himself the client's address,
# gets nothing. In network namespaces of its own, with the kernel's WireGuard or, without that, wireguard-go.
# Usage: scripts/test-wireguard.sh [BIN_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
[[ $(id -u) == 0 ]] || { echo "network namespaces need root"; exit 77; }
if [[ ${IN_NAMESPACE:-} != 1 ]]; then
  scripts/packages.sh iproute2 procps wireguard-go wireguard-tools
  IN_NAMESPACE=1 exec unshare -n -- "$0" "$@"
fi
. scripts/lib.sh
bin=$(realpath "${1:-build/release}")

dir=$(mktemp -d "${TMPDIR:-/tmp}/rnbd-wireguard.XXXXXX")
spaces=() tunnels=() target='' server='' client='' eve=''
cleanup() {
  for pid in $target ${tunnels[@]+"${tunnels[@]}"}; do kill -KILL "$pid" 2>/dev/null || true; done
  for pid in ${spaces[@]+"${spaces[@]}"}; do kill -KILL "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  rm -f "/var/run/wireguard/wgs$$.sock" "/var/run/wireguard/wgc$$.sock"
  rm -rf "$dir"
}
trap cleanup EXIT
fail() { echo "FAILED: $*"; tail -n 20 "$dir"/*.log; exit 1; }

# space VARIABLE: a network namespace; the process that holds it.
space() {
  unshare -n -- sleep infinity &
  printf -v "$1" %s $!
  spaces+=("${!1}")
  is_apart() { [[ $(readlink "/proc/$1/ns/net") != $(readlink /proc/self/ns/net) ]]; }
  wait_while "${!1}" "a namespace" is_apart "${!1}"
  in_space "${!1}" ip link set lo up
}
in_space() { nsenter -t "$1" -n -- "${@:2}"; }

# This namespace is the network between them: a bridge.
ip link set lo up
ip link add net0 type bridge
ip link set net0 up
space server
space client
space eve
n=1
for pid in "$server" "$client" "$eve"; do
  ip link add "port$n" type veth peer name net
  ip link set net netns "$pid"
  ip link set "port$n" master net0 up
  in_space "$pid" ip address add "10.78.0.$n/24" dev net
  in_space "$pid" ip link set net up
  n=$((n + 1))
done

# tunnel SPACE DEVICE: a WireGuard device.
kind=kernel
tunnel() {
  local space=$1 device=$2
  if in_space "$space" ip link add "$device" type wireguard 2>/dev/null; then return; fi
  [[ -c /dev/net/tun ]] || { echo "neither the kernel's WireGuard nor /dev/net/tun is here"; exit 77; }
  kind=wireguard-go
  nsenter -t "$space" -n -- wireguard-go -f "$device" >"$dir/$device.log" 2>&1 &
  tunnels+=($!)
  wait_while $! "$device" in_space "$space" wg show "$device"
}
tunnel "$server" "wgs$$"
tunnel "$client" "wgc$$"
echo "WireGuard: $kind"
for end in s c; do
  (umask 077 && wg genkey >"$dir/$end.key")
  wg pubkey <"$dir/$end.key" >"$dir/$end.pub"
done
in_space "$server" wg set "wgs$$" listen-port 51820 private-key "$dir/s.key" peer "$(cat "$dir/c.pub")" allowed-ips 10.79.0.2/32
in_space "$client" wg set "wgc$$" private-key "$dir/c.key" peer "$(cat "$dir/s.pub")" allowed-ips 10.79.0.1/32 endpoint 10.78.0.1:51820
in_space "$server" ip address add 10.79.0.1/24 dev "wgs$$"
in_space "$client" ip address add 10.79.0.2/24 dev "wgc$$"
in_space "$server" ip link set "wgs$$" up
in_space "$client" ip link set "wgc$$" up
# What comes by another device than the answer would go by is nobody's: else others could send as the client.
# shellcheck disable=SC2016 # for that shell
in_space "$server" sh -c 'for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 1 >"$f"; done'

cat >"$dir/target.json" <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 131072, "block_size": 512}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_create_export", "params": {"device_path": "disk0", "bdev_name": "Malloc0",
      "allow": [{"session": "host1", "addr": "10.79.0.2"}]}},
    {"method": "rnbd_create_listener", "params": {"traddr": "10.79.0.1", "provider": "soft-roce"}}]}]}
JSON
nsenter -t "$server" -n -- "$bin/rnbd-target" -c "$dir/target.json" -r "$dir/rpc.sock" -m 0x1 >"$dir/target.log" 2>&1 &
target=$!
wait_while "$target" "ready" grep -q ' ready ' "$dir/target.log"

# load SPACE SOURCE LOG: writes and verifies for a while.
load() {
  in_space "$1" timeout -k 5 "$(limit 300)" "$bin/rtrs-load" 10.79.0.1 disk0 -p soft-roce --src "$2" --session host1 -m 0x2 \
    -w verify -o 4096 -q 8 -t 3 >"$dir/$3.log" 2>&1
}
load "$client" 10.79.0.2 client || fail "the client with the key"
grep -E 'IOPS|iops' "$dir/client.log" || true
before=$(in_space "$server" wg show "wgs$$" transfer | awk '{print $2 + $3}')
((before > 1 << 20)) || fail "what was written did not go through the tunnel: $before bytes"

# Without a key: from an address of her own, and as the client.
in_space "$eve" ip address add 10.79.0.2/32 dev lo
in_space "$eve" ip route add 10.79.0.1/32 via 10.78.0.1
for source in 10.78.0.3 10.79.0.2; do
  fails load "$eve" "$source" "eve-$source" || fail "eve got the disk as $source"
done
load "$client" 10.79.0.2 again || fail "the client, after eve"

kill -TERM "$target"
wait "$target" || fail "the target ends with an error"
target=''
echo "5 passed, 0 failed"
