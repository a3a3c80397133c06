#!/bin/bash
# The NBD client (bdev_nbd of rnbd-initiator) with the servers of this world: nbdkit, qemu-nbd, nbd-server and our own, in
# every dialect, with TLS, and with servers that fail. Each device is exported again by rnbd-initiator, and data are
# written through it and compared with what the server has. No privileges are needed but to install missing packages.
# Usage: scripts/test-nbd-client.sh [BIN_DIR [PATTERN]]        PATTERN: only checks whose names match it
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
bin=$(realpath "${1:-build/release}") pattern=${2:-}
rpc=$(realpath scripts/vm/rpc.py)
proxy=$(realpath scripts/nbd-proxy.py) config=$(realpath configs/initiator-nbd.json)

scripts/packages.sh libnbd-bin qemu-utils nbdkit nbd-server fio openssl procps

dir=$(mktemp -d "${TMPDIR:-/tmp}/rnbd-nbdc.XXXXXX")
initiator='' server='' other='' port='' passed=0
cleanup() {
  local pid
  for pid in $initiator $server $other; do kill -CONT "$pid" 2>/dev/null; kill -KILL "$pid" 2>/dev/null; done || true
  rm -rf "$dir"
}
trap cleanup EXIT
cp "$bin/rnbd-initiator" "$bin/rnbd-target" "$dir/"
cd "$dir"
mib=48
dd if=/dev/urandom of=random.img bs=1M count=$mib status=none

# What hangs has failed.
hang=$(limit 600)
for tool in nbdinfo nbdcopy qemu-img qemu-io fio; do
  eval "$tool() { timeout -k 5 $hang /usr/bin/$tool \"\$@\"; }"
done
# A load for so long, in which servers come and go.
runtime=$(limit 10)

call() { "$rpc" i.sock "$@"; }
field() { call bdev_nbd_get_devices "{\"name\": \"$1\"}" | python3 -c "import json, sys; print(json.load(sys.stdin)[0].get('$2'))"; }
has() { [[ $(field "$1" "$2") == "$3" ]] || { echo "$2 of $1 is $(field "$1" "$2"), not $3"; return 1; }; }
connections() { call bdev_nbd_get_devices "{\"name\": \"$1\"}" | grep -c '"state": "connected"'; }
has_connections() { [[ $(connections "$1") == "$2" ]]; }

start_initiator() { # ARGUMENTS...
  ./rnbd-initiator -r i.sock -m 0x3 "$@" >>initiator.log 2>&1 &
  initiator=$!
  wait_while "$initiator" "an answer" call rpc_get_methods
}

# map NAME PARAMETERS...: a device, exported again under its name.
map() {
  call bdev_nbd_create "{\"name\": \"$1\", $2}" >/dev/null &&
    call nbd_server_create_export "{\"name\": \"$1\", \"bdev_name\": \"$1\"}" >/dev/null
}
unmap() {
  call nbd_server_delete_export "{\"name\": \"$1\"}" >/dev/null && call bdev_nbd_delete "{\"name\": \"$1\"}" >/dev/null
}
out() { echo "nbd+unix:///$1?socket=$dir/out.sock"; }
refused() { # TEXT PARAMETERS: such a device is refused with the text
  local says
  if says=$(call bdev_nbd_create "{\"name\": \"X\", $2}" 2>&1); then echo "it was taken"; return 1; fi
  grep -q "$1" <<<"$says" || { echo "$says"; return 1; }
}

serve() { # COMMAND...: a server in the background
  "$@" >>server.log 2>&1 &
  server=$!
}
stop() {
  [[ -n $server ]] || return 0
  kill -TERM "$server" 2>/dev/null || true
  local i
  for ((i = 0; i < 20; i++)); do kill -0 "$server" 2>/dev/null || break; sleep 0.1; done
  # Some wait for their clients for ever.
  kill -KILL "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
  server=''
}
kit() { # ARGUMENTS...: nbdkit on kit.sock
  rm -f kit.sock
  serve nbdkit -f -U "$dir/kit.sock" "$@"
  wait_while "$server" "nbdkit" listens "$dir/kit.sock"
}
kit_uri="nbd+unix:///?socket=$dir/kit.sock"

