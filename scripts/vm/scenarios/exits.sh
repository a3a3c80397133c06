#!/bin/bash
# Every way to end a kernel device, or the program that serves it, while a request of it cannot finish: signals, RPCs, crashes.
# timeout: 1800
# long: 6.12
source "$VM_DIR/lib.sh"
REMOTE=target
INITIATOR_SOCK=/run/exits.sock
PROGRAM=$BIN_DIR/rnbd-initiator SERVER_PID='' PROGRAM_PID='' READER_PID=''
LOG=$OUT_DIR/exits.log
call() { "$VM_DIR/rpc.py" "$INITIATOR_SOCK" "$@"; }
modprobe nbd nbds_max=4 || skip "no nbd in kernel $(uname -r)"
modprobe ublk_drv 2>/dev/null || skip "no ublk_drv in kernel $(uname -r)"
must wait_for test -c /dev/ublk-control

# The server of the remote disk: another program, over an NBD socket, which is stopped (SIGSTOP) to be away.
cat >/run/away.json <<'JSON'
{"subsystems": [
  {"subsystem": "bdev", "config": [{"method": "bdev_malloc_create", "params": {"name": "M", "num_blocks": 16384, "block_size": 512}}]},
  {"subsystem": "nbd_server", "config": [
    {"method": "nbd_server_create_export", "params": {"name": "m", "bdev_name": "M"}},
    {"method": "nbd_server_add_listener", "params": {"path": "/run/away.sock"}}]}]}
JSON
start_server() {
  "$BIN_DIR/rnbd-target" -c /run/away.json -r /run/away-rpc.sock >>"$OUT_DIR/away.log" 2>&1 </dev/null &
  SERVER_PID=$!
  wait_for "$VM_DIR/rpc.py" /run/away-rpc.sock framework_wait_init
}
stop_server() {
  [[ -z $SERVER_PID ]] || { kill -CONT "$SERVER_PID"; kill -KILL "$SERVER_PID"; wait "$SERVER_PID" 2>/dev/null; }
  SERVER_PID=
  rm -f /run/away.sock /run/away-rpc.sock*
}
start_program() {
  "$PROGRAM" -r "$INITIATOR_SOCK" >>"$LOG" 2>&1 </dev/null &
  PROGRAM_PID=$!
  wait_for call framework_wait_init
}
kill_program() {
  [[ -n $PROGRAM_PID ]] || return 0
  kill -KILL "$PROGRAM_PID" 2>/dev/null
  wait_for gone
  wait "$PROGRAM_PID" 2>/dev/null
  PROGRAM_PID=
}
# Not even a zombie's leader with a thread that waits.
gone() { _is_dead "$PROGRAM_PID" && [[ $(find "/proc/$PROGRAM_PID/task" -mindepth 1 -maxdepth 1 2>/dev/null | wc -l) -le 1 ]]; }

# make_bdev STUCK: the bdev is BDEV. get_stuck STUCK: from now on its requests do not finish.
make_bdev() {
  case $1 in
    pending | flush)
      # With a write cache, or nobody would flush it.
      truncate -s 8M /run/local.img
      call bdev_uring_create '{"name": "L", "filename": "/run/local.img", "block_size": 512}' >/dev/null &&
        call bdev_error_create '{"base_name": "L"}' >/dev/null && BDEV=EE_L
      ;;
    *) start_server && call bdev_nbd_create '{"name": "R", "uri": "nbd+unix:///m?socket=/run/away.sock"}' >/dev/null && BDEV=R ;;
  esac
}
get_stuck() {
  case $1 in
    pending) call bdev_error_inject_error '{"name": "EE_L", "io_type": "read", "error_type": "pending", "num": 1000}' >/dev/null ;;
    flush) call bdev_error_inject_error '{"name": "EE_L", "io_type": "flush", "error_type": "pending", "num": 1000}' >/dev/null ;;
    away | scan) kill -STOP "$SERVER_PID" ;;
    killed) kill -KILL "$SERVER_PID"; wait "$SERVER_PID" 2>/dev/null; SERVER_PID= ;;
  esac
}
start_disk() {
  case $1 in
    ublk) call ublk_create_target '{}' >/dev/null && call ublk_start_disk "{\"bdev_name\": \"$BDEV\", \"ublk_id\": 0}" >/dev/null ;;
    nbd) call nbd_start_disk "{\"bdev_name\": \"$BDEV\", \"nbd_device\": \"/dev/nbd0\", \"connections\": 1, \"dead_conn_timeout_sec\": 5}" >/dev/null ;;
  esac
}
stop_disk() {
  case $1 in
    ublk) call ublk_stop_disk "{\"ublk_id\": 0${2:-}}" ;;
    nbd) call nbd_stop_disk "{\"nbd_device\": \"/dev/nbd0\"${2:-}}" ;;
  esac
}
is_free() {
  case $1 in
    ublk) [[ ! -e /sys/block/ublkb0 ]] ;;
    nbd) [[ $(cat /sys/block/nbd0/size) == 0 && ! -e /sys/block/nbd0/pid ]] ;;
  esac
}
# One request that does not finish.
use_disk() {
  local dev=/dev/nbd0
  [[ $1 == nbd ]] || dev=/dev/ublkb0
  if [[ $2 == flush ]]; then
    dd if=/dev/zero of=$dev bs=4k count=1 oflag=direct conv=fsync,notrunc status=none 2>/dev/null &
  else
    dd if=$dev of=/dev/null bs=4k count=1 skip=9 iflag=direct status=none 2>/dev/null &
  fi
  READER_PID=$!
  # Flushes are not counted in /sys/block/…/inflight.
  wait_for waits "$READER_PID"
}
waits() { [[ $(awk '{print $3}' "/proc/$1/stat") == D ]] && sleep 0.3 && [[ $(awk '{print $3}' "/proc/$1/stat") == D ]]; }

