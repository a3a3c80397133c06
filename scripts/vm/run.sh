#!/bin/bash
# Boots a kernel of the VM bench on one scenario and exits with its status: 0 passed, 1 failed (a failed check, or a
# kernel fault on the console), 2 could not be run, 77 skipped, 124 timed out.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
vm=$root/build/vm
# shellcheck source=scripts/vm/common.sh
source "$here/common.sh"

usage() {
  cat <<USAGE
Usage: scripts/vm/run.sh [options] SCENARIO [ARGUMENT...]
       scripts/vm/run.sh --list | [options] --shell
  -k SERIES      kernel series: ${VM_SERIES[*]} (default ${VM_SERIES[0]}), newest, or one of a newer Debian, such as 7.2
  -t SECONDS     how long the scenario takes at most (default: its "# timeout:" line, else 300). The guest is killed after
                 twice that, times TIME_SCALE: how much slower than usual this machine is (scripts/test.sh measures it)
  -n NET         where the server's side is: rxe (default), soft, tap; see scripts/vm/net.sh
  -o KEY=VALUE   environment variable for the scenario; repeatable
  -s CPUS        virtual CPUs (default 2)
  -m MEMORY      guest memory (default 4G, or what the scenario's "# memory:" line says)
  -q             do not copy the scenario's output to the terminal, only the verdict
  --shell        an interactive root shell in the guest, with lib.sh loaded; leave with "exit"
  --list         the scenarios, one line each
SCENARIO is a name from --list or the path of a script. Programs under test are found in \$BIN_DIR, which is
build/release of this repository unless set by -o BIN_DIR=...; tests and examples in \$TEST_DIR, which is build/debug, as
cargo test leaves them.
Logs: build/vm/logs/SCENARIO-KVER.log (output), .console.log (kernel messages); files that the scenario left in
\$OUT_DIR: build/vm/out/SCENARIO-KVER/.
USAGE
}

list() {
  local f
  for f in "$here"/scenarios/*.sh; do
    printf '%-28s %s\n' "$(basename "$f" .sh)" "$(sed -n '/^#!/!{s/^# *//p;q}' "$f")"
  done
}

arguments=("$@")
series=${VM_SERIES[0]} net=rxe limit='' cpus=2 memory='' quiet='' shell='' env=()
while [[ $# -gt 0 ]]; do
  case $1 in
    -k | -t | -n | -o | -s | -m) [[ $# -ge 2 ]] || vm_die "$1 needs a value, see --help" ;;&
    -k) series=$2; shift ;;
    -t) limit=$2; shift ;;
    -n) net=$2; shift ;;
    -o) [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || vm_die "-o $2: expected KEY=VALUE"; env+=("$2"); shift ;;
    -s) cpus=$2; shift ;;
    -m) memory=$2; shift ;;
    -q) quiet=yes ;;
    --shell) shell=yes ;;
    --list) list; exit 0 ;;
    -h | --help) usage; exit 0 ;;
    -*) usage >&2; vm_die "unknown option $1" ;;
    *) break ;;
  esac
  shift
done
vm_known "$series"
[[ $net == rxe || $net == soft || $net == tap ]] || vm_die "unknown network \"$net\"; there are: rxe soft tap"

if [[ -n $shell ]]; then
  scenario=shell script=$here/shell.sh limit=${limit:-86400}
