#!/bin/bash
# A program with ublk disks is killed with -9 under verified load: the disk waits, the next run takes it over, no I/O fails.
# timeout: 1200
# long: 6.12 newest
source "$VM_DIR/lib.sh"
source "$VM_DIR/ublk.sh"
need_ublk
setup_scratch 512
truncate -s 128M /scratch/disk.img
truncate -s 64M /scratch/small.img
disk_config() {
  cat <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_uring_create", "params": {"name": "File0", "filename": "/scratch/disk.img", "block_size": 512}},
    {"method": "bdev_uring_create", "params": {"name": "Small0", "filename": "/scratch/small.img", "block_size": 512}},
    {"method": "bdev_malloc_create", "params": {"name": "Mem0", "num_blocks": 131072, "block_size": 512}}]},
  {"subsystem": "ublk", "config": [
    {"method": "ublk_create_target", "params": {"disable_user_copy": $1}}$2]}]}
JSON
}
start_call() { echo ", {\"method\": \"ublk_start_disk\", \"params\": {\"bdev_name\": \"$1\", \"ublk_id\": $2, \"num_queues\": 2}}"; }

# survive TEXT DISABLE_USER_COPY: three crashes under load, each followed by a start with the same configuration.
survive() {
  local text=$1 bad=0 n
  disk_config "$2" "$(start_call File0 1)" >/run/ublk.json
  start_ublk -c /run/ublk.json
  check "$text: the disk is there" wait_for test -b /dev/ublkb1
  urpc framework_get_config '{"name": "ublk"}' >/run/saved
  check_eq "$text: save_config has both calls" "$(python3 -c 'import json
print(*[c["method"] for c in json.load(open("/run/saved"))])')" "ublk_create_target ublk_start_disk"
  start_load /dev/ublkb1 4k 32
  check "$text: I/O moves" wait_for load_moves
  for n in 1 2 3; do
    kill_ublk
    sleep "$((n - 1))"
    start_ublk -c /run/ublk.json
    load_moves || bad=$((bad + 1))
  done
  check_eq "$text: 3 times killed and started, I/O goes on" "$bad" 0
  check "$text: no error reached fio, every block is right" stop_load
  check_eq "$text: it has its queues" "$(urpc ublk_get_disks | python3 -c 'import json, sys
print(*[(d["id"], d["num_queues"], d["state"]) for d in json.load(sys.stdin)])')" "(1, 2, 'live')"
  check "$text: stop" stop_disk 1
  stop_ublk
}
survive "user copy" false
survive "no user copy" true

say "by hand"
disk_config false "" >/run/bare.json
start_ublk -c /run/bare.json
must start_disk File0 1
must start_disk Mem0 2
must start_disk File0 3
dd if=/dev/urandom of=/run/rnd bs=1M count=4 status=none
must dd if=/run/rnd of=/dev/ublkb1 bs=1M oflag=direct status=none
kill_ublk
# Waits in the kernel until the disk is recovered.
dd if=/dev/ublkb1 of=/run/back bs=1M count=4 iflag=direct status=none & reader=$!
start_ublk -c /run/bare.json
refused "another bdev of another size" "sectors" ublk_recover_disk '{"bdev_name": "Small0", "ublk_id": 1}'
refused "a start of another bdev" "left over" ublk_start_disk '{"bdev_name": "Small0", "ublk_id": 1}'
refused "a start of what lost its contents" "lost its contents" ublk_start_disk '{"bdev_name": "Mem0", "ublk_id": 2}'
check_eq "ublk_recover_disk" "$(urpc ublk_recover_disk '{"bdev_name": "File0", "ublk_id": 1}')" 1
rc=0
wait "$reader" || rc=$?
check_eq "the read that waited ends well" "$rc" 0
check "with the right data" cmp /run/rnd /run/back
refused "it is recovered once" "in use" ublk_recover_disk '{"bdev_name": "File0", "ublk_id": 1}'
check "a left-over disk is removed" stop_disk 2
check "and its number is free" start_disk Mem0 2
check "another one too" stop_disk 3
stop_ublk
check_fails "nothing is left" bash -c 'ls /dev/ublkb* /dev/ublkc*'
finish_ublk