# one KIND STUCK EXIT
one() {
  local kind=$1 stuck=$2 exit=$3 name="$1, $2, $3" starter=
  start_program
  make_bdev "$stuck" || { fail "$name: no bdev"; return; }
  if [[ $stuck == scan ]]; then
    get_stuck scan
    start_disk "$kind" 2>/dev/null &
    starter=$!
    wait_for grep -q '[1-9]' /sys/block/ublkb0/inflight
  else
    start_disk "$kind" || { fail "$name: no disk"; return; }
    get_stuck "$stuck"
    use_disk "$kind" "$stuck" || fail "$name: the request is not in flight"
  fi
  case $exit in
    int) kill -INT "$PROGRAM_PID" ;;
    twice) kill -INT "$PROGRAM_PID"; sleep 0.5; kill -INT "$PROGRAM_PID" ;;
    hup) kill -HUP "$PROGRAM_PID" ;;
    stop) wait_for_end stop_disk "$kind" ;;
    force) wait_for_end stop_disk "$kind" ', "force": true' ;;
    both) stop_disk "$kind" >/dev/null 2>&1 & sleep 0.5; wait_for_end stop_disk "$kind" ', "force": true' ;;
    late) check "$name: the start fails" wait_for _is_dead "$starter" ;;
    kill) kill -KILL "$PROGRAM_PID" ;;
    stopkill) stop_disk "$kind" >/dev/null 2>&1 & sleep 1; kill -KILL "$PROGRAM_PID" ;;
  esac
  case $exit in
    stop | force | both | late)
      check "$name: the device is free" wait_for is_free "$kind"
      kill -TERM "$PROGRAM_PID"
      ;;
    kill | stopkill) ;;
    *) check "$name: the device is free" wait_for is_free "$kind" ;;
  esac
  check "$name: the program ends" wait_for gone
  wait "$PROGRAM_PID" 2>/dev/null
  PROGRAM_PID=
  if [[ $exit == kill || $exit == stopkill ]]; then
    # A later run gets rid of what is left, or the kernel has.
    start_program
    if [[ $kind == ublk ]]; then
      call ublk_create_target '{}' >/dev/null
      [[ ! -e /sys/block/ublkb0 ]] || check "$name: the next run removes the device" stop_disk ublk
    elif ! is_free nbd; then
      stop_server
      make_bdev "$stuck"
      check "$name: the next run takes the device over" start_disk nbd
      check "$name: and removes it" stop_disk nbd
    fi
    check "$name: the device is free" wait_for is_free "$kind"
    kill_program
  fi
  [[ -z $READER_PID ]] || check "$name: its user hears of it" wait_for _is_dead "$READER_PID"
  [[ -z $starter ]] || check "$name: the call ends" wait_for _is_dead "$starter"
  READER_PID=
  kill_program
  stop_server
}
# What an RPC says does not matter here: that it answers does.
wait_for_end() {
  "$@" >/dev/null 2>&1 &
  local pid=$!
  wait_for _is_dead $pid || fail "no answer: $*"
}

# Lists of some of them, with commas, for a run by hand.
KINDS=${KINDS:-ublk,nbd} STUCK=${STUCK:-pending,flush,away,killed,scan} EXITS=${EXITS:-int,twice,hup,late,stop,force,both,kill,stopkill}
for kind in ${KINDS//,/ }; do
  for stuck in ${STUCK//,/ }; do
    [[ $kind-$stuck != nbd-scan ]] || continue
    for exit in ${EXITS//,/ }; do
      # A stop waits for the start. A kernel that is looking for partitions when the program is killed holds the device
      # for ever; that it does so for 10 s at most is "late".
      [[ $stuck-$exit != scan-@(stop|force|both|kill|stopkill) ]] || continue
      [[ $exit != late || $stuck == scan ]] || continue
      one "$kind" "$stuck" "$exit"
    done
  done
done
finish
