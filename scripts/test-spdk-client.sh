#!/bin/bash
# The unmodified client of SPDK (PyPI package spdk) against rnbd-target: every kind of bdev, statistics, errors,
# save_config and load_config, the end. Needs neither RDMA nor root.
#
#   scripts/test-spdk-client.sh [RNBD_TARGET]     the program, default build/release/rnbd-target
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
. scripts/lib.sh
target=$(realpath "${1:-build/release/rnbd-target}") || exit 1
venv=build/spdk-client
version=26.9
passed=0 failed=0 pid=

work=$(mktemp -d) || exit 1
sock=$work/rpc.sock
cleanup() {
  [[ -n $pid ]] && kill -KILL "$pid" 2>/dev/null
  rm -rf "$work"
}
trap cleanup EXIT

if ! "$venv/bin/pip" show spdk 2>/dev/null | grep -q "^Version: $version"; then
  if ! { python3 -m venv "$venv" && "$venv/bin/pip" install -q --disable-pip-version-check "spdk==$version"; }; then
    echo "cannot install spdk $version from PyPI: needs python3-venv and a network"
    exit 77
  fi
fi

# start ARGUMENT...: the program, until its socket answers.
start() {
  "$target" -r "$sock" "$@" >>"$work/log" 2>&1 </dev/null &
  pid=$!
  wait_while "$pid" "an answer" spdk rpc_get_methods && return
  echo "rnbd-target $* did not start:"
  tail -n 20 "$work/log"
  exit 1
}

# stop: by RPC; the program must end with status 0.
stop() {
  local rc=0
  spdk spdk_kill_instance SIGTERM >/dev/null || rc=1
  wait "$pid" || rc=$?
  pid=
  expect "the program ends with status 0" "$rc" 0
}

spdk() { "$venv/bin/spdk-rpc" -s "$sock" "$@"; }

expect() {
  if [[ $2 == "$3" ]]; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    printf 'FAILED: %s\n  got:  %s\n  want: %s\n' "$1" "$2" "$3"
  fi
}

# is RESULT COMMAND...: the command prints this and succeeds.
is() {
  local want=$1 got
  shift
  got=$(spdk "$@" 2>&1) || got="status $?: $got"
  expect "$*" "$got" "$want"
}

# fails CODE PART COMMAND...: the command is refused with this code, and what the client prints has the part in it.
fails() {
  local code=$1 part=$2 got
  shift 2
  if got=$(spdk "$@" 2>&1); then
    expect "$* is refused" "$got" "an error"
  else
    expect "$*: code" "$(grep -oE '"code": *-?[0-9]+' <<<"$got" | head -n 1 | tr -d ' ')" "\"code\":$code"
    expect "$*: text" "$(grep -oF -- "$part" <<<"$got" | head -n 1)" "$part"
  fi
}

# json EXPRESSION COMMAND...: value of a Python expression over the result r.
json() {
  local expression=$1
  shift
  spdk "$@" | python3 -c 'import json, sys; r = json.load(sys.stdin); print(eval(sys.argv[1]))' "$expression"
}

truncate -s 1M "$work/uring.img" "$work/aio.img"
start
is M0 bdev_malloc_create -b M0 64 512
is Malloc0 bdev_malloc_create 1 4096
is N0 bdev_null_create N0 100 512
is true bdev_null_resize N0 50
is U0 bdev_uring_create "$work/uring.img" U0 512
is true bdev_uring_rescan U0
is A0 bdev_aio_create "$work/aio.img" A0 4096
truncate -s 2M "$work/aio.img"
is true bdev_aio_rescan A0
is D0 bdev_delay_create -b N0 -d D0 -r 10 -t 20 -w 30 -n 40
is true bdev_delay_update_latency D0 p99_write 50
is true bdev_error_create M0
is "" bdev_error_inject_error EE_M0 read failure -n 2
is "" bdev_error_inject_error EE_M0 all corrupt_data -o 1 -v 7
is "" bdev_error_inject_error EE_M0 clear failure
is "" bdev_error_resume_pending EE_M0
expect "bdevs in order" "$(json "' '.join(b['name'] for b in r)" bdev_get_bdevs)" "M0 Malloc0 N0 U0 A0 D0 EE_M0"
expect "size of a resized bdev" "$(json "r[0]['num_blocks']" bdev_get_bdevs -b D0)" $((50 * 2048))
expect "size of a rescanned bdev" "$(json "r[0]['num_blocks']" bdev_get_bdevs -b A0 -t 100)" 512
expect "claims" "$(json "[b['name'] for b in r if b['claimed']]" bdev_get_bdevs)" "['M0', 'N0']"