# copies NAME [URI]: random data through the device, compared through it, and with what the server has at URI.
copies() {
  rm -f back.img server.img
  nbdcopy --flush random.img "$(out "$1")" && nbdcopy "$(out "$1")" back.img && cmp random.img back.img || return 1
  [[ -z ${2:-} ]] || { nbdcopy "$2" server.img && cmp random.img server.img; }
}

verifies() { # NAME BLOCK_SIZE DEPTH [FIO_ARGUMENT...]
  local name=$1 bs=$2 depth=$3
  shift 3
  fio --name=verify --ioengine=nbd --uri="$(out "$name")" --rw=randrw --bs="$bs" --iodepth="$depth" --size=${mib}M \
    --io_size=96M --verify=crc32c --verify_fatal=1 --fsync=64 --output-format=normal "$@"
}

operations() { # NAME: zeroes, discards, forced writes
  qemu-io -f raw -c 'write -P 0x5a 1M 2M' -c 'read -P 0x5a 1M 2M' -c 'write -z 2M 64k' -c 'read -P 0 2M 64k' \
    -c 'write -zu 3M 64k' -c 'read -P 0 3M 64k' -c 'discard 4M 1M' -c flush \
    -c 'write -f -P 7 1M 64k' -c 'read -P 7 1M 64k' "$(out "$1")" | tee io.log
  if grep -q -i 'failed\|error' io.log; then return 1; fi
}

# here NAME COMMAND...: in this shell, for it starts and ends servers; failures end it by "return 1".
here() {
  local name=$1 rc=0
  [[ $name =~ $pattern ]] || return 0
  shift
  "$@" >check.log 2>&1 </dev/null || rc=$?
  stop
  result "$name" $rc
}

result() { # NAME STATUS
  [[ $2 == 0 ]] || { echo "FAILED: $1"; cat check.log; tail -n 30 initiator.log; tail -n 10 server.log; exit 1; }
  echo "ok: $1"
  passed=$((passed + 1))
}

dialect() { # HANDSHAKE DIALECT PARAMETERS NBDKIT_ARGUMENTS...
  local handshake=$1 dialect=$2 more=$3
  shift 3
  kit "$@" memory ${mib}M || return 1
  map K "\"path\": \"$dir/kit.sock\"$more" || return 1
  { has K handshake "$handshake" && has K dialect "$dialect" && copies K "$kit_uri" && operations K; } || return 1
  unmap K
}

oldstyle() { # nbdkit offers flushes there, and refuses them
  kit -o memory ${mib}M || return 1
  map K "\"path\": \"$dir/kit.sock\"" || return 1
  { has K handshake oldstyle && nbdcopy random.img "$(out K)" && nbdcopy "$(out K)" back.img; } || return 1
  unmap K && cmp random.img back.img
}

block_sizes() {
  kit --filter=blocksize-policy memory ${mib}M blocksize-minimum=4096 blocksize-preferred=65536 \
    blocksize-maximum=128K blocksize-error-policy=error || return 1
  map K "\"uri\": \"$kit_uri\"" || return 1
  { has K block_size 4096 && has K physical_block_size 65536 && has K max_payload 131072 && copies K &&
    verifies K 256k 8; } || return 1
  unmap K
}

forced_writes() { # emulated by flushes, native, and where there is nothing but force
  local mode
  for mode in emulate native force; do
    kit --filter=fua memory ${mib}M fuamode=$mode || return 1
    map K "\"uri\": \"$kit_uri\"" || return 1
    { operations K && verifies K 16k 8 --sync=1; } || return 1
    unmap K && stop
  done
  # Neither force nor zeroes: all of it is done without.
  kit --filter=nozero --filter=fua memory ${mib}M zeromode=none || return 1
  map K "\"uri\": \"$kit_uri\"" || return 1
  { has K write_zeroes False && has K fua False && operations K; } || return 1
  unmap K
}

