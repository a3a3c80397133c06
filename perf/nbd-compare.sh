#!/bin/bash
# The NBD server beside others: fio's nbd engine on core 0, the server on core 1, a unix socket between them, 256 MiB of
# random data in memory. Servers take turns, in the other order every second round. Prints a table with medians, minima
# and maxima; figures of a machine that does other things are worth nothing.
# "rnbd" polls as it does by default, for 1 ms after the last work, which counts as its CPU; "rnbd-sleep" sleeps at once.
# -f gives servers and fio real-time priority (root), so that other work of the machine disturbs them less.
# -p has rnbd-perf put the load, with bdev_nbd, in place of fio, which is slower than the servers.
# Usage: perf/nbd-compare.sh [-fp] [-n ROUNDS] [-t SECONDS_PER_ROW] [-s "SERVER…"] [-r "ROW…"] [BIN_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=5 seconds=3 servers="rnbd rnbd-sleep nbdkit qemu-nbd nbd-server" rows="" real=() load=fio
while getopts fpn:t:s:r: option; do
  case $option in
    f) real=(chrt -f 10) ;;
    p) load=rnbd-perf ;;
    n) rounds=$OPTARG ;; t) seconds=$OPTARG ;; s) servers=$OPTARG ;; r) rows=$OPTARG ;;
    *) sed -n '2,8s/^# //p' "$0" >&2; exit 2 ;;
  esac
done
shift $((OPTIND - 1))
bin=$(realpath "${1:-build/release}")
for tool in fio nbdkit qemu-nbd nbd-server nbdcopy nbdinfo; do
  command -v $tool >/dev/null || { echo "skipped: $tool is missing (apt-get install fio nbdkit qemu-utils nbd-server libnbd-bin)"; exit 77; }
done
[[ $(nproc) -ge 2 ]] || { echo "skipped: two cores are needed"; exit 77; }

dir=$(mktemp -d /dev/shm/nbd-compare.XXXXXX)
pids=()
cleanup() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  rm -rf "$dir"
}
trap cleanup EXIT

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

serve() { # NAME COMMAND...: on core 1, its number in NAME.pid
  local name=$1
  shift
  "${real[@]}" taskset -c 1 "$@" >"$dir/$name.log" 2>&1 &
  pids+=($!)
  echo $! >"$dir/$name.pid"
}

start() { # NAME
  case $1 in
    rnbd | rnbd-sleep)
      local spin=1000
      [[ $1 == rnbd ]] || spin=0
      cat >"$dir/$1.json" <<JSON
{"subsystems": [
  {"subsystem": "framework", "config": [
    {"method": "framework_set_idle_policy", "params": {"policy": "adaptive", "spin_us": $spin}}]},
  {"subsystem": "bdev", "config": [
    {"method": "bdev_malloc_create", "params": {"name": "M0", "num_blocks": 65536, "block_size": 4096}}]},
  {"subsystem": "nbd_server", "config": [
    {"method": "nbd_server_create_export", "params": {"name": "disk", "bdev_name": "M0"}},
    {"method": "nbd_server_add_listener", "params": {"path": "$dir/$1.sock"}}]}]}
JSON
      serve "$1" "$bin/rnbd-target" -c "$dir/$1.json" -r "$dir/$1-rpc.sock" -m 0x2 ;;
    nbdkit) serve nbdkit nbdkit -f -U "$dir/nbdkit.sock" memory 256M ;;
    qemu-nbd)
      truncate -s 256M "$dir/qemu.img"
      serve qemu-nbd qemu-nbd -t -e 4 -f raw -k "$dir/qemu-nbd.sock" "$dir/qemu.img" ;;
    nbd-server)
      truncate -s 256M "$dir/nbd.img"
      printf '[generic]\nunixsock = %s\n[disk]\nexportname = %s\nflush = true\n' "$dir/nbd-server.sock" "$dir/nbd.img" \
        >"$dir/nbd-server.conf"
      # It goes to the background by itself: in the foreground it serves one client, and not well. A port of its own, or
      # it would want 10809 on every address.
      sed -i "1a port = $(free_port)\nlistenaddr = 127.0.0.1" "$dir/nbd-server.conf"
      "${real[@]}" taskset -c 1 nbd-server -C "$dir/nbd-server.conf" -p "$dir/nbd-server.pid"
      for ((i = 0; i < 100; i++)); do [[ -s $dir/nbd-server.pid ]] && break; sleep 0.1; done
      pids+=("$(<"$dir/nbd-server.pid")") ;;
    *) echo "no server named $1: rnbd, rnbd-sleep, nbdkit, qemu-nbd, nbd-server" >&2; exit 2 ;;
  esac
  local export=''
  [[ $1 == rnbd* || $1 == nbd-server ]] && export=disk
  echo "nbd+unix:///$export?socket=$dir/$1.sock" >"$dir/$1.uri"
  for ((i = 0; i < 100; i++)); do
    nbdinfo --size "$(<"$dir/$1.uri")" >/dev/null 2>&1 && return
    sleep 0.1
  done
  cat "$dir/$1.log"
  echo "$1 does not answer" >&2
  exit 1
}

