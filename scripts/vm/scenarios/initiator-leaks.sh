#!/bin/bash
# 50 map, export, use, stop, unmap cycles of each export leave no device, session, descriptor or memory behind.
# timeout: 900
# Has not run yet.
# ci: none
source "$VM_DIR/lib.sh"
setup_remote 1
echo '{"subsystems": []}' >/run/initiator.json
start_initiator /run/initiator.json
map="{\"name\": \"Remote0\", \"sessname\": \"s1\", \"device_path\": \"$REMOTE_PATH\",
  \"paths\": [{\"src\": \"$(local_addr 1)\", \"dst\": \"$(remote_addr 1)\"}]}"
rss_kib() { awk '/^VmRSS/{print $2}' "/proc/$INITIATOR_PID/status"; }
fds() { find "/proc/$INITIATOR_PID/fd" -mindepth 1 | wc -l; }
no_session() { [[ $(rpc rnbd_get_sessions | tr -d ' \n') == "[]" ]]; }
cycle() {
  local dev
  irpc bdev_rnbd_map "$map" >/dev/null && dev=$(start_export "$1" Remote0) || return 1
  dd if=/dev/zero of="$dev" bs=64k count=16 oflag=direct status=none && dd if="$dev" of=/dev/null bs=64k count=16 iflag=direct status=none || return 1
  stop_export "$1" "$dev" && [[ $(cat "/sys/block/${dev##*/}/size" 2>/dev/null || echo 0) == 0 ]] || return 1
  irpc bdev_rnbd_unmap '{"name": "Remote0"}' >/dev/null && wait_for 10 no_session
}
for export in nbd ublk; do
  need_export $export || continue
  say "$export"
  for n in $(seq 1 5); do cycle $export || die "cycle $n of $export"; done
  fds0=$(fds) rss0=$(rss_kib) failed=0
  for n in $(seq 1 50); do cycle $export || failed=$((failed + 1)); done
  check_eq "50 cycles succeed" "$failed" 0
  say "descriptors $fds0 -> $(fds), resident $rss0 -> $(rss_kib) KiB"
  check_eq "no descriptor is leaked" "$(fds)" "$fds0"
  check "no memory is leaked (at most 1 MiB more)" test $(($(rss_kib) - rss0)) -lt 1024
done
stop_initiator
stop_target
finish
