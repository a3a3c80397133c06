#!/bin/sh
# Drives examples/echo_server with SPDK's own client, unmodified (PyPI package "spdk"), and compares what it prints.
#
# usage: rpc/tests/spdk_client.sh [VENV]     VENV: kept between runs; default: below Cargo's target directory
# Needs python3 with venv, and PyPI for the first run. Without them it says so and exits with 77.
set -eu
cd "$(dirname "$0")/../.."
build=${CARGO_TARGET_DIR:-build}
venv=${1:-$build/spdk-client}
if ! [ -x "$venv/bin/spdk-rpc" ]; then
    python3 -m venv "$venv" && "$venv/bin/pip" install --quiet spdk || {
        echo "SKIPPED: cannot install the Python package 'spdk' into $venv" >&2
        exit 77
    }
fi
cargo build --quiet -p rpc --example echo_server
dir=$(mktemp -d)
"$build/debug/examples/echo_server" "$dir/rpc.sock" &
server=$!
trap 'kill $server 2>/dev/null || true; rm -rf "$dir"' EXIT
failed=0

rpc() { "$venv/bin/spdk-rpc" -r 25 -s "$dir/rpc.sock" "$@" 2>&1; }

# equal NAME TEXT COMMAND...: the output of COMMAND must be TEXT.
equal() {
    name=$1 text=$2
    shift 2
    out=$("$@") || true
    if [ "$out" = "$text" ]; then echo "ok      $name"; else echo "FAILED  $name: '$out' is not '$text'"; failed=1; fi
}

# check NAME PART COMMAND...: the output of COMMAND, without line breaks, must contain PART.
check() {
    name=$1 part=$2
    shift 2
    out=$("$@" | tr -s '\n ' ' ') || true
    case $out in
        *"$part"*) echo "ok      $name" ;;
        *) echo "FAILED  $name: '$part' is not in: $out"; failed=1 ;;
    esac
}

check "list of methods" '[ "bdev_get_bdevs", "bdev_null_create", "rpc_get_methods",' rpc rpc_get_methods
check "escaped characters" '"version": "echo v1.0 \u00b5"' rpc spdk_get_version
equal "call with parameters" N0 rpc bdev_null_create N0 100 512
check "errno with our data" '"code": -17, "message": "bdev_null_create: there is a bdev '"'N0'" \
    rpc bdev_null_create N0 100 512
check "hint reaches the user" '"hint": "choose another name"' rpc bdev_null_create N0 100 512
check "unknown parameter" "unknown parameter 'uuid'; accepted: name, block_size" \
    rpc bdev_null_create N1 100 512 --uuid 11111111-2222-3333-4444-555555555555
check "absent method" "Method not found: 'bdev_malloc_create'" rpc bdev_malloc_create 64 512
check "no such device" '"message": "No such device"' rpc bdev_get_bdevs -b nothing

# More bytes than the 4096 that the client decodes at a time, with characters on every boundary.
long=$(python3 -c 'print("\u00e4\U0001f4be" * 3000)')
check "long names in UTF-8" '\ud83d\udcbe\u00e4' sh -c "
    '$venv/bin/spdk-rpc' -s '$dir/rpc.sock' bdev_null_create '$long' 1 512 >/dev/null
    '$venv/bin/spdk-rpc' -s '$dir/rpc.sock' bdev_get_bdevs"

cat > "$dir/calls" <<'CALLS'
bdev_null_create B0 1 512
bdev_null_create B1 1 512
bdev_null_create B0 1 512
CALLS
batch() { "$venv/bin/spdk-rpc" -s "$dir/rpc.sock" -b < "$dir/calls" 2>&1; }
check "batch" 'there is a bdev' batch
check "batch was executed" '"name": "B1"' rpc bdev_get_bdevs -b B1
server_mode() { "$venv/bin/spdk-rpc" -s "$dir/rpc.sock" --server < "$dir/calls" 2>&1; }
check "line mode" '**STATUS=1' server_mode
equal "kill is answered" '' rpc spdk_kill_instance SIGTERM
wait $server || { echo "FAILED  the server's exit status is $?"; failed=1; }
[ -e "$dir/rpc.sock" ] || [ -e "$dir/rpc.sock.lock" ] && { echo "FAILED  files are left behind"; failed=1; }
exit $failed
