#!/bin/bash
# rping and perftest's tools over the kernel's rxe, against soft-roce's examples of the same names, each as server and as
# client.
# timeout: 600
# long: 6.12/soft
# shellcheck source=scripts/vm/lib.sh
source "$VM_DIR/lib.sh"
examples=$TEST_DIR/examples
for name in rping perftest; do
  [[ -x $examples/$name ]] || die "$examples/$name is missing: cargo test -p soft-roce --no-run"
done
setup_net 1
ulimit -l unlimited
us=$(server_addr 1) them=$(client_addr 1) port=20000
provider=soft-roce
[[ $VM_NET != rxe ]] || provider=rdma-core
# Programs of the server's side write here.
logs=$OUT_DIR
[[ $VM_NET != tap ]] || logs=$HOST_JOB_DIR/out

# example LOG PROGRAM ARGUMENT...: on the server's side, its output in $OUT_DIR/LOG; its status.
example() {
  local log=$1 program=$2
  shift 2
  on_server "timeout $HANG_LIMIT '$examples/$program' --provider $provider $(printf '%q ' "$@") >'$logs/$log' 2>&1"
}

# tool LOG COMMAND...: on the client's side.
tool() {
  local log=$1
  shift
  timeout $HANG_LIMIT "$@" >"$OUT_DIR/$log" 2>&1
}

# both TEXT SERVER CLIENT: runs two commands, given as words: "example ..." or "tool ...". The server starts first.
both() {
  local name=${1//[^A-Za-z0-9]/-} server client client_rc server_rc
  read -ra server <<<"$2"
  read -ra client <<<"$3"
  "${server[0]}" "$name.server" "${server[@]:1}" &
  # Our clients try again while nobody listens.
  [[ ${server[0]} == tool ]] || wait_for grep -q listening "$OUT_DIR/$name.server" || fail "$1: no server"
  "${client[0]}" "$name.client" "${client[@]:1}"
  client_rc=$?
  wait $!
  server_rc=$?
  check_eq "$1" "client $client_rc, server $server_rc" "client 0, server 0"
  if [[ $client_rc$server_rc != 00 ]]; then
    tail -n 30 "$OUT_DIR/$name".{server,client} | sed 's/^/    /'
  else
    grep -E '^ *[0-9]+ ' "$OUT_DIR/$name.client" | tail -n 1 | sed 's/^ */    /'
  fi
  port=$((port + 1))
}

for size in 64 1500 65535; do
  both "rping of $size bytes to us" "example rping -s -a $us -p $port -V" "tool rping -c -a $us -p $port -C 20 -V -S $size"
  both "rping of $size bytes to the kernel" "tool rping -s -p $port -S $size" "example rping -c -a $them -p $port -C 20 -V -S $size"
done

# perftest TEXT OUR_TEST THEIR_TEST: with options, in both directions.
perftest() {
  local ours="example perftest $2" theirs="tool $3 -R -F -d rxe1"
  both "$1 to us" "$ours -p $port -b $us" "$theirs -p $port $us"
  both "$1 to the kernel" "$theirs -p $port" "$ours -p $port $them"
}
while read -r test size iters; do
  perftest "$test of $size bytes" "$test -s $size -n $iters" "$test -s $size -n $iters"
done <<'TESTS'
ib_write_bw 65536 500
ib_send_bw 65536 500
ib_read_bw 65536 500
ib_send_bw 3001 500
ib_write_lat 2 300
ib_send_lat 2 300
ib_read_lat 2 300
ib_send_lat 9000 100
TESTS

say "receivers that are not ready"
perftest "ib_send_bw of 5000 bytes into 8 receives" "ib_send_bw -s 5000 -n 300 -r 8" "ib_send_bw -s 5000 -n 300 -r 8"

# Over a bad link these take minutes.
[[ -z ${VM_NETEM:-} ]] || finish
say "2 bytes to 8 MiB"
for test in ib_write_bw ib_read_bw; do
  both "$test of all sizes to us" "example perftest $test -s 8388608 -p $port -b $us" "tool $test -R -F -d rxe1 -a -n 5 -p $port $us"
done
finish
