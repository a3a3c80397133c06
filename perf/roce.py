#!/usr/bin/env python3
"""RTRS over soft-roce beside this machine's own limit of UDP request and reply, on the loopback device.

rnbd-target (null bdev, reactor on core 0, asleep without work) and rtrs-load (core 1) take turns with udp-limit (the same
cores and sizes), so that both see the machine in the same state. One line per load: medians, ranges, and the median of the ratios of the
rounds.

Usage: perf/roce.py [--bin build/release] [--rounds 5] [--seconds 3] [--json FILE]
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

SERVER, CLIENT = "127.92.0.1", "127.92.0.2"
CONFIG = {"subsystems": [
    {"subsystem": "bdev", "config": [
        {"method": "bdev_null_create", "params": {"name": "Null0", "num_blocks": 2097152, "block_size": 512}}]},
    {"subsystem": "rnbd", "config": [
        {"method": "rnbd_create_listener", "params": {"traddr": SERVER, "provider": "soft-roce"}}]}]}
# name, rtrs-load's options, udp-limit's options. The limit's replies are as large as the packets of the answer: payload
# and 36 bytes of headers and ICRC each.
LOADS = [
    ("4k randread QD1", ["-w", "randread", "-o", "4096", "-q", "1"], ["--depth", "1", "--reply", "4132"]),
    ("4k randread QD32", ["-w", "randread", "-o", "4096", "-q", "32"], ["--depth", "32", "--reply", "4132"]),
    # rtrs-load's largest request is 124 KiB (a chunk less its header): 31 packets.
    ("124k read QD8", ["-w", "read", "-o", "126976", "-q", "8"], ["--depth", "8", "--reply", str(31 * 4116), "--mtu", "4116"]),
]


def run(command, path):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open(path) as f:
        return json.load(f)


def measure(args, scratch):
    """Results by load: lists of (rtrs-load's report, udp-limit's report), one pair per round."""
    out = os.path.join(scratch, "out.json")
    results = {name: [] for name, _, _ in LOADS}
    for n in range(args.rounds):
        for name, load, limit in LOADS:
            rtrs = [os.path.join(args.bin, "rtrs-load"), SERVER, "Null0", "-p", "soft-roce", "--src", CLIENT, "-m", "0x2",
                    "--poll", "-t", str(args.seconds), "--json", out, *load]
            udp = [os.path.join(args.bin, "udp-limit"), "--seconds", str(args.seconds), "--json", out, *limit]
            # The order changes, as one may leave the machine in another state than it found it.
            if n % 2 == 0:
                pair = run(rtrs, out), run(udp, out)
            else:
                pair = tuple(reversed((run(udp, out), run(rtrs, out))))
            results[name].append(pair)
            print(f"round {n + 1}/{args.rounds} {name}: {pair[0]['iops']:.0f} of {pair[1]['exchanges_per_second']:.0f}/s",
                  file=sys.stderr)
    return results


def spread(values, digits=0):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def table(results):
    print("| load | RTRS over soft-roce, IOPS | p50 µs | p99 µs | UDP limit, exchanges/s | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, pairs in results.items():
        rtrs, udp = [p[0] for p in pairs], [p[1] for p in pairs]
        ratios = [r["iops"] / u["exchanges_per_second"] for r, u in pairs]
        print(f"| {name} | {spread([r['iops'] for r in rtrs])} | {spread([r['latency_us']['p50'] for r in rtrs], 1)} "
              f"| {spread([r['latency_us']['p99'] for r in rtrs], 1)} "
              f"| {spread([u['exchanges_per_second'] for u in udp])} | {spread(ratios, 2)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="build/release", help="folder of the programs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--json", help="where to put all reports")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rnbd-roce.") as scratch:
        config, log = os.path.join(scratch, "target.json"), os.path.join(scratch, "target.log")
        with open(config, "w") as f:
            json.dump(CONFIG, f)
        with open(log, "w") as f:
            target = subprocess.Popen([os.path.join(args.bin, "rnbd-target"), "-c", config, "-m", "0x1",
                                       "-r", os.path.join(scratch, "rpc.sock")], stdout=f, stderr=f)
        try:
            for _ in range(100):
                time.sleep(0.1)
                text = open(log).read()
                if " ready " in text:
                    break
                if target.poll() is not None:
                    sys.exit(f"rnbd-target ended: {text}")
            results = measure(args, scratch)
        finally:
            target.terminate()
            target.wait()
    table(results)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(results, f)


if __name__ == "__main__":
    main()
