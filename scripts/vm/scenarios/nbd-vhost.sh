#!/bin/bash
# A disk of an NBD server as a guest's vhost-user-blk disk: verified load, file system, server and initiator killed with -9.
# timeout: 600
# qemu: vhost
# long: 6.12/tap
source "$VM_DIR/lib.sh"
source "$VM_DIR/vhost.sh"
# rnbd-initiator runs on the host; this guest serves the disk that it uses, by TCP: with nbdkit, then with rnbd-target.
TARGET_PROGRAM=rnbd-initiator
command -v nbdkit >/dev/null || die "nbdkit is missing: apt-get install nbdkit"
setup_net 1
must modprobe loop
truncate -s 320M /run/remote.ext4
must mkfs.ext4 -q -F /run/remote.ext4
mkdir -p /remote
must mount -o loop /run/remote.ext4 /remote
truncate -s 128M /remote/disk.img
cat >/run/server.json <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_uring_create", "params": {"name": "File0", "filename": "/remote/disk.img", "block_size": 512}}]},
  {"subsystem": "nbd_server", "config": [
    {"method": "nbd_server_create_export", "params": {"name": "disk", "bdev_name": "File0"}},
    {"method": "nbd_server_add_listener", "params": {"traddr": "$(client_addr 1)", "trsvcid": "10809"}}]}]}
JSON

SERVER_PID=
start_server() {
  case $1 in
    nbdkit) nbdkit -f -i "$(client_addr 1)" -p 10809 file /remote/disk.img >>"$OUT_DIR/server.log" 2>&1 </dev/null & ;;
    rnbd-target) "$BIN_DIR/rnbd-target" -c /run/server.json -r /run/server.sock >>"$OUT_DIR/server.log" 2>&1 </dev/null & ;;
  esac
  SERVER_PID=$!
}
end_server() { # SIGNAL
  kill "-$1" "$SERVER_PID"
  wait "$SERVER_PID" 2>/dev/null
  SERVER_PID=
}

cat >/run/initiator.json <<JSON
{"subsystems": [
  {"subsystem": "bdev_rnbd", "config": [
    {"method": "bdev_nbd_create", "params": {"name": "Remote0", "uri": "nbd://$(client_addr 1)/disk",
      "reconnect_delay_sec": 1}}]},
  {"subsystem": "vhost_blk", "config": [
    {"method": "vhost_create_blk_controller", "params": {"ctrlr": "$HOST_JOB_DIR/remote", "dev_name": "Remote0"}}]}]}
JSON
state_is() { [[ $(rpc bdev_nbd_get_devices | python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["state"])') == "$1" ]]; }

start_server nbdkit
start_target /run/initiator.json
check "the device is open" wait_for state_is open
disk=$(plug remote '"num-queues":2') || die "plug"
check_eq "its size" "$(blockdev --getsize64 "$disk")" $((128 << 20))
check "fio verify 4k" fio_verify "$disk" 4k 4
check "fio verify 512k" fio_verify "$disk" 512k 16
check "write zeroes" blkdiscard -z -o 0 -l 8M "$disk"
check "they read as zeroes" cmp -n $((8 << 20)) "$disk" /dev/zero
check "mkfs.ext4" mkfs.ext4 -q -F "$disk"
mkdir -p /mnt/v
must mount "$disk" /mnt/v
check "copy a tree, flush it" bash -c "cp -r '$REPO_DIR/nbd-proto/src' /mnt/v && sync -f /mnt/v"
must umount /mnt/v
check "fsck -fn is clean" e2fsck -fn "$disk"
must mount -o ro "$disk" /mnt/v
check "the files are the same" diff -r "$REPO_DIR/nbd-proto/src" /mnt/v/src
must umount /mnt/v

start_load "$disk" 4k
check "I/O moves" load_moves
for server in nbdkit rnbd-target rnbd-target; do
  say "the server is killed with -9; $server takes its place"
  end_server KILL
  check "the loss is seen" wait_for state_is closed
  sleep 1
  start_server "$server"
  check "it is connected again" wait_for state_is open
  check "I/O goes on" load_moves
done
say "the initiator is killed with -9"
for n in 1 2; do
  kill_target
  sleep "$n"
  start_target /run/initiator.json
  check "started again, I/O goes on" load_moves
done
check "no error reached fio, every block is right" stop_load
check "no I/O error in the guest" sh -c '! dmesg | grep -E "I/O error|blk_update_request"'
must unplug remote "$disk"
stop_target
end_server TERM
finish
