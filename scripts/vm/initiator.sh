# rnbd-initiator under test, and the disk that it maps. Sourced by lib.sh.
# shellcheck shell=bash
#
# REMOTE (run.sh -o) says who serves the disk: target (default), or kernel: rnbd_server; kernel-static is that without
# always_invalidate. The initiator is where the kernel client would be, on rdma-core over rxe (VM_NET=rxe). With
# VM_NET=soft the ends are swapped: the initiator is in the other network namespace, on soft-roce, and the server,
# which may be the kernel's, on rxe. So they are with VM_NET=tap, where the initiator is on the host (initiator-vhost).

REMOTE=${REMOTE:-target}
INITIATOR_SOCK=/run/rnbd-initiator.sock
INITIATOR_LOG=$OUT_DIR/initiator.log
REMOTE_CONFIG=/run/remote.json

# local_addr I, remote_addr I: of link I, as the initiator sees it.
local_addr() { if [[ $VM_NET == rxe ]]; then client_addr "$1"; else server_addr "$1"; fi; }
remote_addr() { if [[ $VM_NET == rxe ]]; then server_addr "$1"; else client_addr "$1"; fi; }
_initiator_prefix() { [[ $VM_NET != soft ]] || echo ip netns exec server; }

# setup_remote [N]: N links and a server with one disk of 128 MiB, the file /scratch/disk.img. Prints nothing; the disk's
# device_path is $REMOTE_PATH. start_remote, kill_remote: a target that goes and comes back.
setup_remote() {
  local n=${1:-1} i listeners=
  [[ $VM_NET != tap ]] || die "this scenario's initiator runs in the guest: use -n rxe or -n soft"
  setup_net "$n"
  setup_scratch 512
  truncate -s 128M /scratch/disk.img
  SWAP_ENDS=yes
  case $REMOTE in
    target)
      for ((i = 1; i <= n; i++)); do
        listeners+=", {\"method\": \"rnbd_create_listener\", \"params\": {\"traddr\": \"$(remote_addr "$i")\"}}"
      done
      cat >"$REMOTE_CONFIG" <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_uring_create", "params": {"name": "File0", "filename": "/scratch/disk.img", "block_size": 512}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_create_export", "params": {"device_path": "disk0", "bdev_name": "File0"}}$listeners]}]}
JSON
      REMOTE_PATH=disk0
      start_remote
      ;;
    kernel | kernel-static)
      REMOTE_PATH=$(losetup -f --show --direct-io=on /scratch/disk.img) || die "losetup"
      load_rnbd_server always_invalidate=$([[ $REMOTE == kernel ]] && echo Y || echo N)
      ;;
    *) die "REMOTE: no server named \"$REMOTE\"; there are target, kernel, kernel-static" ;;
  esac
}
start_remote() { start_target "$REMOTE_CONFIG"; }
kill_remote() { kill_target; }

# initiator_config N [JSON_MEMBERS [EXPORT...]]: a configuration that maps the disk as Remote0 over links 1..N, with more
# members of bdev_rnbd_map, and with more calls (JSON objects) for the exports.
initiator_config() {
  local n=$1 more=${2:-} i paths=
  shift $(($# < 2 ? $# : 2))
  for ((i = 1; i <= n; i++)); do
    paths+="${paths:+, }{\"src\": \"$(local_addr "$i")\", \"dst\": \"$(remote_addr "$i")\"}"
  done
  cat <<JSON
{"subsystems": [
  {"subsystem": "bdev_rnbd", "config": [
    {"method": "bdev_rnbd_map", "params": {"name": "Remote0", "sessname": "s1", "device_path": "$REMOTE_PATH",
      "paths": [$paths]${more:+, $more}}}]}$(printf ', %s' "$@" | sed 's/^, $//')]}
JSON
}

# start_initiator CONFIG [ARGUMENT...]: rnbd-initiator in the background, its pid in INITIATOR_PID, its output in
# $OUT_DIR/initiator.log, until its RPC socket answers.
start_initiator() {
  local config=$1
  shift
  [[ -x $BIN_DIR/rnbd-initiator ]] || die "$BIN_DIR/rnbd-initiator is missing: cargo build --release, or -o BIN_DIR=…"
  # shellcheck disable=SC2046 # a list of words
  $(_initiator_prefix) "$BIN_DIR/rnbd-initiator" -c "$config" -r "$INITIATOR_SOCK" "$@" >>"$INITIATOR_LOG" 2>&1 </dev/null &
  INITIATOR_PID=$!
  if ! wait_for _initiator_up_or_dead || _is_dead "$INITIATOR_PID"; then
    tail -n 20 "$INITIATOR_LOG" | sed 's/^/    initiator| /'
    die "rnbd-initiator did not come up with $config"
  fi
}
_initiator_up_or_dead() { _is_dead "$INITIATOR_PID" || irpc framework_wait_init; }

# irpc METHOD [JSON_PARAMS]: as rpc, of the initiator.
irpc() { "$VM_DIR/rpc.py" "$INITIATOR_SOCK" "$@"; }

# stop_initiator: SIGTERM, and a check that it ends, with status 0. kill_initiator: SIGKILL, as a crash.
stop_initiator() {
  local rc=0
  kill -TERM "$INITIATOR_PID"
  wait_for _is_dead "$INITIATOR_PID" || kill -KILL "$INITIATOR_PID"
  wait "$INITIATOR_PID" || rc=$?
  INITIATOR_PID=
  check_eq "the initiator stops on SIGTERM with status 0" "$rc" 0
}
kill_initiator() {
  kill -KILL "$INITIATOR_PID"
  wait "$INITIATOR_PID" 2>/dev/null
  INITIATOR_PID=
}

# start_export KIND BDEV [JSON_MEMBERS]: prints the device. stop_export KIND DEVICE waits until it is gone.
start_export() {
  local answer
  case $1 in
    nbd)
      answer=$(irpc nbd_start_disk "{\"bdev_name\": \"$2\"${3:+, $3}}") || return
      tr -d '"' <<<"$answer"
      ;;
    ublk)
      [[ -e /dev/ublkb${UBLK_ID:=0} ]] || irpc ublk_create_target '{}' >/dev/null 2>&1
      irpc ublk_start_disk "{\"bdev_name\": \"$2\", \"ublk_id\": $UBLK_ID${3:+, $3}}" >/dev/null || return
      wait_for test -b "/dev/ublkb$UBLK_ID" || return
      echo "/dev/ublkb$UBLK_ID"
      ;;
  esac
}
stop_export() {
  case $1 in
    nbd) irpc nbd_stop_disk "{\"nbd_device\": \"$2\"}" >/dev/null ;;
    ublk) irpc ublk_stop_disk "{\"ublk_id\": ${2#/dev/ublkb}}" >/dev/null ;;
  esac
}
# need_export KIND: loads its driver; false if this kernel has none.
need_export() {
  case $1 in
    nbd) modprobe nbd nbds_max=4 ;;
    ublk) modprobe ublk_drv 2>/dev/null ;;
  esac
}
