# Functions for scenarios, which run as root in the guest: source "$VM_DIR/lib.sh".
# shellcheck shell=bash
#
# run.sh provides VM_DIR (scripts/vm), REPO_DIR, BIN_DIR (programs under test), TEST_DIR (tests and examples), OUT_DIR (files
# to keep on the host), VM_SCENARIO, VM_SERIES_BOOTED ("6.12", "7.2") and TIME_SCALE. A scenario calls check/must/fail and ends with
# `finish`.

RNBD_CTL=/sys/devices/virtual/rnbd-client/ctl
# On the host another run may have one, too.
if [[ ${VM_NET:-} == tap ]]; then TARGET_SOCK=${TARGET_SOCK:-$HOST_JOB_DIR/target.sock}; fi
TARGET_SOCK=${TARGET_SOCK:-/run/rnbd-target.sock}
TARGET_LOG=$OUT_DIR/target.log
TARGET_PID=
LOAD_PID=
INITIATOR_PID=
LOAD_DEV=
CHECKS_PASSED=0
CHECKS_FAILED=0
SKIPPED=
trap _on_exit EXIT

# ---- checks -------------------------------------------------------------------------------------------------------

_uptime() { cut -d' ' -f1 /proc/uptime; }

# say TEXT: a line of progress, with the guest's uptime (the clock of its kernel messages).
say() { printf '[%8.2f] %s\n' "$(_uptime)" "$*"; }

# ok TEXT, fail TEXT: count one check and print its line.
ok() {
  CHECKS_PASSED=$((CHECKS_PASSED + 1))
  say "ok   $*"
}
fail() {
  CHECKS_FAILED=$((CHECKS_FAILED + 1))
  say "FAIL $*"
}

# check TEXT COMMAND...: passes if the command succeeds; its output is shown only when it fails. The command runs in a
# subshell, so it cannot set variables. Returns the command's status.
check() {
  local text=$1 out rc=0
  shift
  out=$("$@" 2>&1) || rc=$?
  if [[ $rc == 0 ]]; then
    ok "$text"
  else
    fail "$text (status $rc): $*"
    [[ -z $out ]] || tail -n 40 <<<"$out" | sed 's/^/    | /'
  fi
  return "$rc"
}

# check_fails TEXT COMMAND...: passes if the command fails.
check_fails() {
  local text=$1
  shift
  if "$@" >/dev/null 2>&1; then fail "$text: succeeded, but should not: $*"; else ok "$text"; fi
}

# check_eq TEXT GOT WANTED: passes if the strings are alike.
check_eq() {
  if [[ $2 == "$3" ]]; then ok "$1"; else fail "$1: got \"$2\", wanted \"$3\""; fi
}

# must COMMAND...: for what the rest of the scenario cannot do without; runs here (it may set variables), says nothing
# on success, ends the scenario on failure.
must() {
  local rc=0
  "$@" || rc=$?
  [[ $rc == 0 ]] || die "$* (status $rc)"
}

# die TEXT: a failed check that ends the scenario, with the latest kernel messages.
die() {
  fail "$*"
  dmesg | tail -n 15 | sed 's/^/    dmesg| /'
  finish
}

# skip TEXT: ends the scenario when something that it needs is not there; says so aloud. What was checked before counts; if
# that is nothing the scenario is skipped, which is no pass: status 77.
skip() {
  SKIPPED=yes
  say "SKIP $*"
  finish
}

# finish: the last line of the scenario. Exits 0 if checks were made and none failed, 77 if it was skipped instead.
finish() {
  local rc=1
  trap - EXIT
  [[ $CHECKS_FAILED == 0 ]] || _dead_gsi
  _stop_leftovers
  echo "$CHECKS_PASSED passed, $CHECKS_FAILED failed"
  [[ $CHECKS_FAILED == 0 && $CHECKS_PASSED -gt 0 ]] && rc=0
  [[ $CHECKS_FAILED == 0 && $CHECKS_PASSED == 0 && -n $SKIPPED ]] && rc=77
  # Without a number, exit in the EXIT trap would repeat the status that led there.
  exit "$rc"
}

