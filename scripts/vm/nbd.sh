# Kernel NBD devices of the target under test. Sourced by the nbd scenarios, after lib.sh.
# shellcheck shell=bash

# need_nbd: ends the scenario as skipped where the kernel has no driver. No udev runs here, so nobody opens the devices.
need_nbd() {
  modprobe nbd 2>/dev/null || skip "no nbd in kernel $(uname -r)"
  must wait_for test -b /dev/nbd0
}

# nbd_config [CALLS]: the configuration of the scenarios, with more calls at its end, on standard output.
nbd_config() {
  cat <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_uring_create", "params": {"name": "File0", "filename": "/scratch/disk.img", "block_size": 512}},
    {"method": "bdev_uring_create", "params": {"name": "Small0", "filename": "/scratch/small.img", "block_size": 512}},
    {"method": "bdev_malloc_create", "params": {"name": "Mem0", "num_blocks": 32768, "block_size": 4096}}]},
  {"subsystem": "nbd", "config": [${1:-}]}]}
JSON
}

# refused TEXT WORD METHOD PARAMS: a check that the call is refused, and that the refusal has WORD in it.
refused() {
  local text=$1 word=$2 error
  shift 2
  if error=$(rpc "$@" 2>&1 >/dev/null); then
    fail "$text: not refused"
  elif [[ $error != *"$word"* ]]; then
    fail "$text: no \"$word\" in: $error"
  else
    ok "$text"
  fi
}

# start_disk BDEV N [JSON_MEMBERS]: makes /dev/nbdN. stop_disk N: returns when it is free.
start_disk() {
  [[ $(rpc nbd_start_disk "{\"bdev_name\": \"$1\", \"nbd_device\": \"/dev/nbd$2\"${3:+, $3}}") == "/dev/nbd$2" ]]
}
stop_disk() { rpc nbd_stop_disk "{\"nbd_device\": \"/dev/nbd$1\"}" >/dev/null && is_free "$1"; }
is_free() { [[ ! -e /sys/block/nbd$1/pid && $(cat "/sys/block/nbd$1/size") == 0 ]]; }

# foreign_device N: somebody else's device, made by ioctl; the pid of its maker is in FOREIGN_PID.
foreign_device() {
  python3 -c 'import fcntl, os, socket, sys
ours, kernels = socket.socketpair()
fd = os.open(sys.argv[1], os.O_RDWR)
for call, argument in ((0xab00, kernels.fileno()), (0xab01, 512), (0xab07, 2048), (0xab03, 0)):
    fcntl.ioctl(fd, call, argument)' "/dev/nbd$1" &
  # shellcheck disable=SC2034 # for the scenario
  FOREIGN_PID=$!
  wait_for test -e "/sys/block/nbd$1/pid"
}
