#!/bin/bash
# A remote disk as a guest's vhost-user-blk disk: verified load, paths cut, server gone, initiator killed with -9.
# timeout: 900
# qemu: vhost
# long: 6.12/tap,REMOTE=kernel 6.12/tap
source "$VM_DIR/lib.sh"
source "$VM_DIR/vhost.sh"
# rnbd-initiator runs on the host, on soft-roce, and serves this guest a disk that it maps from this guest: from the kernel's
# rnbd_server (REMOTE=kernel) or from an rnbd-target, each on rxe.
TARGET_PROGRAM=rnbd-initiator
setup_net 2
setup_scratch
must modprobe loop
truncate -s 320M /run/remote.ext4
must mkfs.ext4 -q -F /run/remote.ext4
mkdir -p /remote
must mount -o loop /run/remote.ext4 /remote
truncate -s 128M /remote/disk.img

SERVER_PID=
start_server() {
  "$BIN_DIR/rnbd-target" -c /run/server.json -r /run/server.sock >>"$OUT_DIR/server.log" 2>&1 </dev/null &
  SERVER_PID=$!
  wait_for "$VM_DIR/rpc.py" /run/server.sock framework_wait_init || die "rnbd-target did not come up"
}
kill_server() {
  kill -KILL "$SERVER_PID"
  wait "$SERVER_PID" 2>/dev/null
}
if [[ $REMOTE == target ]]; then
  REMOTE_PATH=disk0
  cat >/run/server.json <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_uring_create", "params": {"name": "File0", "filename": "/remote/disk.img", "block_size": 512}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_create_export", "params": {"device_path": "disk0", "bdev_name": "File0"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "$(remote_addr 1)"}},
    {"method": "rnbd_create_listener", "params": {"traddr": "$(remote_addr 2)"}}]}]}
JSON
  start_server
else
  REMOTE_PATH=$(losetup -f --show --direct-io=on /remote/disk.img) || die "losetup"
  load_rnbd_server always_invalidate=$([[ $REMOTE == kernel ]] && echo Y || echo N)
fi

controller="{\"subsystem\": \"vhost_blk\", \"config\": [
  {\"method\": \"vhost_create_blk_controller\", \"params\": {\"ctrlr\": \"$HOST_JOB_DIR/remote\", \"dev_name\": \"Remote0\"}}]}"
initiator_config 2 '"reconnect_delay_sec": 1' "$controller" >/run/initiator.json
start_target /run/initiator.json
connected() {
  [[ $(rpc bdev_rnbd_get_sessions | python3 -c 'import json, sys
print(sum(p["state"] == "connected" for s in json.load(sys.stdin) for p in s["paths"]))') == "$1" ]]
}
check "both paths are connected" wait_for connected 2
disk=$(plug remote '"num-queues":2') || die "plug"
check_eq "its size" "$(blockdev --getsize64 "$disk")" $((128 << 20))
check "fio verify 4k" fio_verify "$disk" 4k 4
check "fio verify 512k" fio_verify "$disk" 512k 16
check "discard" blkdiscard -o 0 -l 4M "$disk"
check "write zeroes" blkdiscard -z -o 0 -l 8M "$disk"
check "they read as zeroes" cmp -n $((8 << 20)) "$disk" /dev/zero
echo 'start=2048, size=65536, type=83' | sfdisk -q "$disk" || fail "sfdisk"
check "the partition is seen" wait_for test -b "${disk}1"
check "mkfs.ext4" mkfs.ext4 -q -F "${disk}1"
mkdir -p /mnt/v
must mount "${disk}1" /mnt/v
check "copy a tree, flush it" bash -c "cp -r '$REPO_DIR/rtrs-proto/src' /mnt/v && sync -f /mnt/v"
must umount /mnt/v
check "fsck -fn is clean" e2fsck -fn "${disk}1"
must mount "${disk}1" /mnt/v
check "the files are the same" diff -r "$REPO_DIR/rtrs-proto/src" /mnt/v/src
must umount /mnt/v
must wipefs -qa "$disk"

sleep 2
check_asleep "an idle disk"

start_load "$disk" 4k
check "I/O moves" load_moves
say "one path is cut"
cut_path 1 host
check "the path is seen to be dead" wait_for connected 1
check "I/O goes on" load_moves
heal_path 1 host
check "it comes back" wait_for connected 2
say "all paths are cut for 10 s"
cut_path 1 host
cut_path 2 host
sleep 10
heal_path 1 host
heal_path 2 host
check "I/O goes on" wait_for load_moves
check "both paths come back" wait_for connected 2
if [[ $REMOTE == target ]]; then
  say "the server is killed with -9"
  kill_server
  sleep 2
  start_server
  check "both paths come back" wait_for connected 2
  check "I/O goes on" load_moves
fi
say "the initiator is killed with -9"
bad=0
for n in 1 2 3; do
  kill_target
  sleep "$n"
  start_target /run/initiator.json
  wait_for load_moves || bad=$((bad + 1))
done
check_eq "3 times: killed, started again, I/O goes on" "$bad" 0
check "no error reached fio, every block is right" stop_load
check "no I/O error in the guest" sh -c '! dmesg | grep -E "I/O error|blk_update_request"'
must unplug remote "$disk"

say "read-only"
check "delete the controller" rpc vhost_delete_controller "{\"ctrlr\":\"$HOST_JOB_DIR/remote\"}"
check "unmap" rpc bdev_rnbd_unmap '{"name": "Remote0"}'
check "map ro" rpc bdev_rnbd_map "{\"name\": \"Remote0\", \"sessname\": \"s1\", \"device_path\": \"$REMOTE_PATH\", \"access_mode\": \"ro\",
  \"paths\": [{\"src\": \"$(local_addr 1)\", \"dst\": \"$(remote_addr 1)\"}]}"
must create_controller ro Remote0
ro=$(plug ro) || die "plug ro"
check_eq "$ro is read-only" "$(blockdev --getro "$ro")" 1
check "it reads" dd if="$ro" of=/dev/null bs=64k count=16 iflag=direct status=none
check_fails "it refuses writes" dd if=/dev/zero of="$ro" bs=64k count=1 oflag=direct status=none
must unplug ro "$ro"
stop_target
[[ -z $SERVER_PID ]] || kill_server
finish