# rxe's QP 1, by which connections are made, goes to the error state for good when a message's address handle was destroyed
# before its turn came (`rxe_req.c`: no `rxe_get_av`), as by a connection manager that gives up: then no connection can be
# made over that device any more, whoever asks. run.sh looks for this line.
_dead_gsi() {
  rdma resource show qp 2>/dev/null | grep 'type GSI' | grep -v 'state RTS' | sed "s/^/rxe's QP 1 is of no use any more: /"
}

_on_exit() {
  fail "the scenario ended early, in or after: $BASH_COMMAND"
  finish
}

_stop_leftovers() {
  [[ -z $TARGET_PID ]] || on_server "kill -KILL $TARGET_PID" 2>/dev/null
  [[ -z $LOAD_PID ]] || kill -KILL "$LOAD_PID" 2>/dev/null
  [[ -z $INITIATOR_PID ]] || kill -KILL "$INITIATOR_PID" 2>/dev/null
  return 0
}

# TIME_SCALE: how much slower than usual this machine is, at least 1. run.sh passes the host's; an emulated CPU of a busy host
# may be slower still, so the guest looks for itself: 500 ms are usual for this loop.
_measure_speed() {
  local start=${EPOCHREALTIME/./} i scale
  for ((i = 0; i < 20000; i++)); do :; done
  scale=$(((${EPOCHREALTIME/./} - start + 499999) / 500000))
  ((scale <= ${TIME_SCALE:-1})) || TIME_SCALE=$scale
}
_measure_speed

# wait_for COMMAND...: polls until the command succeeds. Silent. A scenario waits for states, not for seconds: the limit is
# only there to end what hangs.
HANG_LIMIT=$((150 * TIME_SCALE))
wait_for() {
  local end=$((SECONDS + HANG_LIMIT))
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < end)) || return 1
    sleep 0.1
  done
}

# shellcheck source=scripts/vm/net.sh
source "$VM_DIR/net.sh"

# ---- the kernel's RNBD --------------------------------------------------------------------------------------------

# load_rnbd_client: the client's modules have no parameters.
load_rnbd_client() { must modprobe rnbd_client; }

# load_rnbd_server [PARAMETER=VALUE...]: of rnbd_server (dev_search_path=, port_nr=) or rtrs_server (always_invalidate=,
# sess_queue_depth=, max_chunk_size=). Unloads first, so that it can be called again with others.
load_rnbd_server() {
  local p rtrs=() rnbd=()
  unload_rnbd_server
  for p in "$@"; do
    case $p in
      dev_search_path=* | port_nr=*) rnbd+=("$p") ;;
      always_invalidate=* | sess_queue_depth=* | max_chunk_size=*) rtrs+=("$p") ;;
      *) die "load_rnbd_server: no parameter \"$p\"" ;; # modprobe would only warn
    esac
  done
  must modprobe rtrs_server "${rtrs[@]}"
  must modprobe rnbd_server "${rnbd[@]}"
}
unload_rnbd_server() {
  [[ ! -d /sys/module/rnbd_server ]] || must rmmod rnbd_server
  [[ ! -d /sys/module/rtrs_server ]] || must rmmod rtrs_server
}

