#!/bin/bash
# Speed of rnbd-target beside the kernel's server, same RAM disk and client, interleaved. ROUNDS=, SECONDS_PER_ROW=, CONFIGS=.
# timeout: 900
# by hand: it measures
# shellcheck shell=bash
# shellcheck source=scripts/vm/lib.sh
source "$VM_DIR/lib.sh"
# shellcheck source=scripts/vm/perf.sh
source "$VM_DIR/perf.sh"

setup_rxe 1
setup_ram 1 64
load_rnbd_client

up_kernel() {
  load_rnbd_server always_invalidate="$1"
  PERF_DEV=$(map_device perf "$(path_spec 1)" /dev/ram0 ro) || die "map /dev/ram0"
}
down_map() {
  must unmap_device "$PERF_DEV"
  must wait_for test ! -e /sys/class/rtrs-client/perf
}
down_kernel() {
  down_map
  unload_rnbd_server
}
up_kernel-inv-Y() { up_kernel Y; }
up_kernel-inv-N() { up_kernel N; }
down_kernel-inv-Y() { down_kernel; }
down_kernel-inv-N() { down_kernel; }

# up_target POLICY [ONE_MESSAGE]: the same RAM disk through the uring bdev.
up_target() {
  cat >/run/target.json <<JSON
{"subsystems": [
 {"subsystem": "bdev", "config": [
  {"method": "bdev_uring_create", "params": {"name": "Ram0", "filename": "/dev/ram0"}}]},
 {"subsystem": "rnbd", "config": [
  {"method": "rnbd_set_options", "params": {"one_message_reads": ${2:-true}}},
  {"method": "rnbd_create_export", "params": {"device_path": "dev/ram0", "bdev_name": "Ram0"}},
  {"method": "rnbd_create_listener", "params": {"traddr": "10.9.1.1"}}]}]}
JSON
  start_target /run/target.json -m "${CORES:-0x2}"
  [[ $1 == adaptive ]] || must rpc framework_set_idle_policy "{\"policy\": \"$1\"}" >/dev/null
  PERF_DEV=$(map_device perf "$(path_spec 1)" /dev/ram0 ro) || die "map"
}
down_target() {
  down_map
  kill -TERM "$TARGET_PID"
  wait "$TARGET_PID" || fail "the target ended with an error"
  TARGET_PID=
}
up_target-adaptive() { up_target adaptive; }
up_target-poll() { up_target poll; }
up_target-3messages() { up_target adaptive false; }
down_target-3messages() { down_target; }
down_target-adaptive() { down_target; }
down_target-poll() { down_target; }

# The blocks exist before they are read: an empty RAM disk has no pages to copy.
must dd if=/dev/zero of=/dev/ram0 bs=1M status=none oflag=direct count=64
read -r -a configs <<<"${CONFIGS:-kernel-inv-Y kernel-inv-N target-adaptive target-3messages target-poll}"
compare "${ROUNDS:-3}" "${SECONDS_PER_ROW:-4}" "${configs[@]}"
ok "measured"
finish
