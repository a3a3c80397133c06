"""The bdev layer alone: rnbd-perf and SPDK's bdevperf on null and malloc bdevs, on one core."""
import re
import sys

from common import SERVER_CORE, Contender, call, in_turns, perf, result

ROWS = [{"case": f"bdev {name} 4k randread QD{depth}", "rw": "randread", "bs": 4096, "depth": depth, "bdev": bdev}
        for name, bdev in (("null", "Null0"), ("malloc", "Malloc0")) for depth in (1, 32)]
# The same calls for both.
CONFIG = {"subsystems": [{"subsystem": "bdev", "config": [
    {"method": "bdev_null_create", "params": {"name": "Null0", "num_blocks": 262144, "block_size": 4096}},
    {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "num_blocks": 65536, "block_size": 4096}}]}]}


class Ours(Contender):
    label = "rnbd-perf"

    def measure(self, row):
        # A malloc bdev that was never written has no memory to read.
        more = ["--fill"] if row["bdev"] == "Malloc0" else []
        config = self.ctx.write("bdev.json", CONFIG)
        return perf(self.ctx, self.label, row, row["bdev"], *more, core=SERVER_CORE, config=config)


class Bdevperf(Contender):
    label, needs = "spdk-bdevperf", ("bdevperf",)

    def measure(self, row):
        config = {"subsystems": [{"subsystem": "bdev", "config": [
            call for call in CONFIG["subsystems"][0]["config"] if call["params"]["name"] == row["bdev"]]}]}
        command = [*self.ctx.real, "bdevperf", "-c", self.ctx.write("bdevperf.json", config), "--no-huge", "-s", "1024",
                   "--disable-cpumask-locks", "-q", str(row["depth"]),
                   "-o", str(row["bs"]), "-w", row["rw"], "-t", str(max(1, round(self.ctx.args.seconds))),
                   "-m", f"[{SERVER_CORE}]", "-r", self.ctx.path("bdevperf.sock")]
        done = call(self.ctx, command)
        r = parse(done.stdout + done.stderr)
        if not r:
            sys.exit(f"perf/compare: {' '.join(command)}: {(done.stderr or done.stdout)[-2000:]}")
        return result(self.label, row["case"], "bdevperf", "", command, **r)


def parse(text):
    """The line "Total : IOPS MiB/s Fail/s TO/s Average min max" (microseconds) of bdevperf."""
    line = re.search(r"^\s*Total\s*:\s*([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)", text, re.M)
    if not line:
        return None
    iops, mib_s, failed, _, mean, least, most = (float(n) for n in line.groups())
    return {"iops": iops, "mib_s": mib_s, "errors": int(failed),
            "latency_us": {"min": least, "mean": mean, "max": most}}


def compare(ctx):
    return in_turns(ctx, ROWS, [Ours(ctx), Bdevperf(ctx)])