else
  [[ $# -ge 1 ]] || { usage >&2; vm_die "no scenario named; --list shows them"; }
  scenario=$(basename "$1" .sh) script=$here/scenarios/$1.sh
  [[ -e $script ]] || script=$(realpath "$1")
  [[ -f $script ]] || vm_die "no scenario \"$1\"; there are: $(list | awk '{printf "%s ", $1}')"
  shift
fi
[[ -n $memory ]] || memory=$(sed -n 's/^# memory: *//p' "$script" | head -n 1)
memory=${memory:-4G}
[[ -n $limit ]] || limit=$(sed -n 's/^# timeout: *\([0-9]*\).*/\1/p' "$script" | head -n 1)
# It ends what hangs, nothing else: no verdict depends on it.
limit=$((${limit:-300} * 2 * ${TIME_SCALE:-1}))

# What is there may be of an earlier state of the scripts: that takes a moment to find out.
"$here/build.sh" -k "$series" >&2 || vm_die "linux $series could not be built"
read -r kver _ <"$vm/kernel-$series"
[[ $series != newest ]] || { series=$(readlink "$vm/kernel-newest"); series=${series#kernel-}; }
dir=$vm/$kver name=$scenario-$kver
[[ $net == rxe ]] || name+=-$net
for kv in "${env[@]}"; do [[ $kv == *_DIR=* ]] || name+=-${kv//[^A-Za-z0-9_=.]/}; done
log=$vm/logs/$name.log console=$vm/logs/$name.console.log out=$vm/out/$name
mkdir -p "$vm/logs"

# One run of a scenario and kernel at a time: they share logs and $OUT_DIR.
exec 8>"$vm/logs/$name.lock"
flock -n 8 || vm_die "$name runs already"
rm -rf "$out"
mkdir -p "$out"
: >"$log"
: >"$console"

job=$(mktemp -d "${TMPDIR:-/tmp}/vm-job.XXXXXX")
qemu_pid='' tail_pid='' host_pid='' netns=''
# shellcheck disable=SC2317 # called by the trap
cleanup() {
  [[ -z $qemu_pid ]] || kill -KILL "$qemu_pid" 2>/dev/null || true
  [[ -z $tail_pid ]] || kill "$tail_pid" 2>/dev/null || true
  [[ -z $host_pid ]] || kill "$host_pid" 2>/dev/null || true
  if [[ -n $netns ]]; then
    ip netns pids "$netns" | xargs -r kill -KILL
    ip netns del "$netns"
  fi
  rm -rf "$job"
}
# serve_host: runs the scripts that the guest puts into the job's host folder, each in the network namespace.
serve_host() {
  local ask
  while sleep 0.03; do
    for ask in "$job"/host/ask.*.sh; do
      [[ -e $ask ]] || continue
      mv "$ask" "${ask%.sh}.run"
      ask=${ask%.sh}
      {
        rc=0
        "${in_net[@]}" bash "$ask.run" >"$ask.out" 2>"$ask.err" </dev/null || rc=$?
        echo "$rc" >"$ask.rc.new"
        mv "$ask.rc.new" "$ask.rc"
      } &
    done
  done
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# The guest runs main.sh; the scenario's environment and arguments are spelled out in it.
{
  printf 'mkdir -p %q && mount --bind %q %q\n' "/lib/modules/$kver" "$dir/image/lib/modules/$kver" "/lib/modules/$kver"
  printf 'export VM_DIR=%q REPO_DIR=%q BIN_DIR=%q TEST_DIR=%q OUT_DIR=%q VM_SCENARIO=%q VM_SERIES_BOOTED=%q\n' \
    "$here" "$root" "$root/build/release" "$root/build/debug" /run/job/out "$scenario" "$series"
  printf 'export VM_NET=%q HOST_JOB_DIR=%q TIME_SCALE=%q\n' "$net" "$job" "${TIME_SCALE:-1}"
  for kv in "${env[@]}"; do printf 'export %s=%q\n' "${kv%%=*}" "${kv#*=}"; done
  echo 'cd /root'
  printf 'exec /bin/bash %q' "$script"
  [[ $# == 0 ]] || printf ' %q' "$@"
  echo
} >"$job/main.sh"
mkdir "$job/out"

# tap: a network namespace of the host with two TAP devices; QEMU and whatever the scenario asks for run in it.
in_net=() nics=()
if [[ $net == tap ]]; then
  [[ $(id -u) == 0 && -c /dev/net/tun ]] || vm_die "the network tap needs root and /dev/net/tun"
  netns=rnbd-vm-$$
  ip netns add "$netns"
  in_net=(ip netns exec "$netns")
  ip -n "$netns" link set lo up
  for i in 0 1; do
    ip -n "$netns" tuntap add "tap$i" mode tap vnet_hdr
    ip -n "$netns" link set "tap$i" mtu 9000 up
    nics+=(-netdev "tap,id=n$i,ifname=tap$i,script=no,downscript=no,vhost=off"
      -device "virtio-net-pci,netdev=n$i,mac=52:54:00:09:00:0$i,host_mtu=9000")
  done
  mkdir "$job/host"
  serve_host &
  host_pid=$!
fi

# shellcheck disable=SC2054 # the commas are QEMU's
qemu=(
  qemu-system-x86_64 -accel tcg,thread=multi -cpu max,-la57 -smp "$cpus" -m "$memory"
  -nodefaults -no-user-config -display none -no-reboot
  -kernel "$dir/vmlinuz" -initrd "$dir/initrd.gz"
  # The kernel patches its own code while it boots (static keys: the clock's, last). If another emulated CPU translates the
  # same code meanwhile, it may keep the half-patched version, and dies of an int3 that nobody knows. So the others
  # come up after that, see init.sh.
  # Emulated CPUs of a busy host stall for seconds: that is not a fault of the guest, so the watchdogs are lenient.
  -append "maxcpus=1 console=ttyS0 loglevel=5 panic=-1 mitigations=off nokaslr tsc=reliable nowatchdog rcupdate.rcu_cpu_stall_timeout=120 sysctl.kernel.hung_task_timeout_secs=90"
  -serial "file:$console"
  -device virtio-serial-pci -device virtconsole,chardev=hvc0
  -virtfs "local,path=/,mount_tag=host,security_model=none,multidevs=remap,readonly=on"
  -virtfs "local,path=$job,mount_tag=job,security_model=none"
)

# A scenario with a line "# qemu: vhost" plugs devices of the host's vhost-user back ends in: they need the guest's memory,
# and the scenario QEMU's monitor, see vhost.sh.
if grep -q '^# qemu: vhost' "$script"; then
  # With room for memory that is plugged in.
  qemu+=(-m "$memory,slots=4,maxmem=16G"
    -object "memory-backend-memfd,id=ram,size=$memory,share=on" -machine memory-backend=ram
    -qmp "unix:$job/qmp.sock,server=on,wait=off")
fi

# "# qemu: nvme": an NVMe drive of 256 MiB, and one of 16 MiB whose flushes fail; no driver of the guest has taken them.
if grep -q '^# qemu: nvme' "$script"; then
  truncate -s 256M "$job/nvme.img"
  truncate -s 16M "$job/no-flush.img"
  qemu+=(-drive "file=$job/nvme.img,if=none,id=nvme0,format=raw,discard=unmap" -device "nvme,serial=nvme0,drive=nvme0"
    -blockdev '{"driver": "raw", "node-name": "nvme1", "file": {"driver": "blkdebug", "image": {"driver": "file",
      "filename": "'"$job"'/no-flush.img"}, "inject-error": [{"event": "none", "iotype": "flush", "errno": 5}]}}'
    -device "nvme,serial=no-flush,drive=nvme1")
fi

started=$SECONDS verdict=''
if [[ -n $shell ]]; then
  # In the foreground, so that it owns the terminal; cleanup() has nothing to kill.
  "${in_net[@]}" "${qemu[@]}" "${nics[@]}" -chardev stdio,id=hvc0,signal=off || true
else
  "${in_net[@]}" "${qemu[@]}" "${nics[@]}" -chardev "file,id=hvc0,path=$log" </dev/null &
  qemu_pid=$!
  if [[ -z $quiet ]]; then
    tail -n +1 -s 0.2 -f --pid="$qemu_pid" "$log" &
    tail_pid=$!
  fi
  while kill -0 "$qemu_pid" 2>/dev/null; do
    if ((SECONDS - started >= limit)); then
      verdict="timed out after $limit s"
      kill -KILL "$qemu_pid"
      break
    fi
    sleep 0.2
  done
  wait "$qemu_pid" 2>/dev/null || true
  qemu_pid=''
  [[ -z $tail_pid ]] || wait "$tail_pid" || true
  tail_pid=''
fi
cp -r "$job/out/." "$out/"

# Kernel faults count as failures. A scenario that provokes one on purpose names it: "# allow-fault: REGEX".
fault='BUG[: ]|WARNING: |Oops|general protection fault|Kernel panic|blocked for more than|KASAN|UBSAN|detected stall|unable to handle|refcount_t|possible .*deadlock|Call Trace'
allow=$(sed -n 's/^# allow-fault: *//p' "$script" | paste -sd '|')
faults=$(tr -d '\r' <"$console" | grep -aE "$fault" | { if [[ -n $allow ]]; then grep -avE "$allow"; else cat; fi; }) || true

status=$(cat "$job/status" 2>/dev/null) || status=''
if [[ -n $verdict ]]; then
  rc=124
elif [[ -z $status ]]; then
  rc=2 verdict="the guest ended without a status"
elif [[ $status == 77 && -z $faults ]]; then
  rc=77 verdict=skipped
elif [[ $status != 0 ]]; then
  rc=1 verdict="exit status $status"
elif [[ -n $faults ]]; then
  rc=1 verdict="kernel fault"
else
  rc=0 verdict=passed
fi
if [[ $rc != 0 && $rc != 77 && -n $quiet ]]; then
  printf -- '--- failed checks in %s, and its end:\n' "$log"
  grep -a -B4 -A12 '\] FAIL ' "$log" | head -n 60 || true
  tail -n 5 "$log"
fi >&2
if [[ $rc == 124 || $rc == 2 ]]; then
  echo "--- end of the kernel console, $console:"
  tail -n 20 "$console"
fi >&2
if [[ -n $faults ]]; then
  printf -- '--- kernel faults in %s:\n%s\n' "$console" "$(head -n 20 <<<"$faults")" >&2
fi
printf '%s on %s: %s (%d s), log %s\n' "$scenario" "$kver" "$verdict" $((SECONDS - started)) "${log#"$root"/}" >&2

# again WHY: such a run says nothing of what was to be checked; it is repeated once, and this is told.
again() {
  cp "$console" "${console%.log}.first.log"
  echo "$1, see ${console%.log}.first.log; running once more" >&2
  cleanup
  trap - EXIT
  VM_AGAIN=yes exec "$0" "${arguments[@]}"
}
# Emulated CPUs with a thread each now and then crash a kernel (a double fault on a good address was seen) far from
# anything that this project touches. A crash that has RDMA, rtrs, rnbd or a block export anywhere in its trace is a result.
ours='rxe|rdma|ib_|rtrs|rnbd|nbd|ublk|vhost|virtio_blk|blk_|bio_'
if [[ $rc == 2 && -z ${VM_AGAIN:-} ]] && grep -aq 'Kernel panic' "$console" &&
  ! sed -n '/Oops\|BUG[: ]/,$p' "$console" | grep -av 'Modules linked in' | grep -aEq "$ours"; then
  again "the guest's kernel crashed outside RDMA and block code"
fi
# A host that stalls for seconds (an emulator that is stopped for 4 s shows it) lets rxe's timer for retransmissions run out,
# and rxe executes its own memory registrations again, which breaks the queue pair: the kernel client's requests fail, or
# hang for ever, with the kernel's server as well (net.sh). Only where rxe is on both ends, so that no packet of ours is to
# blame.
if [[ $rc != 0 && $net == rxe && -z ${VM_AGAIN:-} ]] && grep -aq 'rxe_reg_fast_mr: .* not free' "$console"; then
  again "rxe broke a queue pair by registering memory twice"
fi
# lib.sh, _dead_gsi: a bug of rxe that a cut link triggers now and then; seen with the kernel's client and server alone, too.
if [[ $rc != 0 && -z ${VM_AGAIN:-} ]] && grep -aq "^rxe's QP 1 is of no use any more" "$log"; then
  again "rxe lost the queue pair by which connections are made"
fi
exit "$rc"
