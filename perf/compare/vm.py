"""The kernel's RNBD client in the VM, in turns on rnbd-target and on the kernel's server: the scenario target-perf."""
import json
import os
import pathlib
import subprocess
import sys

from common import from_fio, say

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = ["kernel-inv-Y", "kernel-inv-N", "target-adaptive", "target-3messages"]


def compare(ctx):
    args = ctx.args
    seconds = max(1, round(args.seconds))
    # Four configurations of three rows, and as long again for setting up.
    limit = 120 + args.rounds * len(CONFIGS) * (3 * (seconds + 2) + 20)
    command = [str(ROOT / "scripts/vm/run.sh"), "-t", str(limit), "-o", f"ROUNDS={args.rounds}", "-o", f"SECONDS_PER_ROW={seconds}",
               "-o", f"CONFIGS={' '.join(CONFIGS)}", "-o", f"BIN_DIR={args.bin}", "target-perf"]
    done = subprocess.run(command, stdout=sys.stderr)
    if done.returncode == 77:
        say("left out: vm: the scenario could not be run, see above")
        return []
    if done.returncode != 0:
        sys.exit(f"perf/compare: {' '.join(command)}: status {done.returncode}")
    folders = sorted((ROOT / "build/vm/out").glob("target-perf-*/perf"), key=os.path.getmtime)
    results = []
    for path in sorted(folders[-1].glob("*/*.json")) if folders else []:
        label, case = path.parent.name, "vm " + path.name.rsplit(".", 2)[0].replace("-", " ")
        r = from_fio(json.loads(path.read_text()), label.replace("target-", "rnbd-target-"), case, "read", command)
        # The busy share of both virtual CPUs, with the client's part of it.
        busy = float(path.with_suffix(".cpu").read_text()) / 100 * 2
        r["cpu"] = {"process_seconds": busy * r["seconds"], "us_per_io": busy * 1e6 / max(r["iops"], 1), "reactors": []}
        results.append(r)
    return results