holes_and_extents() {
  kit --filter=noextents memory ${mib}M || return 1
  map K "\"uri\": \"$kit_uri\"" && copies K "$kit_uri" && unmap K || return 1
  stop
  # A server that sends holes: only every second MiB has data.
  rm -f sparse.img
  truncate -s ${mib}M sparse.img
  local i
  for ((i = 0; i < mib; i += 2)); do
    dd if=random.img of=sparse.img bs=1M count=1 skip=$i seek=$i conv=notrunc status=none
  done
  serve qemu-nbd -f raw -t -k "$dir/qemu.sock" sparse.img
  wait_while "$server" "qemu-nbd" listens "$dir/qemu.sock" || return 1
  map K "\"path\": \"$dir/qemu.sock\"" || return 1
  rm -f back.img
  nbdcopy "$(out K)" back.img && cmp sparse.img back.img && unmap K
}

slow_server() {
  kit --filter=delay memory ${mib}M rdelay=5ms wdelay=5ms || return 1
  map K "\"uri\": \"$kit_uri\"" && verifies K 64k 32 --io_size=32M && unmap K
}

fails_with() { # TEXT COMMAND
  fails qemu-io -f raw -c "$2" "$(out K)" >io.log 2>&1 || { cat io.log; return 1; }
  grep "$1" io.log
}

errors_reach_the_user() {
  kit --filter=error memory ${mib}M error=EIO error-pread-rate=100% error-pwrite=ENOSPC error-pwrite-rate=100% || return 1
  map K "\"uri\": \"$kit_uri\"" || return 1
  fails_with 'Input/output error' 'read 0 4k' && fails_with 'No space left' 'write 0 4k' || return 1
  # Errors are answers: the connection lives.
  has K state open || return 1
  unmap K && stop
  kit --filter=error memory ${mib}M error=EIO error-rate=5% || return 1
  map K "\"uri\": \"$kit_uri\"" || return 1
  fio --name=load --ioengine=nbd --uri="$(out K)" --rw=randrw --bs=4k --iodepth=16 --size=8M --continue_on_error=all ||
    return 1
  has K state open && unmap K
}

read_only() {
  kit -r memory ${mib}M || return 1
  map K "\"uri\": \"$kit_uri\"" || return 1
  has K read_only True && nbdinfo "$(out K)" | grep 'is_read_only: true' || return 1
  unmap K && stop
  kit memory ${mib}M || return 1
  map K "\"uri\": \"$kit_uri\", \"read_only\": true" || return 1
  fails qemu-io -f raw -c 'write 0 4k' "$(out K)" || return 1
  unmap K
}

several_connections() {
  kit memory ${mib}M || return 1
  map K "\"uri\": \"$kit_uri\", \"connections\": 4" || return 1
  wait_for "4 connections" has_connections K 4 || return 1
  { copies K "$kit_uri" && verifies K 4k 32; } || return 1
  unmap K && stop
  kit --filter=multi-conn memory ${mib}M multi-conn-mode=disable || return 1
  map K "\"uri\": \"$kit_uri\", \"connections\": 4" || return 1
  wait_for "1 connection" has_connections K 1 && copies K "$kit_uri" && unmap K && stop || return 1
  # A server that says it could, and does not: who has no connection uses those that others have.
  kit --filter=limit memory ${mib}M limit=2 || return 1
  map K "\"uri\": \"$kit_uri\", \"connections\": 4" || return 1
  wait_for "2 connections" has_connections K 2 && copies K && verifies K 4k 32 && unmap K
}

certificates() {
  mkdir -p pki other
  local d who
  for d in pki other; do
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj "/CN=test authority $d" \
      -addext basicConstraints=critical,CA:TRUE -keyout $d/ca-key.pem -out $d/ca-cert.pem || return 1
    for who in server client; do
      openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$who" -keyout $d/$who-key.pem \
        -out $d/$who.csr || return 1
      printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n' >$d/ext
      openssl x509 -req -in $d/$who.csr -CA $d/ca-cert.pem -CAkey $d/ca-key.pem -CAcreateserial -days 2 -extfile $d/ext \
        -out $d/$who-cert.pem || return 1
    done
  done
  # A client that trusts the right authority and has nothing to show.
  mkdir -p anonymous && cp pki/ca-cert.pem anonymous/
}