dd if=/dev/urandom of="$dir/random.img" bs=1M count=256 status=none
for server in $servers; do
  start "$server"
  nbdcopy "$dir/random.img" "$(<"$dir/$server.uri")"
done
rm "$dir/random.img"
exec 3>&1
python3 - "$dir" "$rounds" "$seconds" "$servers" "$rows" "${real[*]}" "$load" "$bin" <<'PY'
import json, os, statistics, subprocess, sys
folder, rounds, seconds, servers, wanted = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4].split(), sys.argv[5]
real, load, binaries = sys.argv[6].split(), sys.argv[7], sys.argv[8]
ROWS = [(f"{bs} {rw} QD{depth}", rw, bs, depth) for rw, bs, depth in (
    ("randread", "4k", 1), ("randread", "4k", 32), ("read", "128k", 8),
    ("randwrite", "4k", 1), ("randwrite", "4k", 32), ("write", "128k", 8))]
ROWS = [row for row in ROWS if not wanted or any(word in row[0] for word in wanted.split(","))]
TICK = 1 / os.sysconf("SC_CLK_TCK")


def family(pid):
    """The process and its children: nbd-server forks one for each client."""
    pids = [pid]
    for child in os.listdir("/proc"):
        if child.isdigit():
            try:
                with open(f"/proc/{child}/stat") as stat:
                    if int(stat.read().rsplit(")", 1)[1].split()[1]) == pid:
                        pids.append(int(child))
            except OSError:
                pass
    return pids


def cpu(pid):
    """Seconds of CPU so far, those of children that have ended included."""
    total = 0
    for p in family(pid):
        try:
            with open(f"/proc/{p}/stat") as stat:
                fields = stat.read().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += sum(int(n) for n in fields[11:15])
    return total * TICK


def measure(server, rw, bs, depth):
    with open(f"{folder}/{server}.pid") as f:
        pid = int(f.read())
    with open(f"{folder}/{server}.uri") as f:
        uri = f.read().strip()
    before = cpu(pid)
    if load == "rnbd-perf":
        out = subprocess.run(
            [*real, "taskset", "-c", "0", f"{binaries}/rnbd-perf", "-T", uri, "-w", rw, "-o", bs, "-q", str(depth), "-t", seconds,
             "--warm-up", "0", "-m", "0x1", "--quiet", "--json", "-"], check=True, capture_output=True, text=True).stdout
        used = cpu(pid) - before
        job = json.loads(out[out.index("{"):])
        lat = job["latency_us"]
        return {"iops": job["iops"], "p50": lat["p50"], "p99": lat["p99"], "cpu": used * 1e6 / max(job["ios"], 1)}
    out = subprocess.run(
        [*real, "taskset", "-c", "0", "fio", "--name=row", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}", f"--bs={bs}",
         f"--iodepth={depth}", "--size=256M", "--time_based", f"--runtime={seconds}", "--randrepeat=0",
         "--norandommap", "--output-format=json"], check=True, capture_output=True, text=True).stdout
    used = cpu(pid) - before
    job = json.loads(out[out.index("{"):])["jobs"][0]["read" if "read" in rw else "write"]
    lat = job["clat_ns"]["percentile"]
    return {"iops": job["iops"], "p50": lat["50.000000"] / 1e3, "p99": lat["99.000000"] / 1e3,
            "cpu": used * 1e6 / max(job["total_ios"], 1)}


results = {}
for n in range(rounds):
    for name, rw, bs, depth in ROWS:
        for server in servers if n % 2 == 0 else servers[::-1]:
            results.setdefault((name, server), []).append(measure(server, rw, bs, depth))
    print(f"round {n + 1} of {rounds}", file=sys.stderr)


def median(name, server, what):
    return statistics.median(r[what] for r in results[name, server])


print("| row | server | IOPS | min..max | p50 µs | p99 µs | server CPU µs/IO | to the best peer: IOPS | CPU |")
print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
for name, *_ in ROWS:
    peers = [s for s in servers if not s.startswith("rnbd")]
    best = max(peers, key=lambda s: median(name, s, "iops"), default=None)
    for server in servers:
        all_iops = [r["iops"] for r in results[name, server]]
        ratio = ["", ""]
        if server.startswith("rnbd") and best:
            ratio = [f"{median(name, server, what) / max(median(name, best, what), 1e-9):.2f}" for what in ("iops", "cpu")]
        print(f"| {name if server == servers[0] else ''} | {server} | {median(name, server, 'iops'):.0f} | "
              f"{min(all_iops):.0f}..{max(all_iops):.0f} | {median(name, server, 'p50'):.0f} | "
              f"{median(name, server, 'p99'):.0f} | {median(name, server, 'cpu'):.1f} | {ratio[0]} | {ratio[1]} |")
PY
