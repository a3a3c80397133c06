#!/bin/bash
# Speed of rnbd-initiator with NBD and ublk beside the kernel's client, same server and RAM disk, interleaved. ROUNDS=, ….
# timeout: 900
# by hand: it measures
# shellcheck shell=bash
# shellcheck source=scripts/vm/lib.sh
source "$VM_DIR/lib.sh"
# shellcheck source=scripts/vm/perf.sh
source "$VM_DIR/perf.sh"

# SERVER=target takes rnbd-target with a malloc bdev in place of the kernel's server.
setup_rxe 1
if [[ ${SERVER:-kernel} == kernel ]]; then
  setup_ram 1 64
  must dd if=/dev/zero of=/dev/ram0 bs=1M status=none oflag=direct count=64
  load_rnbd_server always_invalidate=Y
  REMOTE_PATH=/dev/ram0
else
  cat >/run/target.json <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 131072, "block_size": 512}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_create_export", "params": {"device_path": "Malloc0", "bdev_name": "Malloc0"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "10.9.1.1"}}]}]}
JSON
  start_target /run/target.json -m 0x1
  REMOTE_PATH=Malloc0
fi
load_rnbd_client

up_kernel() { PERF_DEV=$(map_device perf "$(path_spec 1)" "$REMOTE_PATH" ro) || die "map $REMOTE_PATH"; }
down_kernel() {
  must unmap_device "$PERF_DEV"
  must wait_for test ! -e /sys/class/rtrs-client/perf
}
up_initiator() {
  initiator_config 1 '"access_mode": "ro"' >/run/initiator.json
  start_initiator /run/initiator.json -m "${CORES:-0x2}"
  must irpc bdev_get_bdevs '{"name": "Remote0", "timeout": 150000}' >/dev/null
  PERF_DEV=$(start_export "$1" Remote0) || die "export by $1"
}
down_initiator() {
  must stop_export "$1" "$PERF_DEV"
  kill -TERM "$INITIATOR_PID"
  wait "$INITIATOR_PID" || fail "the initiator ended with an error"
  INITIATOR_PID=
  # The server forgets the session before the kernel's client comes.
  sleep 1
}
configs=(kernel)
for export in nbd ublk; do
  need_export "$export" || continue
  eval "up_$export() { up_initiator $export; }; down_$export() { down_initiator $export; }"
  configs+=("$export")
done
compare "${ROUNDS:-3}" "${SECONDS_PER_ROW:-4}" "${configs[@]}"
ok "measured"
[[ ${SERVER:-kernel} == kernel ]] || stop_target
finish