encrypted() {
  certificates || return 1
  free_port port
  serve nbdkit -f -i 127.0.0.1 -p "$port" --tls=require --tls-certificates="$dir/pki" --tls-verify-peer memory ${mib}M
  wait_while "$server" "nbdkit" listens "$port" || return 1
  map K "\"uri\": \"nbds://localhost:$port/?tls-certificates=$dir/pki\", \"connections\": 2" || return 1
  has K tls True && copies K && verifies K 16k 16 && verifies K 512k 8 || return 1
  call bdev_nbd_get_devices '{"name": "K"}' | grep '"cipher": "TLS' || return 1
  unmap K || return 1
  # By address, and with parameters in place of the URI's.
  map K "\"traddr\": \"127.0.0.1\", \"trsvcid\": \"$port\", \"tls\": \"require\", \"tls_certificates\": \"$dir/pki\"" || return 1
  copies K && unmap K || return 1
  refused 'UnknownIssuer' "\"uri\": \"nbds://localhost:$port/?tls-certificates=$dir/other\"" || return 1
  refused "does it trust the client's certificate\|CertificateRequired" \
    "\"uri\": \"nbds://localhost:$port/?tls-certificates=$dir/anonymous\"" || return 1
  refused 'not valid for name\|NotValidForName' \
    "\"uri\": \"nbds://localhost:$port/?tls-certificates=$dir/pki&tls-hostname=elsewhere\"" || return 1
  refused 'it wants TLS' "\"uri\": \"nbd://localhost:$port/\"" || return 1
  # Whoever it is, if that is all the same.
  map K "\"uri\": \"nbds://localhost:$port/?tls-certificates=$dir/pki&tls-hostname=elsewhere&tls-verify-peer=0\"" || return 1
  copies K && unmap K || return 1
  stop
  # TLS is not to be had: that is the end, or not.
  kit memory ${mib}M || return 1
  refused 'refuses STARTTLS' "\"path\": \"$dir/kit.sock\", \"tls\": \"require\", \"tls_certificates\": \"$dir/pki\"" || return 1
  map K "\"path\": \"$dir/kit.sock\", \"tls\": \"allow\", \"tls_certificates\": \"$dir/pki\"" || return 1
  has K tls False && unmap K || return 1
  refused "ca-cert.pem" "\"path\": \"$dir/kit.sock\", \"tls\": \"allow\", \"tls_certificates\": \"$dir/nowhere\""
}

qemu_server() {
  # It speaks extended headers since 8.2.
  local best=structured version
  version=$(qemu-nbd --version | sed -n 's/^qemu-nbd \([0-9]*\.[0-9]*\).*/\1/p')
  [[ $(printf '%s\n' 8.2 "$version" | sort -V | head -n 1) != 8.2 ]] || best=extended
  rm -f qemu.sock
  truncate -s ${mib}M disk.img
  serve qemu-nbd -f raw -t -e 8 -x disk -D 'a disk' -k "$dir/qemu.sock" --discard=unmap disk.img
  wait_while "$server" "qemu-nbd" listens "$dir/qemu.sock" || return 1
  refused 'no such export' "\"path\": \"$dir/qemu.sock\", \"export\": \"tape\"" || return 1
  map Q "\"path\": \"$dir/qemu.sock\", \"export\": \"disk\"" || return 1
  has Q dialect "$best" && copies Q && operations Q && verifies Q 4k 32 || return 1
  unmap Q || return 1
  map Q "\"path\": \"$dir/qemu.sock\", \"export\": \"disk\", \"dialect\": \"structured\"" || return 1
  has Q dialect structured && copies Q && unmap Q || return 1
  map Q "\"path\": \"$dir/qemu.sock\", \"export\": \"disk\", \"dialect\": \"simple\"" || return 1
  has Q dialect simple && copies Q && unmap Q && cmp random.img disk.img
}

