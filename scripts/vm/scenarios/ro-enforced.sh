# Read-only is the target's word, not the client's: the kernel client's read-only map, and a client that ignores it.
# timeout: 200
# long: 6.12
# shellcheck shell=bash
# shellcheck source=scripts/vm/lib.sh
source "$VM_DIR/lib.sh"

CLIENT=$BIN_DIR/hostile-client
[[ -x $CLIENT ]] || die "$CLIENT is missing: cargo build --release -p test-client"

cat >/run/target.json <<CONFIG
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "disk", "num_blocks": 32768, "block_size": 512}}]},
  {"subsystem": "rnbd", "config": [
    {"method": "rnbd_set_options", "params": {"queue_depth": 64, "max_io_size": 126976}},
    {"method": "rnbd_create_export", "params": {"device_path": "disk", "bdev_name": "disk"}},
    {"method": "rnbd_create_export", "params": {"device_path": "exported-ro", "bdev_name": "disk", "read_only": true}},
    {"method": "rnbd_create_listener", "params": {"adrfam": "ipv4", "traddr": "$(server_addr 1)", "trsvcid": "1234"}}]}
]}
CONFIG

setup_rxe 1
load_rnbd_client
start_target /run/target.json

dev=$(map_device writer "$(path_spec 1)" disk rw) || die "map disk read-write"
head -c 16M /dev/urandom >/run/data
must dd if=/run/data of="$dev" bs=1M oflag=direct status=none
unmap_device "$dev" || die "unmap"

dev=$(map_device reader "$(path_spec 1)" disk ro) || die "map disk read-only"
same() { cmp -s /run/data "$dev"; }
check_eq "the kernel knows that it is read-only" "$(blockdev --getro "$dev")" 1
check "reading works" same
check_fails "dd cannot write" dd if=/dev/zero of="$dev" bs=4k count=1 oflag=direct conv=notrunc
check_fails "discard is refused" blkdiscard "$dev"
mkdir -p /mnt/t
check_fails "no read-write mount" mount -o rw "$dev" /mnt/t
check_fails "a read-only export cannot be mapped read-write" map_device reader "" exported-ro rw
check "it can be mapped read-only" map_device reader "" exported-ro ro

for name in disk exported-ro; do
  check "a client that writes to $name all the same is refused" \
    "$CLIENT" "$(server_addr 1)" -r "$TARGET_SOCK" --write-ro "$name"
done
echo 3 >/proc/sys/vm/drop_caches
check "the data is unchanged" same
check "the target runs" kill -0 "$TARGET_PID"
unmap_device "$dev" || fail "unmap $dev"
finish
