#!/bin/bash
# Start-up errors of listeners: a busy port, a foreign address, no device, each end with one clear line and status 1.
# timeout: 120
# long: 6.12 6.12/soft
source "$VM_DIR/lib.sh"
setup_net 1
need_target
# config NAME ADDRESS PROVIDER: a configuration with one listener, in a folder that the server's side knows.
config() {
  echo '{"subsystems": [{"subsystem": "rnbd", "config": [{"method": "rnbd_create_listener",
    "params": {"traddr": "'"$2"'", "provider": "'"$3"'"}}]}]}' >"$OUT_DIR/$1.json"
}
# fails_with TEXT NAME: the program ends with status 1, and its only line on standard error has TEXT.
fails_with() {
  local out rc=0
  out=$(on_server "timeout $HANG_LIMIT '$BIN_DIR/rnbd-target' -L ERROR -c '$(server_out_dir)/$2.json' -r /run/second.sock" 2>&1) || rc=$?
  echo "$out"
  [[ $rc == 1 && $(wc -l <<<"$out") == 1 && $out == *"$1"* ]]
}
own=$(server_addr 1)
config own "$own" auto
config own-rdma-core "$own" rdma-core
config own-soft-roce "$own" soft-roce
config other 192.0.2.7 auto
config other-rdma-core 192.0.2.7 rdma-core
config other-soft-roce 192.0.2.7 soft-roce

start_target "$OUT_DIR/own.json"
no_address="192.0.2.7 is no address of this host"
case $VM_NET in
  rxe)
    check "a busy port" fails_with "another listener has this address" own
    check "a UDP port that rxe has" fails_with "the kernel's rdma_rxe, owns UDP port 4791 on $own" own-soft-roce
    check "an address without an RDMA device" fails_with "no RDMA device behind address 192.0.2.7" other-rdma-core
    ;;
  soft)
    check "a busy port" fails_with "another program listens there" own
    check "a foreign address, and rdma-core" fails_with "no RDMA device behind address 192.0.2.7" other-rdma-core
    check "an address without an RDMA device" fails_with "no RDMA device behind address $own" own-rdma-core
    ;;
  tap)
    # What rdma-core says depends on what the host has.
    check "a busy port" fails_with "another program listens there" own
    check "no RDMA device" fails_with "RDMA device" own-rdma-core
    ;;
esac
check "a foreign address" fails_with "$no_address" other
check "a foreign address, and soft-roce" fails_with "$no_address" other-soft-roce
check "the target runs" target_lives
stop_target
finish
