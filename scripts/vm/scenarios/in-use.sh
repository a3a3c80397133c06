#!/bin/bash
# A mounted device and the end of its program: Ctrl-C, a lost terminal, a crash and the same command again, a service's stop.
# timeout: 900
# long: 6.12
source "$VM_DIR/lib.sh"
PROGRAM=$BIN_DIR/rnbd-initiator OUT=$OUT_DIR/map.out PID='' MNT=/run/mnt
modprobe nbd nbds_max=4 || skip "no nbd in kernel $(uname -r)"
modprobe ublk_drv 2>/dev/null || skip "no ublk_drv in kernel $(uname -r)"
must wait_for test -c /dev/ublk-control
mkdir -p $MNT
cat >/run/server.json <<'JSON'
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "M", "num_blocks": 131072, "block_size": 512}},
    {"method": "bdev_malloc_create", "params": {"name": "N", "num_blocks": 131072, "block_size": 512}}]},
  {"subsystem": "nbd_server", "config": [
    {"method": "nbd_server_create_export", "params": {"name": "m", "bdev_name": "M"}},
    {"method": "nbd_server_create_export", "params": {"name": "n", "bdev_name": "N"}},
    {"method": "nbd_server_add_listener", "params": {"path": "/run/server.sock"}}]}]}
JSON
"$BIN_DIR/rnbd-target" -c /run/server.json -r /run/server-rpc.sock >"$OUT_DIR/server.log" 2>&1 </dev/null &
SERVER_PID=$!
must wait_for "$VM_DIR/rpc.py" /run/server-rpc.sock framework_wait_init

alive() { ! _is_dead "$PID"; }
said() { grep -q -- "$1" "$OUT"; }
said_or_dead() { _is_dead "$PID" || said "$1"; }
# map ARGUMENT...: until it is ready; the device in DEV.
map() {
  : >"$OUT"
  "$PROGRAM" map path=nbd+unix:///m?socket=/run/server.sock "$@" >>"$OUT" 2>&1 </dev/null &
  PID=$!
  wait_for said_or_dead '^ready: '
  DEV=$(sed -n 's/^ready: \([^ ]*\) .*/\1/p' "$OUT")
  [[ -n $DEV ]] || { cat "$OUT"; return 1; }
}
# ends TEXT: it ends, in order.
ends() {
  local rc=0
  check "$1: it ends" wait_for _is_dead "$PID"
  wait "$PID" || rc=$?
  check_eq "$1: status" $rc 0
}
# What the kernel still has of it, after a mount was torn off.
is_free() {
  case $DEV in
    /dev/ublk*) [[ ! -e /sys/block/${DEV#/dev/} ]] ;;
    *) [[ $(cat "/sys/block/${DEV#/dev/}/size") == 0 ]] ;;
  esac
}
writes() { echo "$1" >"${2:-$MNT}/$1" && sync -f "${2:-$MNT}/$1" && [[ $(cat "${2:-$MNT}/$1") == "$1" ]]; }

for kind in ublk nbd; do
  case $kind in ublk) use=(--ublk) ;; nbd) use=(--nbd /dev/nbd0) ;; esac
  say "$kind: Ctrl-C while it is mounted"
  must map "${use[@]}"
  must mkfs.ext4 -q -F "$DEV"
  must mount "$DEV" $MNT
  check "a file" writes one
  kill -INT "$PID"
  check "it says who uses it" wait_for said "$DEV is mounted on $MNT"
  check "and what ends it" said "Ctrl-C once more"
  for _ in 1 2 3; do
    kill -HUP "$PID"
    sleep 0.3
  done
  check "it goes on, without a terminal, too" alive
  check "the file system goes on" writes two
  must umount $MNT
  # Asked once, it has been; whoever asks again insists, and there is nobody to lose anything.
  kill -TERM "$PID"
  ends "$kind, unmounted"
  check "the device is gone" wait_for is_free

  say "$kind: a lost terminal"
  must map "${use[@]}"
  kill -HUP "$PID"
  ends "$kind, SIGHUP"
  check "the device is gone" wait_for is_free

  say "$kind: a crash, and the same command again"
  must map "${use[@]}"
  must mount "$DEV" $MNT
  check "both files are there" test "$(cat $MNT/one $MNT/two | xargs)" = "one two"
  before=$DEV
  kill -KILL "$PID"
  wait "$PID" 2>/dev/null
  must map "${use[@]}"
  check_eq "the same device" "$DEV" "$before"
  check "the file system goes on" writes three
  [[ $kind != ublk ]] || check_eq "there is one disk" "$(ls -d /sys/block/ublkb* | wc -l)" 1

  say "$kind: insisting"
  kill -INT "$PID"
  check "it says who uses it" wait_for said "$DEV is mounted on $MNT"
  kill -INT "$PID"
  check "it ends" wait_for _is_dead "$PID"
  wait "$PID" 2>/dev/null
  umount -l $MNT
  check "the device is gone once nobody has it" wait_for is_free