debian_server() {
  free_port port
  truncate -s ${mib}M disk.img
  cat >nbd-server.conf <<CONF
[generic]
  port = $port
  listenaddr = 127.0.0.1
  allowlist = true
[disk]
  exportname = $dir/disk.img
  flush = true
  fua = true
  trim = true
  multiconn = true
CONF
  # A daemon, for without that it serves one client and ends.
  nbd-server -C "$dir/nbd-server.conf" -p "$dir/nbd-server.pid" >>server.log 2>&1 || return 1
  wait_for nbd-server listens "$port" && wait_for "its number" test -s nbd-server.pid || return 1
  other=$(cat nbd-server.pid)
  map S "\"uri\": \"nbd://127.0.0.1:$port/disk\"" || return 1
  copies S && verifies S 4k 16 || return 1
  unmap S || return 1
  map S "\"uri\": \"nbd://localhost:$port/disk\", \"dialect\": \"newstyle\"" || return 1
  has S handshake newstyle && copies S && unmap S && cmp random.img disk.img || return 1
  kill "$other"
  other=''
}

own_target() { # LISTENER_PARAMETERS: rnbd-target with a disk in memory on own.sock
  rm -f own.sock
  cat >target.json <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "M0", "num_blocks": $((mib * 2048)), "block_size": 512}}]},
  {"subsystem": "nbd_server", "config": [
    {"method": "nbd_server_create_export", "params": {"name": "disk", "bdev_name": "M0"}},
    {"method": "nbd_server_add_listener", "params": {"path": "$dir/own.sock", "export": "disk"$1}}]}]}
JSON
  serve ./rnbd-target -c target.json -r t.sock -m 0x1
  wait_while "$server" "rnbd-target" listens "$dir/own.sock"
}

own_server() {
  own_target '' || return 1
  map O "\"path\": \"$dir/own.sock\", \"connections\": 2" || return 1
  has O dialect extended || return 1
  { copies O "nbd+unix:///disk?socket=$dir/own.sock" && operations O && verifies O 4k 32 && verifies O 512k 32; } || return 1
  unmap O || return 1
  local dialect
  for dialect in structured simple newstyle; do
    map O "\"path\": \"$dir/own.sock\", \"export\": \"disk\", \"dialect\": \"$dialect\"" || return 1
    copies O && unmap O || return 1
  done
}

own_dialect() { # DIALECT PARAMETERS: our server in an older dialect
  own_target ", \"dialect\": \"$1\"" || return 1
  map O "\"path\": \"$dir/own.sock\"$2" || return 1
  { has O handshake "$1" && copies O && operations O && verifies O 4k 8; } || return 1
  unmap O
}

is_loaded() { call nbd_server_get_connections | grep '"num_write_ops": *[1-9]' >/dev/null; }

file_server() { # on kit.sock, with what is written in a file that outlives it
  kit "$@" file "$dir/disk.img"
}

survives_kills() {
  truncate -s ${mib}M disk.img
  file_server || return 1
  map F "\"uri\": \"$kit_uri\", \"connections\": 2, \"reconnect_delay_sec\": 1" || return 1
  verifies F 4k 32 --time_based --runtime="$runtime" >fio.log 2>&1 &
  local fio=$! i
  wait_while $fio "load" is_loaded || { cat fio.log; return 1; }
  for i in 1 2 3; do
    sleep 0.5
    kill -KILL "$server"
    wait "$server" 2>/dev/null
    wait_for "the loss" has F state closed || return 1
    file_server || return 1
    wait_for "another connection" has F state open || return 1
  done
  wait $fio || { cat fio.log; return 1; }
  [[ $(field F connections) == *"'reconnects': "[1-9]* ]] || { field F connections; return 1; }
  copies F "$kit_uri" && unmap F
}

