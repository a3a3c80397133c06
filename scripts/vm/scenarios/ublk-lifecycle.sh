#!/bin/bash
# ublk disks come and go: refusals in words, removal under load, 50 starts and stops that leave nothing behind.
# timeout: 1200
# long: 6.12
source "$VM_DIR/lib.sh"
source "$VM_DIR/ublk.sh"
need_ublk
start_ublk
must urpc bdev_malloc_create '{"name": "Mem0", "num_blocks": 131072, "block_size": 512}' >/dev/null
must urpc bdev_malloc_create '{"name": "Mem1", "num_blocks": 131072, "block_size": 512}' >/dev/null
must urpc bdev_malloc_create '{"name": "Big0", "num_blocks": 4096, "block_size": 8192}' >/dev/null
refused "a core without a reactor" "core 7" ublk_create_target '{"cpumask": "0x80"}'
refused "no core mask" "hexadecimal" ublk_create_target '{"cpumask": "xyz"}'
must urpc ublk_create_target '{"cpumask": "0x1"}' >/dev/null
must start_disk Mem0 5

if [[ -x $TEST_DIR/examples/ublk_info ]]; then
  check_eq "libublk sees the same disk" "$("$TEST_DIR/examples/ublk_info" 5 2>/dev/null | grep -o 'state=1 queues=1 depth=128 max_io=524288\|sectors=131072 block=512' | xargs)" \
    "state=1 queues=1 depth=128 max_io=524288 sectors=131072 block=512"
fi

say "refusals"
refused "a number in use" "in use" ublk_start_disk '{"bdev_name": "Mem1", "ublk_id": 5}'
refused "an unknown bdev" "Nope" ublk_start_disk '{"bdev_name": "Nope", "ublk_id": 6}'
refused "blocks that ublk cannot have" "512 to 4096" ublk_start_disk '{"bdev_name": "Big0", "ublk_id": 6}'
refused "a queue too deep" "4096" ublk_start_disk '{"bdev_name": "Mem1", "ublk_id": 6, "queue_depth": 5000}'
refused "an unknown parameter" "queue_size" ublk_start_disk '{"bdev_name": "Mem1", "ublk_id": 6, "queue_size": 5}'
refused "an unknown disk" "no ublk disk 9" ublk_stop_disk '{"ublk_id": 9}'
refused "nothing to recover" "none of this number" ublk_recover_disk '{"bdev_name": "Mem1", "ublk_id": 9}'
refused "an unknown disk to show" "ublk_get_disks lists" ublk_get_disks '{"ublk_id": 9}'
check_eq "one disk is shown as SPDK shows it" "$(urpc ublk_get_disks | python3 -c 'import json, sys
d = json.load(sys.stdin)
print(len(d), *[d[0][k] for k in ("ublk_device", "id", "queue_depth", "num_queues", "bdev_name", "state")])')" \
  "1 /dev/ublkb5 5 128 1 Mem0 live"
check_eq "a bdev that cannot be has left nothing" "$(ls /dev/ublkc* | wc -l)" 1

say "a bdev goes under load"
start_load /dev/ublkb5 4k 32
check "I/O moves" wait_for load_moves
must urpc bdev_malloc_delete '{"name": "Mem0"}' >/dev/null
check "the disk goes with it" wait_for test ! -e /dev/ublkb5
wait_for _is_dead "$LOAD_PID" || kill -KILL "$LOAD_PID"
LOAD_PID=
check_eq "no disk is left" "$(urpc ublk_get_disks)" "[]"
check "its number is free" start_disk Mem1 5

say "a stop under load waits for what is in flight"
start_load /dev/ublkb5 64k 32
check "I/O moves" wait_for load_moves
check "stop" stop_disk 5
wait_for _is_dead "$LOAD_PID" || kill -KILL "$LOAD_PID"
LOAD_PID=
check "the program is well" urpc bdev_get_bdevs

say "an idle disk"
must start_disk Mem1 5
sleep 2
check_pid_asleep "an idle disk" "$UBLK_PID"
check "and wakes at once" dd if=/dev/ublkb5 of=/dev/null bs=4k count=64 iflag=direct status=none
must stop_disk 5

say "50 starts and stops"
must start_disk Mem1 0 '"num_queues": 2, "queue_depth": 256' && must stop_disk 0
fds=$(ublk_fds) bad=0
for ((i = 0; i < 50; i++)); do
  start_disk Mem1 $((i % 3)) "\"num_queues\": $((1 + i % 2)), \"queue_depth\": $((1 << i % 9))" || bad=$((bad + 1))
  dd if=/dev/ublkb$((i % 3)) of=/dev/null bs=64k count=4 iflag=direct status=none || bad=$((bad + 1))
  stop_disk $((i % 3)) || bad=$((bad + 1))
done
check_eq "all went well" "$bad" 0
fds_settle() { (($(ublk_fds) <= fds)); }
check "no descriptor is left: $fds before" wait_for fds_settle
check_fails "no device is left" bash -c 'ls /dev/ublkb* /dev/ublkc*'

say "several at once"
for i in 0 1 2 3; do start_disk Mem1 $i '"queue_depth": 16' & pids+=($!); done
bad=0
for pid in "${pids[@]}"; do wait "$pid" || bad=$((bad + 1)); done
check_eq "4 disks of one bdev, started at the same time" "$bad $(ls /dev/ublkb? | wc -l)" "0 4"
check "destroying the target stops them" urpc ublk_destroy_target
check_fails "no device is left" bash -c 'ls /dev/ublkb* /dev/ublkc*'
check "a new target" urpc ublk_create_target
must start_disk Mem1 1
stop_ublk
check_fails "SIGTERM stops disks" bash -c 'ls /dev/ublkb* /dev/ublkc*'
finish_ublk
