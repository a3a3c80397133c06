# The bench itself: kernel pair on two paths; one is cut under load, heals, is disconnected by the server; no I/O fails.
# timeout: 400
# long: 6.12 newest
# shellcheck shell=bash
# shellcheck source=scripts/vm/lib.sh
source "$VM_DIR/lib.sh"

setup_rxe 2
setup_ram 1 64
load_rnbd_server
load_rnbd_client
dev=$(map_device s1 "$(path_spec 1 2)" /dev/ram0 rw) || die "map /dev/ram0"

start_load "$dev" 4k
sleep 2
cut_path 1
check "path 1 dies when its packets are lost" wait_for path_is s1 1 disconnected
check "path 2 stays" path_is s1 2 connected
check "I/O goes on over path 2" load_moves
heal_path 1
check "path 1 comes back by itself" wait_for path_is s1 1 connected
must server_disconnect s1 1
check "path 1 dies when the server disconnects it" wait_for path_is s1 1 disconnected
check "path 1 comes back when asked to" wait_for reconnect_path s1 1
check "path 1 is connected" path_is s1 1 connected
check "I/O goes on" load_moves
check "no error reached fio" stop_load
check "unmap" unmap_device "$dev"
finish
