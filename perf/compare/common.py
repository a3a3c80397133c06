"""What the groups share: processes that take turns, their CPU time, results in one shape."""
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time

FORMAT = "rnbd-perf-1"
TICK = 1 / os.sysconf("SC_CLK_TCK")
LOAD_CORE, SERVER_CORE = 0, 1


def limit(seconds):
    """What ends something that hangs: so much longer as everything may take here, see scripts/lib.sh."""
    return seconds * float(os.environ.get("TIME_SCALE", 1))


def say(text):
    print(text, file=sys.stderr, flush=True)


def skip(why):
    """Ends the program as a test that could not be made."""
    print(f"SKIPPED: {why}")
    sys.exit(77)


class Context:
    """The options, and a folder for the time of a group."""

    def __init__(self, args, scratch):
        self.args, self.scratch = args, scratch
        # What servers and loads are started with, so that other work of the machine disturbs them less. In turns (-r), as the
        # control thread of a load would else wait for ever for two cores that are polled.
        self.real = ["chrt", "-r", "10"] if args.realtime else []

    def path(self, name):
        return os.path.join(self.scratch, name)

    def own(self, program):
        """One of our programs; ends the comparison if it has not been built."""
        path = os.path.join(self.args.bin, program)
        if not os.access(path, os.X_OK):
            sys.exit(f"perf/compare: {path} is missing; cargo build --release -p rnbd-target -p perf makes it")
        return path

    def write(self, name, text):
        with open(self.path(name), "w") as f:
            f.write(text if isinstance(text, str) else json.dumps(text))
        return self.path(name)

    def wants(self, words, name):
        return not words or any(word in name for word in words.split(","))

    def rows(self, rows):
        return [row for row in rows if self.wants(self.args.rows, row["case"])]

    def contenders(self, contenders):
        """Those that were asked for and are there; says why others are not."""
        chosen = []
        for c in contenders:
            if self.args.only and c.label not in self.args.only.split(","):
                continue
            missing = c.missing()
            if missing:
                say(f"left out: {c.label}: {missing}")
            else:
                chosen.append(c)
        return chosen