expect "iostat of all" "$(json "len(r['bdevs'])" bdev_get_iostat)" 7
expect "iostat by thread" "$(json "(r['name'], r['channels'])" bdev_get_iostat -c --names M0)" "('M0', [])"
is "" bdev_reset_iostat -b M0 -m maxmin
is "" bdev_enable_histogram M0 --histogram
spdk bdev_get_histogram M0 >"$work/histogram.json"
expect "histogram.py's arithmetic" "$(python3 - "$work/histogram.json" <<'P'
import base64, json, sys
r = json.load(open(sys.argv[1]))
counts = base64.b64decode(r["histogram"])
print(len(counts) == 8 << r["granularity"] if r["max_range"] == r["min_range"] else
      len(counts) == (r["max_range"] - r["min_range"] + 1) * (8 << r["granularity"]), r["tsc_rate"], sum(counts))
P
)" "True 1000000000 0"
expect "histogram borders" "$(json "r['borders_count']" bdev_get_histogram_borders M0 --borders 10,100)" "[0, 0, 0]"
is "" bdev_enable_histogram M0 --no-histogram

expect "reactors" "$(json "[x['lcore'] for x in r['reactors']]" framework_get_reactors)" "[0]"
expect "threads" "$(json "[t['name'] for t in r['threads']]" thread_get_stats)" "['reactor_0', 'control']"
expect "pollers" "$(json "'rpc' in [p['name'] for p in r['threads'][1]['active_pollers']]" thread_get_pollers)" True
expect "channels" "$(json "len(r['threads'])" thread_get_io_channels)" 2
expect "scheduler" "$(json "r['scheduler_name']" framework_get_scheduler)" static
is "" framework_set_scheduler static
is "" log_set_level WARNING
is "" log_set_print_level NOTICE
expect "log level" "$(json r log_get_level)" NOTICE
is "" log_set_flag all
is "" log_clear_flag all
expect "log flags" "$(json "set(r.values())" log_get_flags)" "{False}"
expect "notifications" "$(json "(r[0]['type'], r[0]['ctx'])" notify_get_notifications -i 0 -n 1)" "('bdev_register', 'M0')"
expect "version" "$(json "r['version'].split()[0]" spdk_get_version)" rnbd-target

fails -17 "exists already" bdev_null_create N0 100 512
fails -19 "no bdev named N7" bdev_null_delete N7
fails -19 'Null disk' bdev_malloc_delete N0
fails -19 'bdev_get_bdevs lists' bdev_get_bdevs -b N7
fails -22 'power of two' bdev_malloc_create -b M9 1 520
fails -2 'No such file' bdev_uring_create "$work/none.img" U9
fails -95 'rate limits are not implemented' bdev_set_qos_limit M0 --rw-ios-per-sec 1000
fails -95 '"param": "period"' bdev_set_qd_sampling_period M0 1000
fails -95 'use all, maxmin or none' bdev_get_iostat --reset-mode error
fails -32601 'Method not found' bdev_passthru_create -b M0 -p P0

# Saved, loaded by a new program, saved again: the same.
spdk save_config >"$work/a.json"
spdk save_config --with-batches >"$work/batches.json"
stop
start -c "$work/a.json"
spdk save_config >"$work/b.json"
expect "save_config after a restart with -c" "$(diff "$work/a.json" "$work/b.json")" ""
stop
for file in a batches; do
  start --wait-for-rpc
  fails -1 'framework_start_init' bdev_get_bdevs
  is "" load_config -j "$work/$file.json"
  spdk save_config >"$work/c.json"
  expect "save_config after load_config of $file.json" "$(diff "$work/a.json" "$work/c.json")" ""
  [[ $file == a ]] && stop
done

is "" bdev_error_delete EE_M0
is "" bdev_delay_delete D0
is "" bdev_aio_delete A0
is "" bdev_uring_delete U0
is "" bdev_null_delete N0
is "" bdev_malloc_delete M0
is "" bdev_malloc_delete Malloc0
is "[]" bdev_get_bdevs
stop

echo "$passed passed, $failed failed"
[[ $failed == 0 ]]