done

say "a service that is stopped and started"
cat >/run/service.json <<'JSON'
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_nbd_create", "params": {"name": "R", "uri": "nbd+unix:///m?socket=/run/server.sock"}},
    {"method": "bdev_nbd_create", "params": {"name": "S", "uri": "nbd+unix:///n?socket=/run/server.sock"}}]},
  {"subsystem": "ublk", "config": [
    {"method": "ublk_create_target", "params": {}},
    {"method": "ublk_start_disk", "params": {"bdev_name": "R", "ublk_id": 3}}]},
  {"subsystem": "nbd", "config": [{"method": "nbd_start_disk", "params": {"bdev_name": "S", "nbd_device": "/dev/nbd1"}}]}]}
JSON
service() {
  "$PROGRAM" -c /run/service.json -r /run/service.sock >>"$OUT_DIR/service.log" 2>&1 </dev/null &
  PID=$!
  wait_for "$VM_DIR/rpc.py" /run/service.sock framework_wait_init && wait_for test -b /dev/ublkb3
}
must service
must mkfs.ext4 -q -F /dev/ublkb3
must mount /dev/ublkb3 $MNT
check "a file" writes four
kill -TERM "$PID"
ends "the service"
check "its log says so" grep -q 'ublkb3 is mounted on .*kept for the next run' "$OUT_DIR/service.log"
check "the disk is there" test -b /dev/ublkb3
writes five &
writer=$!
must service
check "the next run takes it over: a write that waited" wait_for _is_dead $writer
wait $writer
check_eq "succeeds" $? 0
check "nothing is lost" test "$(cat $MNT/four $MNT/five | xargs)" = "four five"

say "the same, with writes that wait for a server"
must mkfs.ext4 -q -F /dev/nbd1
mkdir -p ${MNT}2
must mount /dev/nbd1 ${MNT}2
kill -STOP "$SERVER_PID"
writes six & writers=($!)
writes seven ${MNT}2 & writers+=($!)
busy() { grep -q '[1-9]' /sys/block/ublkb3/inflight && grep -q '[1-9]' /sys/block/nbd1/inflight; }
check "both devices have requests in flight" wait_for busy
kill -TERM "$PID"
ends "the service"
kill -CONT "$SERVER_PID"
must service
for writer in "${writers[@]}"; do
  check "what waited is done" wait_for _is_dead "$writer"
  wait "$writer"
  check_eq "without an error" $? 0
done
check "nothing is lost" test "$(cat $MNT/six ${MNT}2/seven | xargs)" = "six seven"
must umount ${MNT}2
must umount $MNT
kill -TERM "$PID"
ends "the service, unmounted"
check "the disk is gone" wait_for test ! -e /sys/block/ublkb3
kill -KILL "$SERVER_PID"
finish