survives_cuts() { # of one connection of several, by a proxy; nbdkit 1.32 would abort (connections.c, "sock >= 0")
  free_port port
  truncate -s ${mib}M disk.img
  rm -f qemu.sock
  serve qemu-nbd -f raw -t -e 16 -k "$dir/qemu.sock" disk.img
  wait_while "$server" "qemu-nbd" listens "$dir/qemu.sock" || return 1
  python3 "$proxy" "$port" "$dir/qemu.sock" 0.7 &
  other=$!
  wait_while "$other" "the proxy" listens "$port" || return 1
  map F "\"uri\": \"nbd://127.0.0.1:$port/\", \"connections\": 4, \"reconnect_delay_sec\": 1" || return 1
  verifies F 16k 32 --time_based --runtime="$runtime" || return 1
  call bdev_nbd_get_devices '{"name": "F"}'
  [[ $(field F connections) == *"'reconnects': "[1-9]* ]] || return 1
  unmap F || return 1
  kill "$other" && wait "$other" 2>/dev/null
  other=''
}

survives_stalls() {
  kit memory ${mib}M || return 1
  map F "\"uri\": \"$kit_uri\", \"reconnect_delay_sec\": 1" || return 1
  verifies F 4k 32 --time_based --runtime="$runtime" >fio.log 2>&1 &
  local fio=$!
  wait_while $fio "load" is_loaded || { cat fio.log; return 1; }
  kill -STOP "$server"
  # Nothing happens, so there is nothing to wait for.
  sleep 3
  kill -CONT "$server"
  wait $fio || { cat fio.log; return 1; }
  has F state open && [[ $(field F connections) == *"'reconnects': 0"* ]] || return 1
  unmap F || return 1
  # With io_timeout_sec the connection is given up, and requests are repeated when the server has let go of it.
  map F "\"uri\": \"$kit_uri\", \"reconnect_delay_sec\": 1, \"io_timeout_sec\": 1, \"connections\": 1" || return 1
  verifies F 4k 32 --time_based --runtime="$runtime" >fio.log 2>&1 &
  fio=$!
  wait_while $fio "load" is_loaded || { cat fio.log; return 1; }
  kill -STOP "$server"
  wait_for "a connection given up" grep -a 'has not answered for 1 s' initiator.log || return 1
  sleep 1
  kill -CONT "$server"
  wait $fio || { cat fio.log; return 1; }
  copies F "$kit_uri" && unmap F
}

waits_and_fails() {
  kit memory ${mib}M || return 1
  map F "\"uri\": \"$kit_uri\", \"reconnect_delay_sec\": 1, \"fast_io_fail_timeout_sec\": 2" || return 1
  stop
  # Without the time-out it would wait for the server, and hang.
  local start=$SECONDS
  fails qemu-io -f raw -c 'read 0 4k' "$(out F)" || return 1
  echo "failed after $((SECONDS - start)) s"
  kit memory ${mib}M || return 1
  wait_for "open device" has F state open || return 1
  copies F "$kit_uri" && unmap F || return 1
  stop
  # Given up, until it is told otherwise.
  kit memory ${mib}M || return 1
  map F "\"uri\": \"$kit_uri\", \"reconnect_delay_sec\": 1, \"ctrlr_loss_timeout_sec\": 2" || return 1
  stop
  wait_for "end" has F given_up True || return 1
  fails qemu-io -f raw -c 'read 0 4k' "$(out F)" || return 1
  kit memory ${mib}M || return 1
  call bdev_nbd_reconnect '{"name": "F"}' || return 1
  has F state open && copies F "$kit_uri" && unmap F
}

