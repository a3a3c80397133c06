#!/bin/bash
# rnbd-initiator map …: a disk as a kernel device in one command; what is refused, a server that goes and comes, Ctrl-C.
# timeout: 600
# long: 6.12 6.12/rxe,REMOTE=kernel 6.1
source "$VM_DIR/lib.sh"
setup_remote 1
OUT=$OUT_DIR/map.out ERR=$OUT_DIR/map.err
words=(sessname=direct "path=ip:$(local_addr 1)@ip:$(remote_addr 1)" "device_path=$REMOTE_PATH" reconnect_delay_sec=1)

# start_map ARGUMENT...: in the background, until it is ready; its device in DEV.
start_map() {
  : >"$OUT"
  $(_initiator_prefix) "$BIN_DIR/rnbd-initiator" map "${words[@]}" "$@" >"$OUT" 2>"$ERR" </dev/null &
  INITIATOR_PID=$!
  wait_for said_or_dead '^ready: '
  DEV=$(sed -n 's/^ready: \([^ ]*\) .*/\1/p' "$OUT")
  [[ -n $DEV ]] || { cat "$OUT" "$ERR"; return 1; }
}
said_or_dead() { _is_dead "$INITIATOR_PID" || said "$1"; }
said() { grep -q -- "$1" "$OUT"; }
# A background job ignores SIGINT from its birth, unless the program asks for it, as this one does.
stop_map() {
  local rc=0
  kill -INT "$INITIATOR_PID"
  wait_for _is_dead "$INITIATOR_PID"
  wait "$INITIATOR_PID" || rc=$?
  INITIATOR_PID=
  check_eq "SIGINT ends it with status 0" "$rc" 0
  check "it says so" said 'is not mapped any more, session direct is closed'
}
# refused NAME WORD ARGUMENT...: status 1, and the word on standard error.
refused() {
  local name=$1 word=$2 rc=0
  shift 2
  $(_initiator_prefix) timeout $HANG_LIMIT "$BIN_DIR/rnbd-initiator" map "$@" >"$OUT" 2>"$ERR" </dev/null || rc=$?
  check_eq "$name: status 1" "$rc" 1
  check "$name: '$word' is said" grep -q -- "$word" "$ERR" || cat "$ERR"
}

for export in nbd ublk; do
  need_export $export || { say "no $export in this kernel"; continue; }
  say "$export"
  case $export in nbd) use=(--nbd /dev/nbd0) ;; ublk) use=(--ublk) ;; esac
  start_map "${use[@]}" || { fail "map as $export"; continue; }
  ok "$DEV: $(grep '^device' "$OUT")"
  check_eq "its size" "$(blockdev --getsize64 "$DEV")" 134217728
  check "fio, verified" fio_verify "$DEV" 4k 2
  if [[ $export == nbd ]]; then
    exec 7<"$DEV"
    refused "a device in use by another" nbd0 "${words[@]/sessname=direct/sessname=other}" access_mode=ro --nbd /dev/nbd0
    exec 7<&-
  fi
  if [[ $REMOTE == target ]]; then
    kill_remote
    check "the loss is told" wait_for said 'I/O waits'
    start_remote
    check "the return is told" wait_for said 'connected again'
    check "it reads" dd if="$DEV" of=/dev/null bs=64k count=16 iflag=direct status=none
  fi
  stop_map
  check_eq "no device is left" "$(cat "/sys/block/${DEV##*/}/size" 2>/dev/null || echo 0)" 0
done

say "refusals"
bad=("${words[@]/device_path=*/device_path=nothing}")
refused "a device that the server has not" "nothing" "${bad[@]}" --nbd /dev/nbd1
refused "an address where nobody listens" "nobody listens" "${words[@]}" dest_port=9 --nbd /dev/nbd1
refused "no use" "--nbd DEVICE" "${words[@]}"
[[ $REMOTE != target ]] || stop_target
finish
