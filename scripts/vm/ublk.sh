# A program with ublk disks under test. Sourced by the ublk scenarios, after lib.sh.
# shellcheck shell=bash
#
# It is rnbd-initiator with disks of local bdevs.

UBLK_SOCK=/run/ublk.sock
UBLK_LOG=$OUT_DIR/ublk.log
UBLK_PID=
UBLK_CPUMASK=${UBLK_CPUMASK:-0x3}

# need_ublk: ends the scenario as skipped where the kernel has no driver.
need_ublk() {
  modprobe ublk_drv 2>/dev/null || skip "no ublk_drv in kernel $(uname -r)"
  must wait_for test -c /dev/ublk-control
  UBLK_PROGRAM=$BIN_DIR/rnbd-initiator
  [[ -x $UBLK_PROGRAM ]] || die "$UBLK_PROGRAM is missing: cargo build --release, or -o BIN_DIR=…"
}

# start_ublk [ARGUMENT...]: in the background, its pid in UBLK_PID, until its RPC socket answers.
start_ublk() {
  "$UBLK_PROGRAM" -r "$UBLK_SOCK" -m "$UBLK_CPUMASK" "$@" >>"$UBLK_LOG" 2>&1 </dev/null &
  UBLK_PID=$!
  if ! wait_for _ublk_up_or_dead || _is_dead "$UBLK_PID"; then
    tail -n 20 "$UBLK_LOG" | sed 's/^/    ublk| /'
    die "$UBLK_PROGRAM did not come up"
  fi
}
_ublk_up_or_dead() { _is_dead "$UBLK_PID" || urpc framework_wait_init; }

# urpc METHOD [JSON_PARAMS]: prints the result; status 1 and the error object on stderr if it is refused.
urpc() { "$VM_DIR/rpc.py" "$UBLK_SOCK" "$@"; }

# refused TEXT WORD METHOD PARAMS: a check that the call is refused, and that the refusal has WORD in it.
refused() {
  local text=$1 word=$2 error
  shift 2
  if error=$(urpc "$@" 2>&1 >/dev/null); then
    fail "$text: not refused"
  elif [[ $error != *"$word"* ]]; then
    fail "$text: no \"$word\" in: $error"
  else
    ok "$text"
  fi
}

# start_disk BDEV ID [JSON_MEMBERS]: makes /dev/ublkbID. stop_disk ID: returns when the kernel has forgotten it.
start_disk() {
  urpc ublk_start_disk "{\"bdev_name\": \"$1\", \"ublk_id\": $2${3:+, $3}}" >/dev/null && wait_for test -b "/dev/ublkb$2"
}
stop_disk() { urpc ublk_stop_disk "{\"ublk_id\": $1}" >/dev/null && [[ ! -e /sys/block/ublkb$1 && ! -e /sys/class/ublk-char/ublkc$1 ]]; }

# stop_ublk: SIGTERM, and a check that it ends, with status 0. kill_ublk: SIGKILL, as a crash.
stop_ublk() {
  local rc=0
  kill -TERM "$UBLK_PID"
  wait_for _is_dead "$UBLK_PID" || kill -KILL "$UBLK_PID"
  wait "$UBLK_PID" || rc=$?
  UBLK_PID=
  check_eq "the program stops on SIGTERM with status 0" "$rc" 0
}
kill_ublk() {
  kill -KILL "$UBLK_PID"
  wait "$UBLK_PID" 2>/dev/null
  UBLK_PID=
}

# finish_ublk: finish, without leaving the program behind.
finish_ublk() {
  [[ -z $UBLK_PID ]] || kill -KILL "$UBLK_PID"
  finish
}

ublk_fds() { find "/proc/$UBLK_PID/fd" -mindepth 1 | wc -l; }
# queue_attr ID NAME: of the block layer.
queue_attr() { cat "/sys/block/ublkb$1/queue/$2"; }
