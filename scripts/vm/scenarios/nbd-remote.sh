#!/bin/bash
# rnbd-initiator map path=nbd://…: disks of nbdkit, nbd-server and rnbd-target as kernel devices; servers killed under load.
# timeout: 900
# long: 6.12 6.1
source "$VM_DIR/lib.sh"
# SERVERS (run.sh -o): only these.
for tool in nbdkit nbd-server; do
  command -v $tool >/dev/null || die "$tool is missing: apt-get install nbdkit nbd-server"
done
ip link set lo up
setup_scratch 512
truncate -s 128M /scratch/disk.img
OUT=$OUT_DIR/map.out ERR=$OUT_DIR/map.err
cat >/run/nbd-server.conf <<CONF
[generic]
listenaddr = 127.0.0.1
port = 10809
[disk]
exportname = /scratch/disk.img
flush = true
fua = true
trim = true
CONF
cat >/run/target.json <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_uring_create", "params": {"name": "File0", "filename": "/scratch/disk.img", "block_size": 512}}]},
  {"subsystem": "nbd_server", "config": [
    {"method": "nbd_server_create_export", "params": {"name": "disk", "bdev_name": "File0"}},
    {"method": "nbd_server_add_listener", "params": {"traddr": "127.0.0.1", "trsvcid": "10809"}},
    {"method": "nbd_server_add_listener", "params": {"path": "/run/nbd.sock"}}]}]}
JSON

# start_server NAME, stop_server: on port 10809 of 127.0.0.1, each with the file /scratch/disk.img. kill_server: as a crash.
SERVER=
start_server() {
  SERVER=$1
  case $1 in
    nbdkit) nbdkit -i 127.0.0.1 -p 10809 -P /run/server.pid file /scratch/disk.img ;;
    # For each client it closes every descriptor that it might have, which emulated CPUs do for seconds.
    nbd-server) (ulimit -n 256 && nbd-server -C /run/nbd-server.conf -p /run/server.pid) ;;
    target) start_target /run/target.json && return ;;
  esac
  wait_for test -s /run/server.pid || die "$1 did not come up"
}
_kill() { # SIGNAL: nbd-server has a process for each client
  local pid pids
  pid=$(cat /run/server.pid)
  pids=$(pgrep -P "$pid")
  rm -f /run/server.pid
  # shellcheck disable=SC2086 # a list
  kill "-$1" "$pid" $pids 2>/dev/null
  for pid in $pid $pids; do wait_for _is_dead "$pid" || die "$SERVER does not end"; done
}
kill_server() { if [[ $SERVER == target ]]; then kill_target; else _kill KILL; fi; }
stop_server() { if [[ $SERVER == target ]]; then stop_target; else _kill TERM; fi; }

# start_map URI ARGUMENT...: in the background, until it is ready; its device in DEV.
start_map() {
  local uri=$1
  shift
  : >"$OUT"
  "$BIN_DIR/rnbd-initiator" map "path=$uri" reconnect_delay_sec=1 "$@" >"$OUT" 2>"$ERR" </dev/null &
  INITIATOR_PID=$!
  wait_for ready_or_dead
  DEV=$(sed -n 's/^ready: \([^ ]*\) .*/\1/p' "$OUT")
  [[ -n $DEV ]] || { cat "$OUT" "$ERR"; return 1; }
}
ready_or_dead() { _is_dead "$INITIATOR_PID" || said '^ready: '; }
said() { grep -q -- "$1" "$OUT"; }
times_said() { [[ $(grep -c -- "$1" "$OUT") == "$2" ]]; }
stop_map() {
  local rc=0
  kill -INT "$INITIATOR_PID"
  wait_for _is_dead "$INITIATOR_PID"
  wait "$INITIATOR_PID" || rc=$?
  INITIATOR_PID=
  check_eq "SIGINT ends it with status 0" "$rc" 0
  check_eq "no device is left" "$(cat "/sys/block/${DEV##*/}/size" 2>/dev/null || echo 0)" 0
}

use() {
  check_eq "its size" "$(blockdev --getsize64 "$DEV")" $((128 << 20))
  check "fio verify 4k" fio_verify "$DEV" 4k 2
  check "fio verify 512k" fio_verify "$DEV" 512k 16
  check "blkdiscard -z of 8 MiB" blkdiscard -z -o 0 -l 8M "$DEV"
  echo 3 >/proc/sys/vm/drop_caches
  check "they read as zeroes" cmp -n $((8 << 20)) "$DEV" /dev/zero
  check "mkfs.ext4" mkfs.ext4 -q -F "$DEV"
  mkdir -p /mnt/n
  must mount "$DEV" /mnt/n
  check "copy a tree, flush it" bash -c "cp -r '$REPO_DIR/nbd-proto/src' /mnt/n && sync -f /mnt/n"
  check "fstrim" fstrim /mnt/n
  must umount /mnt/n
  check "fsck -fn is clean" e2fsck -fn "$DEV"
  echo 3 >/proc/sys/vm/drop_caches
  must mount -o ro "$DEV" /mnt/n
  check "the files are the same" diff -r "$REPO_DIR/nbd-proto/src" /mnt/n/src
  must umount /mnt/n
}

# The server is killed under load and comes back, twice.
survive() {
  local n
  start_load "$DEV" 4k
  check "I/O moves" load_moves
  for n in 1 2; do
    kill_server
    check "the loss is told" wait_for times_said 'I/O waits' "$n"
    sleep "$n"
    start_server "$SERVER"
    check "the return is told" wait_for times_said 'connected again' "$n"
    check "I/O goes on" load_moves
  done
  check "no error reached fio, every block is right" stop_load
}

for server in ${SERVERS:-nbdkit nbd-server target}; do
  start_server $server
  for export in nbd ublk; do
    need_export $export || { say "no $export in this kernel"; continue; }
    say "$server as $export"
    case $export in nbd) as=(--nbd /dev/nbd0) ;; ublk) as=(--ublk) ;; esac
    uri=nbd://127.0.0.1/disk
    [[ $server != target || $export != ublk ]] || uri="nbd+unix:///disk?socket=/run/nbd.sock"
    # nbd-server may take longer than the 10 s that a handshake may take, see above.
    start_map "$uri" "${as[@]}" || { grep -q 'no end of the handshake' "$ERR" && start_map "$uri" "${as[@]}"; } ||
      { fail "map as $export"; continue; }
    ok "$DEV: $uri"
    use
    survive
    stop_map
  done
  stop_server
done
check "no I/O error in the kernel's log" sh -c '! dmesg | grep -E "I/O error|blk_update_request"'
finish
