# vhost-user-blk devices of a target on the host, plugged into this guest while it runs. For scenarios with a line
# "# qemu: vhost", on the network tap: source "$VM_DIR/vhost.sh" after lib.sh.
# shellcheck shell=bash

# Sockets are on the host, in the job's folder.
[[ $VM_NET == tap ]] || skip "a vhost-user back end runs on the host: run with -n tap"
TARGET_SOCK=$HOST_JOB_DIR/target.sock

# qmp COMMAND [JSON_ARGUMENTS]: asks QEMU's monitor, on the host; prints what it returns.
qmp() { on_server "'$VM_DIR/qmp.py' '$HOST_JOB_DIR/qmp.sock' ${*@Q}"; }

# create_controller NAME BDEV [JSON_MEMBERS]: a vhost controller of the target, in the job's folder.
create_controller() {
  rpc vhost_create_blk_controller "{\"ctrlr\":\"$HOST_JOB_DIR/$1\",\"dev_name\":\"$2\"${3:+,$3}}" >/dev/null
}

# plug NAME [PROPERTIES]: plugs controller NAME in and prints its device, /dev/vdX. PROPERTIES are those of QEMU's
# vhost-user-blk-pci as members of a JSON object.
plug() {
  local name=$1 dev
  modprobe virtio_blk
  qmp chardev-add "{\"id\":\"c-$name\",\"backend\":{\"type\":\"socket\",\"data\":{
    \"addr\":{\"type\":\"unix\",\"data\":{\"path\":\"$HOST_JOB_DIR/$name\"}},\"server\":false,\"reconnect\":1}}}" >/dev/null || return 1
  qmp device_add "{\"driver\":\"vhost-user-blk-pci\",\"id\":\"d-$name\",\"chardev\":\"c-$name\"${2:+,$2}}" >/dev/null || return 1
  # Its place in QEMU's object tree does not tell its name in the guest; the serial number is the bdev's.
  dev=$(rpc vhost_get_controllers "{\"name\":\"$HOST_JOB_DIR/$name\"}" |
    python3 -c 'import json,sys; print(json.load(sys.stdin)[0]["backend_specific"]["block"]["bdev"])') || return 1
  wait_for _find_serial "$dev" || { echo "no disk with serial $dev" >&2; return 1; }
  _find_serial "$dev"
}

_find_serial() {
  local s
  for s in /sys/block/vd*/serial; do
    [[ -e $s && $(cat "$s") == "$1" ]] || continue
    s=${s%/serial}
    echo "/dev/${s##*/}"
    return 0
  done
  return 1
}

# unplug NAME DEVICE: takes it out again.
unplug() {
  local name=$1 dev=$2
  qmp device_del "{\"id\":\"d-$name\"}" >/dev/null || return 1
  wait_for test ! -e "$dev" || return 1
  wait_for qmp chardev-remove "{\"id\":\"c-$name\"}"
}

# kill_target: as a crash would; start_target starts it again.
kill_target() {
  must on_server "kill -KILL $TARGET_PID"
  wait_for _target_dead || die "the target survived"
}
_target_dead() { ! on_server "kill -0 $TARGET_PID"; }
