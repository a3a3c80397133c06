#!/usr/bin/env python3
"""Ours beside each installed peer, on the same work: python3 perf/compare [OPTIONS] [GROUP...]

Groups (default: all but vm, as far as their programs are there):
  bdev   null and malloc bdevs: rnbd-perf, SPDK's bdevperf
  nbd    an NBD server on a unix socket, 256 MiB in memory: rnbd-target, nbdkit, qemu-nbd, nbd-server
  vhost  a vhost-user-blk socket: rnbd-target, qemu-storage-daemon, SPDK's vhost
  roce   RNBD over soft-roce on the loopback device: rnbd-target, the limit of UDP itself, SPDK's NVMe over TCP
  scaling  rnbd-target with more clients, idle and at work
  vm     the kernel's RNBD client in the VM: rnbd-target, the kernel's rnbd_server (scripts/vm/run.sh target-perf)

The load is on core 0, what is measured on core 1. Contenders take turns, in the other order every second round; those that are not
measured are stopped (SIGSTOP) meanwhile. Figures of a machine that does other things are worth nothing, and its load average is
in the results. Peers that are not in PATH are named and left out. Results are in the shape of rnbd-perf --json.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import bdev  # noqa: E402
import common  # noqa: E402
import nbd  # noqa: E402
import roce  # noqa: E402
import scaling  # noqa: E402
import vhost  # noqa: E402
import vm  # noqa: E402

GROUPS = {"bdev": bdev, "nbd": nbd, "vhost": vhost, "roce": roce, "scaling": scaling, "vm": vm}


def main():
    parser = argparse.ArgumentParser(prog="perf/compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="what to compare, see above")
    parser.add_argument("--bin", default="build/release", help="folder of our programs (default build/release)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender is measured (default 5)")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement (default 3)")
    parser.add_argument("--rows", default="", help="comma-separated words: only rows that contain one, such as QD32")
    parser.add_argument("--only", default="", help="comma-separated contenders (default: all that are there)")
    parser.add_argument("--load", choices=["fio", "rnbd-perf"], default="fio", help="of group nbd (default fio)")
    parser.add_argument("--realtime", action="store_true", help="servers and loads with real-time priority (root)")
    parser.add_argument("-o", "--output", default="compare.json", help="where the results go (default compare.json)")
    parser.add_argument("--report", metavar="FILE", help="make a page of them, too")
    args = parser.parse_args()
    wrong = [g for g in args.groups if g not in GROUPS]
    if wrong or args.rounds < 1 or args.seconds <= 0:
        parser.error(f"no group {wrong[0]}; there are {', '.join(GROUPS)}" if wrong else "--rounds and --seconds: above 0")
    if (os.cpu_count() or 1) < 2:
        common.skip("two cores are needed")
    # An end in order, so that no server is left behind, perhaps stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args.bin = os.path.abspath(args.bin)
    results = []
    for name in args.groups or [g for g in GROUPS if g != "vm"]:
        with tempfile.TemporaryDirectory(prefix="rnbd-compare.", dir="/dev/shm") as scratch:
            results += GROUPS[name].compare(common.Context(args, scratch))
        # What has been measured stays, whatever becomes of the next group.
        with open(args.output, "w") as f:
            json.dump(results, f, indent=1)
    if not results:
        common.skip("nothing could be measured")
    common.table(results)
    if args.report:
        subprocess.run([os.path.join(args.bin, "rnbd-perf"), "report", args.output, "-o", args.report], check=True)


if __name__ == "__main__":
    main()
