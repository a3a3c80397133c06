#!/usr/bin/env python3
"""Table of the fio results that perf.sh left: perf.py DIR BASELINE NAME...

Reads DIR/NAME/ROW.ROUND.json and .cpu; prints a Markdown table with the median over the rounds, the spread of IOPS
(lowest to highest round), and the ratio of IOPS to BASELINE; writes the same numbers to DIR/summary.json.
"""
import json
import pathlib
import statistics
import sys


def read_round(path):
    """One fio run as numbers: IOPS, MiB/s, latencies in µs, busy share in percent."""
    read = json.loads(path.read_text())["jobs"][0]["read"]
    percentile = read["clat_ns"]["percentile"]
    return {
        "iops": read["iops"],
        "mib_s": read["bw_bytes"] / 2**20,
        "p50_us": percentile["50.000000"] / 1000,
        "p99_us": percentile["99.000000"] / 1000,
        "busy": float(path.with_suffix(".cpu").read_text()),
    }


def read_config(folder):
    """{row: [round, …]} of one configuration."""
    rows = {}
    for path in sorted(folder.glob("*.json")):
        rows.setdefault(path.name.rsplit(".", 2)[0], []).append(read_round(path))
    return rows


def summarize(rounds):
    summary = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    summary["iops_min"] = min(r["iops"] for r in rounds)
    summary["iops_max"] = max(r["iops"] for r in rounds)
    summary["rounds"] = len(rounds)
    return summary


def main(argv):
    if len(argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    folder, names = pathlib.Path(argv[1]), argv[2:]
    table = {name: {row: summarize(r) for row, r in read_config(folder / name).items()} for name in names}
    print("| row | configuration | IOPS | min..max | MiB/s | p50 µs | p99 µs | CPU % | ratio |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in sorted({row for rows in table.values() for row in rows}, key=lambda r: (r.startswith("128k"), r)):
        for name in names:
            s = table[name][row]
            s["ratio"] = s["iops"] / table[names[0]][row]["iops"]
            print(
                f"| {row} | {name} | {s['iops']:.0f} | {s['iops_min']:.0f}..{s['iops_max']:.0f} | {s['mib_s']:.1f} "
                f"| {s['p50_us']:.0f} | {s['p99_us']:.0f} | {s['busy']:.0f} | {s['ratio']:.2f} |"
            )
    (folder / "summary.json").write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
