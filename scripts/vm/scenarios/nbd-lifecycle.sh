#!/bin/bash
# Kernel NBD devices: never somebody else's, gone when they are stopped by whomever, and nothing of them is left.
# timeout: 600
# long: 6.12 6.1
source "$VM_DIR/lib.sh"
source "$VM_DIR/nbd.sh"
need_nbd
setup_scratch 512
truncate -s 64M /scratch/disk.img
truncate -s 64M /scratch/small.img
nbd_config >/run/target.json
start_target /run/target.json -m "${NBD_CPUMASK:-0x3}"
fds=$(target_fds)

say "devices that are somebody else's"
must foreign_device 5
refused "made by somebody else" "made by process $FOREIGN_PID (python3)" nbd_start_disk '{"bdev_name": "File0", "nbd_device": "/dev/nbd5"}'
kill "$FOREIGN_PID"
must wait_for is_free 5
python3 -c 'import time; fd = open("/dev/nbd6"); time.sleep(600)' &
opener=$!
must wait_for bash -c "readlink /proc/$opener/fd/* | grep -q nbd6"
for control in netlink ioctl; do
  refused "just open, $control" "process $opener (python3) has /dev/nbd6 open" nbd_start_disk \
    "{\"bdev_name\": \"File0\", \"nbd_device\": \"/dev/nbd6\", \"control\": \"$control\"}"
done
kill "$opener"
must start_disk File0 7
refused "served already" "serves bdev File0 already" nbd_start_disk '{"bdev_name": "Small0", "nbd_device": "/dev/nbd7"}'
"$BIN_DIR/rnbd-target" -c /dev/stdin -r /run/second.sock -m 0x1 >"$OUT_DIR/second.log" 2>&1 <<'JSON' &
{"subsystems": [{"subsystem": "bdev", "config": [{"method": "bdev_null_create", "params": {"name": "N0", "num_blocks": 2048, "block_size": 512}}]}]}
JSON
second=$!
must wait_for "$VM_DIR/rpc.py" /run/second.sock framework_wait_init
error=$("$VM_DIR/rpc.py" /run/second.sock nbd_start_disk '{"bdev_name": "N0", "nbd_device": "/dev/nbd7"}' 2>&1)
check "another instance of the program leaves it alone, too" grep -q "belongs to process $TARGET_PID" <<<"$error"
kill "$second"
refused "no such device" "is no NBD device" nbd_start_disk '{"bdev_name": "File0", "nbd_device": "/dev/sda"}'
refused "no such bdev" "no bdev named" nbd_start_disk '{"bdev_name": "Nix", "nbd_device": "/dev/nbd8"}'

say "disconnected by others"
must python3 -c 'import fcntl, os; fcntl.ioctl(os.open("/dev/nbd7", os.O_RDONLY), 0xab08)'
gone() { [[ $(rpc nbd_get_disks | tr -d ' \n') == "[]" ]]; }
check "the disk is gone" wait_for gone
check "and so is the device" wait_for is_free 7
say "a bdev that is deleted"
must start_disk Mem0 3
must rpc bdev_malloc_delete '{"name": "Mem0"}' >/dev/null
check "its device is gone" wait_for is_free 3

say "50 times"
# In one process: starting Python 150 times would take longer than all of it.
cycles() {
  PYTHONPATH=$VM_DIR python3 - "$TARGET_SOCK" <<'PYTHON'
import os, sys
from rpc import call

def done(method, **params):
    answer = call(sys.argv[1], method, params)
    assert "result" in answer, (n, method, answer)
    return answer["result"]

for n in range(50):
    ways = {"connections": 1 + n % 3, "control": "ioctl" if n % 5 == 0 else "auto"}
    device = done("nbd_start_disk", bdev_name="File0", nbd_device="/dev/nbd1", **ways)
    fd = os.open(device, os.O_RDONLY)
    assert len(os.pread(fd, 4096, 0)) == 4096
    os.close(fd)
    assert done("nbd_stop_disk", nbd_device=device) is True
    assert not os.path.exists("/sys/block/nbd1/pid")
PYTHON
}
check "50 times started, read and stopped" cycles
check_eq "no descriptor is left" "$(target_fds)" "$fds"
no_threads() { ! grep -h '^nbd' "/proc/$TARGET_PID"/task/*/comm; }
check "no thread is left" wait_for no_threads
check_fails "no claim is left" bash -c 'ls /run/rnbd/nbd*'
must start_disk File0 1
stop_target
check "a device goes with the program that ends in order" is_free 1
check_fails "no error in the log" grep -E ' ERROR ' "$TARGET_LOG"
finish