class Contender:
    """Something that is measured. `label` names it in the results."""

    label = ""
    needs = ()

    def __init__(self, ctx):
        self.ctx, self.process, self.pids = ctx, None, []

    def missing(self):
        """Why it cannot be measured here, or nothing."""
        lacking = [p for p in self.needs if not shutil.which(p)]
        return f"{', '.join(lacking)} not in PATH" if lacking else None

    def start(self):
        """Makes it ready to be measured."""

    def does(self, row):
        """Whether it can do this work."""
        return True

    def measure(self, row):
        """One result."""
        raise NotImplementedError

    def run(self, *command, core=SERVER_CORE):
        """Starts a server on its core; its output goes to LABEL.log."""
        log = open(self.ctx.path(f"{self.label}.log"), "ab")
        pin = ["taskset", "-c", str(core)] if core is not None else []
        self.process = subprocess.Popen([*self.ctx.real, *pin, *command], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.pids = [self.process.pid]

    def log(self):
        with open(self.ctx.path(f"{self.label}.log"), errors="replace") as f:
            return f.read()

    def wait(self, what, condition):
        end = time.monotonic() + limit(120)
        while time.monotonic() < end:
            if condition():
                return
            if self.process and self.process.poll() is not None:
                sys.exit(f"perf/compare: {self.label} ended: {self.log()[-2000:]}")
            time.sleep(0.05)
        sys.exit(f"perf/compare: {self.label}: not within {limit(120)} s: {what}\n{self.log()[-2000:]}")

    def pause(self, on):
        for pid in self.pids:
            for p in family(pid):
                try:
                    os.kill(p, signal.SIGSTOP if on else signal.SIGCONT)
                except ProcessLookupError:
                    pass

    def stop(self):
        self.pause(False)
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                pass
        if self.process:
            try:
                self.process.wait(limit(60))
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def cpu(self):
        """Seconds of CPU so far, those of children that have ended included."""
        total = 0
        for p in {p for pid in self.pids for p in family(pid)}:
            fields = stat(p)
            total += sum(int(n) for n in fields[11:15]) if fields else 0
        return total * TICK


def stat(pid):
    """/proc/PID/stat from the state on; nothing if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()
    except OSError:
        return []


def family(pid):
    """The process and its children: nbd-server forks one for each client."""
    children = [int(p) for p in os.listdir("/proc") if p.isdigit() and stat(p)[1:2] == [str(pid)]]
    return [pid, *children]


def in_turns(ctx, rows, contenders):
    """Every row of every contender, `rounds` times."""
    contenders, rows, results = ctx.contenders(contenders), ctx.rows(rows), []
    started = []
    try:
        for c in contenders:
            started.append(c)
            c.start()
            c.pause(True)
        for n in range(ctx.args.rounds):
            for row in rows:
                for c in contenders if n % 2 == 0 else contenders[::-1]:
                    if not c.does(row):
                        continue
                    c.pause(False)
                    result = c.measure(row)
                    c.pause(True)
                    results.append(result)
                    say(f"round {n + 1}/{ctx.args.rounds}: {row['case']}: {c.label}: {result['iops']:.0f} IOPS")
    finally:
        for c in started:
            c.stop()
    return results


def machine():
    """As rnbd-perf tells it."""
    with open("/proc/cpuinfo") as f:
        info = f.read()

    def field(name):
        return next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith(name)), "")

    try:
        with open("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") as f:
            governor = f.read().strip()
    except OSError:
        governor = "none"
    with open("/proc/meminfo") as f:
        memory = int(f.readline().split()[1]) // 1024
    return {"cpu": field("model name"), "cpus": info.count("processor\t"), "kernel": platform.release(),
            "governor": governor, "virtual_machine": "hypervisor" in field("flags").split(), "memory_mib": memory,
            "load_average": os.getloadavg()[0]}


def result(label, case, program, version, command, **more):
    """A result without figures."""
    return {"format": FORMAT, "label": label, "case": case, "program": program, "version": version, "command": command,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine(), **more}


def with_server(r, cpu_seconds):
    r["server"] = {"cpu_seconds": cpu_seconds, "cpu_us_per_io": cpu_seconds * 1e6 / max(r["ios"], 1)}
    return r


def call(ctx, command):
    """Runs a load to its end, which must come some time after its time is over."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ctx.args.seconds + limit(120))
    except subprocess.TimeoutExpired:
        sys.exit(f"perf/compare: {' '.join(command)}: has not ended when its time was over")
    if done.returncode != 0:
        sys.exit(f"perf/compare: {' '.join(command)}: {(done.stderr.strip() or done.stdout.strip())[-2000:]}")
    return done


def perf(ctx, label, row, target, *more, core=LOAD_CORE, config=None, time_s=None):
    """A run of rnbd-perf, labelled as the contender. No warm-up: the server's CPU time is read around it."""
    out = ctx.path("perf.json")
    command = [*ctx.real, ctx.own("rnbd-perf"), "-T", target, "-w", row["rw"], "-o", str(row["bs"]), "-q", str(row["depth"]),
               "-t", str(time_s or ctx.args.seconds), "--warm-up", "0", "--interval", "0.25", "-m", f"[{core}]", "--quiet",
               "--label", label, "--case", row["case"], "--json", out, *more]
    if config:
        command += ["-c", config]
    call(ctx, command)
    with open(out) as f:
        return json.load(f)


def fio(ctx, label, row, *engine, core=LOAD_CORE):
    """A run of fio, in our shape."""
    command = [*ctx.real, "taskset", "-c", str(core), "fio", "--name=row", f"--rw={row['rw']}", f"--bs={row['bs']}",
               f"--iodepth={row['depth']}", "--time_based", f"--runtime={round(ctx.args.seconds * 1000)}ms",
               "--randrepeat=0", "--norandommap",
               "--percentile_list=1:10:25:50:75:90:95:99:99.5:99.9:99.95:99.99", "--output-format=json", *engine]
    text = call(ctx, command).stdout
    return from_fio(json.loads(text[text.index("{"):]), label, row["case"], row["rw"], command)


def from_fio(report, label, case, rw, command):
    """fio's own JSON in our shape."""
    job = report["jobs"][0]
    side = job["read" if "read" in rw else "write"]
    clat = side["clat_ns"]
    curve = sorted((float(p), ns / 1e3) for p, ns in clat.get("percentile", {}).items())

    # Only what it was asked for; the report leaves the others out.
    named = {"p50": 50, "p90": 90, "p99": 99, "p99_9": 99.9, "p99_99": 99.99}
    latency = {name: us for name, p in named.items() for q, us in curve if q == p}
    latency |= {k: clat[k] / 1e3 for k in ("min", "mean", "max")}
    ios = side["total_ios"]
    cpu = side["runtime"] / 1e3 * (job["usr_cpu"] + job["sys_cpu"]) / 100
    return result(
        label, case, "fio", report.get("fio version", ""), command, iops=side["iops"], mib_s=side["bw_bytes"] / 2**20, ios=ios,
        reads=job["read"]["total_ios"], writes=job["write"]["total_ios"], bytes=side["io_bytes"],
        seconds=side["runtime"] / 1e3, errors=job.get("total_err", 0), percentiles=curve,
        latency_us=latency,
        cpu={"process_seconds": cpu, "us_per_io": cpu * 1e6 / max(ios, 1), "reactors": []})


def idle_nbd(path, export, size):
    """A connection to an NBD export of so many bytes, that asks nothing: newstyle, EXPORT_NAME."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(limit(120))
    client.connect(path)
    stream = client.makefile("rb")
    if stream.read(18)[:16] != b"NBDMAGICIHAVEOPT":
        sys.exit(f"{path} is no NBD server")
    name = export.encode()
    client.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(name)) + name)
    found, _ = struct.unpack(">QH", stream.read(10))
    if found != size:
        sys.exit(f"{path}: {export} has {found} bytes, not {size}")
    return client


def table(results):
    """Medians and ranges, as Markdown; ratios to the first contender of the row that is not ours."""
    print("| row | contender | IOPS | min..max | MiB/s | p50 µs | p99 µs | CPU µs/IO | ours to the best peer: IOPS | CPU |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")

    def cpu(r):
        return r["server"]["cpu_us_per_io"] if r.get("server") else r.get("cpu", {}).get("us_per_io", 0)

    for case in dict.fromkeys(r["case"] for r in results):
        by = {}
        for r in results:
            if r["case"] == case:
                by.setdefault(r["label"], []).append(r)

        def median(label, what):
            return statistics.median(what(r) for r in by[label])

        peers = [label for label in by if not label.startswith("rnbd")]
        best = max(peers, key=lambda label: median(label, lambda r: r["iops"]), default=None)
        for n, (label, runs) in enumerate(by.items()):
            iops = [r["iops"] for r in runs]
            ratios = ["", ""]
            if label not in peers and best:
                ratios = [f"{median(label, what) / max(median(best, what), 1e-9):.2f}" if median(best, what) else ""
                          for what in (lambda r: r["iops"], cpu)]
            known = {"mib": median(label, lambda r: r["mib_s"]), "cpu": median(label, cpu)}
            known |= {p: median(label, lambda r, p=p: r["latency_us"].get(p, 0)) for p in ("p50", "p99")}
            digits = {"mib": 0, "p50": 1, "p99": 1, "cpu": 2}
            mib, p50, p99, used = (f"{known[k]:.{d}f}" if known[k] else "" for k, d in digits.items())
            print(f"| {case if n == 0 else ''} | {label} | {statistics.median(iops):.0f} | {min(iops):.0f}..{max(iops):.0f} "
                  f"| {mib} | {p50} | {p99} | {used} | {ratios[0]} | {ratios[1]} |")
