# The verbs provider contract on rdma-core over rxe, and two processes that play ping-pong with windows.
# timeout: 300
# long: 6.12
# shellcheck shell=bash
# shellcheck source=scripts/vm/lib.sh
source "$VM_DIR/lib.sh"

# The newest one that `cargo test` left.
contract=$(find "$TEST_DIR/deps" -maxdepth 1 -name 'contract-*' -type f -perm -u+x -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1 | cut -d' ' -f2-)
pingpong=$TEST_DIR/examples/pingpong
[[ -n $contract && -x $pingpong ]] ||
  die "contract-* or $pingpong is missing: cargo test -p verbs --no-run"

check_fails "no RDMA device yet: an error, no crash" "$pingpong" server "$(server_addr 1):7471"
setup_rxe 1
ulimit -l unlimited

export VERBS_CONTRACT
VERBS_CONTRACT=rdma-core@$(server_addr 1),$(client_addr 1)
# shellcheck disable=SC2086 # CONTRACT_FILTER is a list of test names, for a quick run of a few
timeout $((2 * HANG_LIMIT)) "$contract" --test-threads=1 ${CONTRACT_FILTER:-} >"$OUT_DIR/contract.log" 2>&1
check_eq "the contract" "$?" 0
sed 's/^/    /' "$OUT_DIR/contract.log"

"$pingpong" server 192.0.2.1:7471 2>"$OUT_DIR/no-device.log"
check "an address without a device is refused in words" grep "no RDMA device behind address 192.0.2.1" "$OUT_DIR/no-device.log"
timeout $HANG_LIMIT "$pingpong" server "$(server_addr 1):7471" >"$OUT_DIR/server.log" 2>&1 &
server=$!
must wait_for sh -c "rdma resource show cm_id | grep 'state LISTEN.*:7471'"
check "the client of another process" timeout $HANG_LIMIT "$pingpong" client "$(server_addr 1):7471" "$(client_addr 1)"
wait "$server"
check_eq "its server" "$?" 0
sed 's/^/    /' "$OUT_DIR/server.log"
finish
