#!/bin/bash
# 20 map/unmap cycles leak neither descriptors nor memory nor sessions; memory without a session stays under 64 MiB.
# timeout: 600
# long: 6.12 6.12/soft
source "$VM_DIR/lib.sh"
setup_net 1
cat >/run/target.json <<'JSON'
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 131072, "block_size": 512}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_create_export", "params": {"device_path": "Malloc0", "bdev_name": "Malloc0"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "10.9.1.1"}}]}]}
JSON
start_target /run/target.json
load_rnbd_client
rss_kib() { target_proc status | awk '/^VmRSS/{print $2}'; }
fds() { target_fds; }
# The last connection's completion queue goes a moment after its session.
at_most_fds() { (($(fds) <= $1)); }
no_session() { [[ $(rpc rnbd_get_sessions | tr -d ' \n') == "[]" ]]; }

say "resident memory without a session: $(rss_kib) KiB"
check "under 64 MiB without a session" test "$(rss_kib)" -lt 65536
cycle() {
  local dev
  dev=$(map_device "leak$1" "$(path_spec 1)" Malloc0) || return 1
  dd if=/dev/zero of="$dev" bs=64k count=16 oflag=direct status=none || return 1
  dd if="$dev" of=/dev/null bs=64k count=16 iflag=direct status=none || return 1
  unmap_device "$dev" && wait_for no_session
}
# Rings are touched page by page until they have wrapped once; so are soft-roce's receive buffers and its table of keys,
# 2 MiB each, as bursts and chance will have it. A leak goes on in every round, that ends.
dev=$(map_device burst "$(path_spec 1)" Malloc0) || die "map"
must fio_verify "$dev" 512k 16 >/dev/null
must unmap_device "$dev"
for n in $(seq 1 20); do must cycle "$n"; done
for round in 1 2 3 4; do
  fds0=$(fds) rss0=$(rss_kib) failed=0
  for n in $(seq 1 20); do cycle "$round-$n" || failed=$((failed + 1)); done
  grown=$(($(rss_kib) - rss0))
  check_eq "20 cycles succeed" "$failed" 0
  say "descriptors $fds0 -> $(fds), resident $rss0 -> $((rss0 + grown)) KiB"
  check "no descriptor is leaked" wait_for at_most_fds "$fds0"
  [[ $grown -ge 128 ]] || break
done
check "no memory is leaked (at most 128 KiB more)" test "$grown" -lt 128
check "no session is left" no_session
check "under 64 MiB after them" test "$(rss_kib)" -lt 65536
stop_target
finish