# map_device SESSNAME PATHS DEVICE_PATH [ACCESS_MODE [OPTION...]]: maps with the kernel client and prints /dev/rnbdN.
# PATHS: "path=…" words, as path_spec prints them (after "dest_port=N " if it is not 1234), or "" for a session that
# exists. On failure prints the kernel's
# reason to stderr, and fails with the errno's name in the last line of it.
map_device() {
  local sessname=$1 paths=$2 device_path=$3 mode=${4:-rw} link error
  shift $(($# < 4 ? $# : 4))
  # shellcheck disable=SC2116 # the write is what may fail, not the text
  if ! error=$(echo "sessname=$sessname $paths device_path=$device_path access_mode=$mode $*" 2>&1 >"$RNBD_CTL/map_device"); then
    dmesg | tail -n 8 | sed 's/^/    dmesg| /' >&2
    echo "map of $device_path on $sessname: ${error##*: }" >&2
    return 1
  fi
  link=$RNBD_CTL/devices/${device_path//\//!}@$sessname
  wait_for test -e "$link" || { echo "map of $device_path: no $link" >&2; ls "$RNBD_CTL/devices" >&2; return 1; }
  link=/dev/$(basename "$(readlink -f "$link")")
  wait_for test -b "$link" || { echo "map of $device_path: no $link" >&2; return 1; }
  [[ -z ${SAFE_POLICY:-} ]] || echo "$SAFE_POLICY" >"/sys/class/rtrs-client/$sessname/mpath_policy" || return 1
  echo "$link"
}
# Linux 7 preempts the kernel by default (PREEMPT_LAZY), and rtrs_client's default policy, min-inflight, cannot stand that: it
# marks the paths that it has tried in a list of the CPU, without holding on to the CPU. A task that comes in between finds its
# only path marked, and its request fails with ECONNABORTED (-103), whoever the server is. The policy round-robin has no such
# list. SAFE_POLICY= (run.sh -o) leaves the default.
[[ ${VM_SERIES_BOOTED%%.*} -lt 7 || -n ${SAFE_POLICY+set} ]] || SAFE_POLICY=round-robin

# unmap_device DEV [normal|force]; waits until the device is gone.
unmap_device() {
  local name=${1##*/} how=${2:-normal}
  echo "$how" >"/sys/block/$name/rnbd/unmap_device" || return
  wait_for test ! -e "/sys/block/$name"
}

# dev_state DEV: the client's word for it: open, closed, ….
dev_state() { cat "/sys/block/${1##*/}/rnbd/state"; }

# path_state SESSNAME I: "connected" or "disconnected", of the path over link I; path_rdma SESSNAME I: its counters,
# "READS READ_BYTES WRITES WRITE_BYTES INFLIGHT FAILOVERS".
_path_dir() { echo "/sys/class/rtrs-client/$1/paths/ip:$(client_addr "$2")@ip:$(server_addr "$2")"; }
path_state() { cat "$(_path_dir "$1" "$2")/state"; }
path_rdma() { cat "$(_path_dir "$1" "$2")/stats/rdma"; }
path_is() { [[ $(path_state "$1" "$2") == "$3" ]]; }

# reconnect_path SESSNAME I: has the client try now. By itself it tries 30 s after the path died, and every 30 s then.
reconnect_path() { echo 1 >"$(_path_dir "$1" "$2")/reconnect"; }

# server_disconnect SESSNAME I: the kernel's server ends the path over link I.
server_disconnect() { echo 1 >"/sys/class/rtrs-server/$1/paths/ip:$(client_addr "$2")@ip:$(server_addr "$2")/disconnect"; }

# ---- the target under test ----------------------------------------------------------------------------------------

# need_target: ends the scenario as failed if the program was not built.
need_target() {
  [[ -x $BIN_DIR/$TARGET_PROGRAM ]] || die "$BIN_DIR/$TARGET_PROGRAM is missing: cargo build --release, or -o BIN_DIR=…"
}

# start_target CONFIG [ARGUMENT...]: rnbd-target in the background on the server's end of the network, its pid in
# TARGET_PID, its output in $OUT_DIR/target.log, until its RPC socket answers. A scenario may name another program of ours
# in TARGET_PROGRAM: all have the same options.
TARGET_PROGRAM=rnbd-target
start_target() {
  local config=$1
  shift
  need_target
  if [[ $VM_NET == tap ]]; then
    sed "s#/scratch/#$HOST_JOB_DIR/scratch/#g" "$config" >"$OUT_DIR/target.json"
    rm -f "$OUT_DIR/target.status"
    TARGET_PID=$(on_server "cd '$HOST_JOB_DIR/out'
      { '$BIN_DIR/$TARGET_PROGRAM' -c target.json -r '$TARGET_SOCK' ${*@Q} & echo \$! >target.pid
        wait \$!; echo \$? >target.status; } >>target.log 2>&1 </dev/null &
      until [ -s target.pid ]; do sleep 0.05; done; cat target.pid; rm target.pid")
  else
    # shellcheck disable=SC2046 # a list of words
    $(_server_prefix) "$BIN_DIR/$TARGET_PROGRAM" -c "$config" -r "$TARGET_SOCK" "$@" >>"$TARGET_LOG" 2>&1 </dev/null &
    TARGET_PID=$!
  fi
  if ! wait_for _target_up_or_dead || ! target_lives; then
    tail -n 20 "$TARGET_LOG" | sed 's/^/    target| /'
    die "$TARGET_PROGRAM did not come up with $config"
  fi
}
_target_up_or_dead() { ! target_lives || rpc rpc_get_methods; }

# server_out_dir: the name that $OUT_DIR has on the server's side.
server_out_dir() { if [[ $VM_NET == tap ]]; then echo "$HOST_JOB_DIR/out"; else echo "$OUT_DIR"; fi; }

# provider_of I: the RDMA provider of the listener on link I. counter NAME: the sum of a counter over the target's devices.
provider_of() {
  rpc rnbd_get_listeners | python3 -c 'import json, sys
print(*[l["provider"] for l in json.load(sys.stdin) if l["traddr"] == sys.argv[1]])' "$(server_addr "$1")"
}
counter() {
  rpc rnbd_get_devices | python3 -c 'import json, sys
print(sum(d["counters"].get(sys.argv[1], 0) for d in json.load(sys.stdin)))' "$1"
}

# target_lives: the process is there. target_proc FILE: prints a file of its /proc folder. target_fds: how many
# descriptors it has open.
target_lives() { on_server "[ -e /proc/$TARGET_PID ] && [ \"\$(awk '{print \$3}' /proc/$TARGET_PID/stat)\" != Z ]"; }
target_proc() { on_server "cat /proc/$TARGET_PID/$1"; }
target_fds() { on_server "find /proc/$TARGET_PID/fd -mindepth 1 | wc -l"; }

# stop_target: SIGTERM; a check of its own that the target ends, with status 0.
stop_target() {
  local pid=$TARGET_PID rc=0
  on_server "kill -TERM $pid"
  if [[ $VM_NET == tap ]]; then
    wait_for test -s "$OUT_DIR/target.status" || on_server "kill -KILL $pid"
    rc=$(cat "$OUT_DIR/target.status")
  else
    wait_for _is_dead "$pid" || kill -KILL "$pid"
    wait "$pid" || rc=$?
  fi
  TARGET_PID=
  check_eq "the target stops on SIGTERM with status 0" "$rc" 0
}

# check_asleep TEXT [SECONDS]: the target has nothing to do and sleeps; check_pid_asleep TEXT PID [SECONDS]: a program on this
# side. What is judged is the state of its threads: one that polls is running whenever one looks. CPU time is reported.
check_asleep() { _judge_asleep "$1" "$(on_server "$_look_asleep" - "$TARGET_PID" "${2:-10}")"; }
check_pid_asleep() { _judge_asleep "$1" "$(bash -c "$_look_asleep" - "$2" "${3:-10}")"; }
# Prints how often of 40 looks a thread was running, and the CPU time used, in ticks of 10 ms.
# shellcheck disable=SC2016 # for another shell
_look_asleep='
ticks() { awk "{print \$14 + \$15}" "/proc/$1/stat"; }
running=0 before=$(ticks "$1")
for ((i = 0; i < 40; i++)); do
  sleep "$(($2 / 40)).$(printf %03d $(($2 * 1000 / 40 % 1000)))"
  ! grep -qs "^State:.R" /proc/"$1"/task/*/status || running=$((running + 1))
done
echo "$running $(($(ticks "$1") - before))"'
_judge_asleep() {
  local running ticks
  read -r running ticks <<<"$2"
  say "$1: running in $running of 40 looks, $ticks ticks of 10 ms"
  check "$1: it sleeps" test "$running" -le 10
}
_is_dead() { [[ ! -e /proc/$1 || $(awk '{print $3}' "/proc/$1/stat") == Z ]]; }

# kill_target: SIGKILL, as a crash.
kill_target() {
  on_server "kill -KILL $TARGET_PID"
  wait "$TARGET_PID" 2>/dev/null
  TARGET_PID=
}

# rpc METHOD [JSON_PARAMS]: prints the result; status 1 and the error object on stderr if it is refused.
rpc() {
  if [[ $VM_NET == tap ]]; then
    on_server "'$VM_DIR/rpc.py' '$TARGET_SOCK' ${*@Q}"
  else
    "$VM_DIR/rpc.py" "$TARGET_SOCK" "$@"
  fi
}

# shellcheck source=scripts/vm/initiator.sh
source "$VM_DIR/initiator.sh"

# ---- storage ------------------------------------------------------------------------------------------------------

# setup_ram N SIZE_MIB: /dev/ram0 … /dev/ram<N-1>.
setup_ram() { must modprobe brd "rd_nr=$1" "rd_size=$(($2 * 1024))"; }

# setup_scratch [SIZE_MIB]: a real file system (ext4, so O_DIRECT and hole punching work) at /scratch, on a sparse
# loop file in tmpfs. The guest's other folders are an overlay, which has no O_DIRECT on every kernel. With a target on
# the host it is a folder of the host instead.
setup_scratch() {
  if [[ $VM_NET == tap ]]; then
    must mkdir -p /run/job/scratch
    must ln -sfn /run/job/scratch /scratch
    return
  fi
  must modprobe loop
  must mkdir -p /scratch
  truncate -s "${1:-512}M" /run/scratch.img
  must mkfs.ext4 -q -F /run/scratch.img
  must mount -o loop /run/scratch.img /scratch
}

# fio_verify DEV BS [SIZE_MIB [IODEPTH [JOBS]]]: random reads and writes with crc32c in every block, each job in its own
# part of the device (SIZE_MIB each, default 8), then everything is read back and checked. Fails on the first bad block.
# Extra fio options may be put in FIO_EXTRA.
fio_verify() {
  local dev=$1 bs=$2 size=${3:-8} depth=${4:-32} jobs=${5:-2}
  # shellcheck disable=SC2086 # FIO_EXTRA is a list of options
  fio --name=verify --eta=never --filename="$dev" --direct=1 --ioengine=libaio --rw=randrw --bs="$bs" --iodepth="$depth" \
    --numjobs="$jobs" --size="${size}M" --offset_increment="${size}M" --thread --group_reporting \
    --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=0 --randseed="${FIO_SEED:-1}" ${FIO_EXTRA:-}
}

# start_load DEV BS [IODEPTH]: fio in the background, random reads and verified writes over 8 MiB again and again, until
# stop_load, which returns fio's status (non-zero if a single I/O failed or a block was wrong). load_moves: it has
# completed I/O since it was asked.
start_load() {
  LOAD_DEV=$1
  fio --name=load --eta=never --filename="$1" --direct=1 --ioengine=libaio --rw=randrw --bs="$2" --iodepth="${3:-8}" --size=8M \
    --verify=crc32c --verify_fatal=1 --verify_backlog=64 --loops=1000000 --thread >"$OUT_DIR/load.log" 2>&1 &
  LOAD_PID=$!
}
_io_count() { awk '{print $1 + $5}' "/sys/block/${1##*/}/stat"; }
load_moves() {
  local before
  before=$(_io_count "$LOAD_DEV")
  wait_for _load_moved "$before"
}
_load_moved() { kill -0 "$LOAD_PID" && (($(_io_count "$LOAD_DEV") > $1 + 32)); }
stop_load() {
  kill -0 "$LOAD_PID" || { cat "$OUT_DIR/load.log"; return 1; }
  kill -INT "$LOAD_PID"
  wait_for _is_dead "$LOAD_PID" || { kill -KILL "$LOAD_PID"; echo "fio hung"; return 1; }
  ! grep -E 'verify:|err= *[1-9]|error=|io_u error' "$OUT_DIR/load.log"
}
