#!/bin/bash
# A guest whose memory the host takes back (balloon, free page reporting) and gives more of (a DIMM), and which chooses its write
# cache: nothing is written from, or read into, pages that the guest does not have; a choice outlives stops and crashes.
# timeout: 1500
# qemu: vhost
# memory: 1G
# long: 6.12/tap
source "$VM_DIR/lib.sh"
source "$VM_DIR/vhost.sh"
modprobe virtio_balloon || skip "no virtio_balloon in kernel $(uname -r)"
cat >/run/target.json <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_uring_create", "params": {"name": "File0", "filename": "$HOST_JOB_DIR/disk.img", "block_size": 512}}]},
  {"subsystem": "vhost_blk", "config": [
    {"method": "vhost_create_blk_controller", "params": {"ctrlr": "$HOST_JOB_DIR/file0", "dev_name": "File0"}}]}]}
JSON
must on_server "truncate -s 256M '$HOST_JOB_DIR/disk.img'"
start_target /run/target.json
disk=$(plug file0 '"num-queues":2') || die "plug file0"
session() { rpc vhost_get_controllers | python3 -c "import json,sys; print(json.load(sys.stdin)[0]['sessions'][0]['$1'])"; }
memory() { qmp query-balloon | python3 -c 'import json,sys; print(json.load(sys.stdin)["actual"] >> 20)'; }
is_about() { local now; now=$(memory) && ((now <= $1 + 8 && now >= $1 - 8)); }
# Buffers out of whatever memory is free: 64 of 1 MiB, twice.
use() { fio_verify "$disk" 1m 96 32 2; }
# resident: KiB of the guest's memory that the target has mapped and touched.
resident() { on_server "awk '/^RssShmem/ {print \$2}' /proc/$TARGET_PID/status"; }

say "a disk makes no memory resident"
before=$(resident)
check "reads and writes" use
check "what is mapped is what was used: $before, now $(resident) KiB" test "$(resident)" -lt 524288

say "a balloon"
must qmp device_add '{"driver":"virtio-balloon-pci","id":"balloon0","free-page-reporting":true}' >/dev/null
check "it is there" wait_for is_about 1024
for round in 1 2 3; do
  must qmp balloon '{"value":536870912}' >/dev/null
  check "round $round: half of the memory is taken back" wait_for is_about 512
  check "round $round: verified load with the rest" use
  must qmp balloon '{"value":1073741824}' >/dev/null
  check "round $round: and comes again" wait_for is_about 1024
  check "round $round: verified load in it" use
done
say "free pages are reported"
cp /dev/zero /dev/shm/fill 2>/dev/null & filler=$!
wait_for sh -c '[ $(stat -c %s /dev/shm/fill) -gt 300000000 ]'
kill $filler
wait $filler 2>/dev/null
rm -f /dev/shm/fill
echo 3 >/proc/sys/vm/drop_caches
sleep 5
check "verified load in pages that come anew" use

say "a DIMM"
must qmp object-add '{"qom-type":"memory-backend-memfd","id":"dimm","size":536870912,"share":true}' >/dev/null
must qmp device_add '{"driver":"pc-dimm","id":"dimm0","memdev":"dimm"}' >/dev/null
online() { for block in /sys/devices/system/memory/memory*/state; do grep -q online "$block" || echo online >"$block" || return 1; done; }
more() { online && (($(awk '/MemTotal/ {print $2}' /proc/meminfo) > 1300000)); }
check "the guest has it" wait_for more
check "verified load" use

say "write cache"
check_eq "write back at first" "$(session write_cache)" True
check "the guest turns it off" sh -c "echo 'write through' >/sys/block/${disk#/dev/}/cache_type"
check_eq "the target knows" "$(session write_cache)" False
stop_and_cont() { on_server "'$VM_DIR/qmp.py' '$HOST_JOB_DIR/qmp.sock' stop && sleep 1 && '$VM_DIR/qmp.py' '$HOST_JOB_DIR/qmp.sock' cont"; }
must stop_and_cont >/dev/null
check "reads" dd if="$disk" of=/dev/null bs=4k count=1 iflag=direct status=none
check_eq "still off after stop and cont" "$(session write_cache)" False
kill_target
start_target /run/target.json
check "reads, of a new target" dd if="$disk" of=/dev/null bs=4k count=1 iflag=direct status=none
check_eq "still off" "$(session write_cache)" False
check "the guest turns it on" sh -c "echo 'write back' >/sys/block/${disk#/dev/}/cache_type"
kill_target
start_target /run/target.json
check "reads, of a new target" dd if="$disk" of=/dev/null bs=4k count=1 iflag=direct status=none
check_eq "still on" "$(session write_cache)" True

say "a resize while nobody serves"
kill_target
must on_server "truncate -s 384M '$HOST_JOB_DIR/disk.img'"
start_target /run/target.json
check "the guest sees the new size" wait_for sh -c "[ \$(blockdev --getsize64 $disk) = $((384 << 20)) ]"
check "no I/O error in the guest" sh -c '! dmesg | grep -E "I/O error|blk_update_request"'
must unplug file0 "$disk"
check "the target ends in order" stop_target
finish
