# The hostile table: a client that lies, over rxe, against the target with static and with rotating keys.
# timeout: 1500
# long: 6.12 6.12/soft
# shellcheck shell=bash
# shellcheck source=scripts/vm/lib.sh
source "$VM_DIR/lib.sh"

# run.sh -o HOSTILE_CASE=… selects cases by a part of their names, -o HOSTILE_MODES=… some of the three targets.
CLIENT=$BIN_DIR/hostile-client
[[ -x $CLIENT ]] || die "$CLIENT is missing: cargo build --release -p test-client"
HALF_OPEN_MS=3000
DELAY_MS=400
SESSIONS=8
CONNECTIONS=200

# Client addresses beside the link's own, for sessions of many paths.
ADDRESSES=20
more_addresses() {
  local i mac_s
  mac_s=$(cat /sys/class/net/d1/address)
  for ((i = 3; i < 2 + ADDRESSES; i++)); do
    must ip addr add "10.9.1.$i/24" dev d1
    [[ $VM_NET == rxe ]] || continue
    must ip neigh replace "10.9.1.$i" dev d0 lladdr "$mac_s" nud permanent
    must ip route replace "10.9.1.$i/32" dev d0 src "$(server_addr 1)" table 100
  done
}
addresses() { seq -s, -f "10.9.1.%g" 2 $((1 + ADDRESSES)); }

# config KEY_OPTION...: a target with the table's devices. The queue depth is no power of two, so that ids beyond it
# can be said.
config() {
  cat <<CONFIG
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "m512", "num_blocks": 16384, "block_size": 512}},
    {"method": "bdev_malloc_create", "params": {"name": "m4k", "num_blocks": 2048, "block_size": 4096}},
    {"method": "bdev_malloc_create", "params": {"name": "witness", "num_blocks": 16384, "block_size": 512}},
    {"method": "bdev_malloc_create", "params": {"name": "slow-base", "num_blocks": 16384, "block_size": 512}},
    {"method": "bdev_delay_create", "params": {"name": "slow", "base_bdev_name": "slow-base",
      "avg_read_latency": ${DELAY_MS}000, "p99_read_latency": ${DELAY_MS}000,
      "avg_write_latency": ${DELAY_MS}000, "p99_write_latency": ${DELAY_MS}000}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_set_options", "params": {"queue_depth": 24, "max_io_size": 61440, "max_hdr_size": 4096,
      "half_open_timeout_ms": $HALF_OPEN_MS, "max_sessions": $SESSIONS, "max_connections": $CONNECTIONS, "max_share_percent": 100, $1}},
    {"method": "rnbd_create_export", "params": {"device_path": "m512", "bdev_name": "m512"}},
    {"method": "rnbd_create_export", "params": {"device_path": "m4k", "bdev_name": "m4k"}},
    {"method": "rnbd_create_export", "params": {"device_path": "witness", "bdev_name": "witness"}},
    {"method": "rnbd_create_export", "params": {"device_path": "slow", "bdev_name": "slow"}},
    {"method": "rnbd_create_listener", "params": {"adrfam": "ipv4", "traddr": "$(server_addr 1)", "trsvcid": "1234"}}]}
]}
CONFIG
}

# left: what the target holds: sessions, and the RDMA objects of its device. Empty sessions, and as many objects as
# after the first case, are right.
left() {
  rpc rnbd_get_sessions
  [[ $VM_NET != rxe ]] || rdma resource show rxe0
}
descriptors() { target_fds; }
settled() { [[ $(left) == "$2" ]] && (($(descriptors) <= $1)); }

# table NAME KEY_OPTIONS: one target, the whole table, and a look at what it is left with.
table() {
  local before held
  config "$2" >"/run/$1.json"
  start_target "/run/$1.json" -m 0x3
  # Whatever is made once comes with the first connections.
  check "$1: the first case" "$CLIENT" "$(server_addr 1)" -r "$TARGET_SOCK" --src "$(addresses)" --case conn_reversed
  before=$(descriptors) held=$(left)
  say "$1:"
  "$CLIENT" "$(server_addr 1)" -r "$TARGET_SOCK" --src "$(addresses)" --case "${HOSTILE_CASE:-}" \
    --half-open-ms $HALF_OPEN_MS --delay-ms $DELAY_MS --limits $SESSIONS,$CONNECTIONS | tee "$OUT_DIR/$1.txt"
  check_eq "$1: the table" "${PIPESTATUS[0]}" 0
  check "$1: no session, descriptor or RDMA object is left behind" wait_for settled "$before" "$held" || left
  check "$1: the target runs" target_lives
  check_fails "$1: an error or a leak in the target's log" grep -aE ' ERROR |not deregistered' "$TARGET_LOG"
  stop_target
}

setup_net 1
more_addresses
for mode in ${HOSTILE_MODES:-one-message invalidate rotating}; do
  case $mode in
    one-message) table "$mode" '"one_message_reads": true' ;;
    invalidate) table "$mode" '"one_message_reads": false' ;;
    rotating) table "$mode" '"rotate_rkeys": true' ;;
    *) die "HOSTILE_MODES: no mode named \"$mode\"" ;;
  esac
done
finish