long_zeroes() { # written for hours, for a client that is gone
  local pid id
  kit --filter=nozero --filter=delay null size=8T wdelay=20ms || return
  map Z "\"uri\": \"$kit_uri\"" || return
  /usr/bin/python3 - "$(out Z)" <<'PY' &
import sys, nbd
h = nbd.NBD()
h.connect_uri(sys.argv[1])
h.aio_zero(1 << 31, 0)
while True:
    h.poll(-1)
PY
  pid=$!
  wait_for "the zeroing" is_zeroing || return
  # Others get on, beside it and after it.
  nbdinfo --size "$(out Z)" >/dev/null && reads Z || return
  kill -KILL $pid
  reads Z || { echo "nobody gets on after a client that was killed"; return 1; }
  /usr/bin/python3 - "$(out Z)" <<'PY' &
import sys, nbd
h = nbd.NBD()
h.connect_uri(sys.argv[1])
try:
    h.zero(1 << 31, 0)
except nbd.Error:
    sys.exit(0)
sys.exit("it was zeroed")
PY
  pid=$!
  wait_for "the zeroing" is_zeroing || return
  id=$(call nbd_server_get_connections | python3 -c 'import json, sys; print(max(c["id"] for c in json.load(sys.stdin)))')
  call nbd_server_disconnect "{\"id\": $id}" >/dev/null || return
  wait $pid || return
  unmap Z
}
is_zeroing() { call nbd_server_get_connections | grep -q '"num_other_ops": *[1-9]'; }
reads() { timeout -k 5 "$hang" /usr/bin/python3 -c 'import sys, nbd
h = nbd.NBD()
h.connect_uri(sys.argv[1])
h.pread(4096, 1 << 40)' "$(out "$1")"; }

follows_the_size() {
  truncate -s ${mib}M disk.img
  file_server || return 1
  map F "\"uri\": \"$kit_uri\", \"reconnect_delay_sec\": 1" || return 1
  has F num_blocks $((mib * 2048)) || return 1
  stop
  truncate -s $((mib + 16))M disk.img
  file_server || return 1
  wait_for "new size" has F num_blocks $(((mib + 16) * 2048)) || return 1
  [[ $(nbdinfo --size "$(out F)") == $(((mib + 16) << 20)) ]] || return 1
  unmap F && stop || return 1
  # Another device at the same place is another device.
  truncate -s ${mib}M disk.img
  file_server || return 1
  map F "\"uri\": \"$kit_uri\", \"reconnect_delay_sec\": 1" || return 1
  stop
  file_server -r || return 1
  wait_for "end" has F given_up True || return 1
  [[ $(field F last_error) == *"read-only now"* ]] || { field F last_error; return 1; }
  unmap F
}

refuses() {
  refused 'cannot connect to .*No such file' "\"path\": \"$dir/nobody.sock\"" || return 1
  free_port port
  refused 'Connection refused' "\"uri\": \"nbd://127.0.0.1:$port\"" || return 1
  refused 'cannot find' '"uri": "nbd://no-such-host.invalid"' || return 1
  refused 'no scheme' '"uri": "disk0"' || return 1
  refused 'give one of uri' '"export": "x"' || return 1
  kit -o memory ${mib}M || return 1
  refused 'leave the name out' "\"path\": \"$dir/kit.sock\", \"export\": \"x\"" || return 1
  stop
  # Somebody else's server.
  free_port port
  serve python3 -c "
import socket, time
s = socket.create_server(('127.0.0.1', $port))
while True:
    c, _ = s.accept()
    c.sendall(b'SSH-2.0-OpenSSH_9.2p1 Debian\r\n')
    time.sleep(0.2)
"
  wait_while "$server" "a listener" listens "$port" || return 1
  refused 'no NBD server' "\"uri\": \"nbd://127.0.0.1:$port\""
}

configuration() { # saved, and loaded while the server is away
  kit memory ${mib}M || return 1
  map C "\"uri\": \"$kit_uri\", \"reconnect_delay_sec\": 1" || return 1
  call framework_get_config '{"name": "bdev"}' | grep '"bdev_nbd_create"' || return 1
  python3 - "$rpc" >saved.json <<'PY' || return 1
import json, subprocess, sys
call = lambda *a: json.loads(subprocess.check_output([sys.argv[1], "i.sock", *a]))
names = [s["subsystem"] for s in call("framework_get_subsystems")]
print(json.dumps({"subsystems": [{"subsystem": n, "config": call("framework_get_config", json.dumps({"name": n}))} for n in names]}))
PY
  stop
  kill -TERM "$initiator"
  wait "$initiator" || return 1
  start_initiator -c saved.json
  wait_for "device" has C state init || return 1
  kit memory ${mib}M || return 1
  wait_for "open device" has C state open || return 1
  wait_for "export" nbdinfo "$(out C)" || return 1
  copies C "$kit_uri" && unmap C
}

shipped_configuration() {
  kit memory ${mib}M || return 1
  sed "s|nbd://192.0.2.1/disk0|$kit_uri|; s|/var/tmp/remote1.sock|$dir/shipped.sock|" "$config" >shipped.json
  ./rnbd-initiator -c shipped.json -r shipped-rpc.sock &
  other=$!
  wait_while "$other" "shipped.sock" listens "$dir/shipped.sock" || return 1
  nbdcopy random.img "nbd+unix:///?socket=$dir/shipped.sock" && rm -f direct.img && nbdcopy "$kit_uri" direct.img &&
    cmp random.img direct.img || return 1
  kill -TERM "$other"
  wait "$other" || return 1
  other=''
}

direct() { # rnbd-initiator map path=nbd://…
  kit memory ${mib}M || return 1
  ./rnbd-initiator map "path=$kit_uri" --nbd-socket "$dir/direct.sock" >direct.log 2>&1 &
  other=$!
  wait_while "$other" "ready" grep -q '^ready: ' direct.log || { cat direct.log; return 1; }
  nbdcopy random.img "nbd+unix:///?socket=$dir/direct.sock" && rm -f direct.img && nbdcopy "$kit_uri" direct.img &&
    cmp random.img direct.img || return 1
  kill -INT "$other"
  wait "$other" || { cat direct.log; return 1; }
  other=''
  cat direct.log
  fails timeout -k 5 "$hang" ./rnbd-initiator map "path=nbd+unix:///?socket=$dir/nobody.sock" \
    --nbd-socket "$dir/direct.sock" >direct.log 2>&1 || return 1
  grep 'No such file' direct.log
}

: >initiator.log
: >server.log
start_initiator
call nbd_server_add_listener "{\"path\": \"$dir/out.sock\"}" >/dev/null
here "nbdkit: fixed newstyle, structured replies" dialect "fixed newstyle" structured ''
here "nbdkit: no structured replies" dialect "fixed newstyle" simple '' --no-sr
here "nbdkit: dialect simple" dialect "fixed newstyle" simple ', "dialect": "simple"'
here "nbdkit: dialect newstyle" dialect newstyle simple ', "dialect": "newstyle"'
here "nbdkit: mask-handshake=0" dialect newstyle simple '' --mask-handshake=0
here "nbdkit: mask-handshake=1" dialect "fixed newstyle" structured '' --mask-handshake=1
here "nbdkit: mask-handshake=2" dialect newstyle simple '' --mask-handshake=2
here "nbdkit: mask-handshake=3" dialect "fixed newstyle" structured '' --mask-handshake=3
here "nbdkit: oldstyle" oldstyle
here "nbdkit: block sizes" block_sizes
here "nbdkit: forced writes, native and emulated" forced_writes
here "nbdkit: no extents; qemu-nbd: holes" holes_and_extents
here "nbdkit: slow" slow_server
here "nbdkit: errors reach the user" errors_reach_the_user
here "nbdkit: read-only" read_only
here "nbdkit: several connections, and fewer where the server wants it so" several_connections
here "nbdkit: TLS, and everything that is wrong with it" encrypted
here "qemu-nbd" qemu_server
here "nbd-server" debian_server
here "rnbd-target: every dialect of today" own_server
here "rnbd-target: oldstyle" own_dialect oldstyle ''
here "rnbd-target: 1997" own_dialect 1997 ", \"dialect\": \"1997\", \"size\": $((mib << 20))"
here "fio verify while the server is killed three times" survives_kills
here "fio verify while one of four connections is cut again and again" survives_cuts
here "fio verify while the server stands still, with and without a timeout" survives_stalls
here "I/O waits, fails in its time, and goes on" waits_and_fails
here "zeroes that are written for hours end with their client" long_zeroes
here "the size follows the server's; a device that is another is refused" follows_the_size
here "what cannot be is refused" refuses
here "the configuration is saved, and waits for servers" configuration
here "the shipped configuration" shipped_configuration
here "the direct form" direct
kill -TERM "$initiator"
wait "$initiator"
initiator=''
echo "$passed passed, 0 failed"
