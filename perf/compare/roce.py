"""RNBD over soft-roce on the loopback device, beside this machine's own limit of UDP request and reply and SPDK's NVMe over TCP.

The limit does nothing but request and reply on the same kind of sockets, with packets as large as those of the answers: payload and
36 bytes of headers and ICRC each.
"""
import json
import re
import socket
import sys

from common import LOAD_CORE, Contender, call, in_turns, perf, result, with_server

SERVER, CLIENT = "127.92.0.1", "127.92.0.2"
# The largest request of a session is 124 KiB, a chunk less its header: 31 packets.
ROWS = [
    {"case": "roce 4k randread QD1", "rw": "randread", "bs": 4096, "depth": 1, "limit": ["--reply", "4132"]},
    {"case": "roce 4k randread QD32", "rw": "randread", "bs": 4096, "depth": 32, "limit": ["--reply", "4132"]},
    {"case": "roce 124k read QD8", "rw": "read", "bs": 126976, "depth": 8, "limit": ["--reply", str(31 * 4116), "--mtu", "4116"]},
]
NULL = {"method": "bdev_null_create", "params": {"name": "Null0", "num_blocks": 262144, "block_size": 4096}}


class Target(Contender):
    """rnbd-target with a null bdev; the load is rnbd-perf on bdev_rnbd, end to end."""

    label = "rnbd-target"

    def start(self):
        config = {"subsystems": [
            {"subsystem": "bdev", "config": [NULL]},
            {"subsystem": "rnbd", "config": [
                {"method": "rnbd_create_export", "params": {"device_path": "Null0", "bdev_name": "Null0"}},
                {"method": "rnbd_create_listener", "params": {"traddr": SERVER, "provider": "soft-roce"}}]}]}
        path = self.ctx.write("target.json", config)
        self.run(self.ctx.own("rnbd-target"), "-c", path, "-m", "0x2", "-r", self.ctx.path("rpc.sock"))
        self.wait("ready", lambda: " ready " in self.log())

    def measure(self, row):
        before = self.cpu()
        r = perf(self.ctx, self.label, row, f"rnbd://{CLIENT}@{SERVER}/Null0?provider=soft-roce")
        return with_server(r, self.cpu() - before)


class RtrsLoad(Target):
    """The same without the bdev layer at the client: rtrs-load."""

    label = "rnbd-target (rtrs-load)"

    def start(self):
        """It shares the server of `Target`, which must have been started."""

    def share(self, target):
        self.target = target
        return self

    def pause(self, on):
        self.target.pause(on)

    def stop(self):
        pass

    def measure(self, row):
        out, before = self.ctx.path("rtrs.json"), self.target.cpu()
        command = [*self.ctx.real, self.ctx.own("rtrs-load"), SERVER, "Null0", "-p", "soft-roce", "--src", CLIENT,
                   "-m", f"[{LOAD_CORE}]", "--poll", "-w", row["rw"], "-o", str(row["bs"]), "-q", str(row["depth"]),
                   "-t", str(self.ctx.args.seconds), "--warm-up", "0", "--json", out]
        load = run(self.ctx, command, out)
        r = result(self.label, row["case"], "rtrs-load", load["version"], command, latency_us=load["latency_us"],
                   cpu={"process_seconds": load["cpu_seconds"], "us_per_io": load["cpu_us_per_io"], "reactors": []},
                   **{k: load[k] for k in ("iops", "mib_s", "ios", "reads", "seconds", "errors", "first_error", "busy")})
        return with_server(r, self.target.cpu() - before)


class Limit(Contender):
    label = "udp-limit"

    def measure(self, row):
        out = self.ctx.path("udp.json")
        command = [*self.ctx.real, self.ctx.own("udp-limit"), "--seconds", str(self.ctx.args.seconds),
                   "--depth", str(row["depth"]), "--json", out, *row["limit"]]
        load = run(self.ctx, command, out)
        iops = load["exchanges_per_second"]
        return result(self.label, row["case"], "udp-limit", "", command, iops=iops, mib_s=iops * row["bs"] / 2**20,
                      ios=load["exchanges"], seconds=load["seconds"],
                      latency_us={"p50": load["p50_us"], "p99": load["p99_us"]})


class NvmeTcp(Contender):
    """SPDK's nvmf_tgt with a null bdev, and its own load, spdk_nvme_perf."""

    label, needs = "spdk-nvme-tcp", ("nvmf_tgt", "spdk_nvme_perf")

    def start(self):
        nqn = "nqn.2016-06.io.spdk:compare"
        address = {"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": "44420"}
        config = {"subsystems": [
            {"subsystem": "bdev", "config": [NULL]},
            {"subsystem": "nvmf", "config": [
                {"method": "nvmf_create_transport", "params": {"trtype": "TCP"}},
                {"method": "nvmf_create_subsystem", "params": {"nqn": nqn, "allow_any_host": True}},
                {"method": "nvmf_subsystem_add_ns", "params": {"nqn": nqn, "namespace": {"bdev_name": "Null0"}}},
                {"method": "nvmf_subsystem_add_listener", "params": {"nqn": nqn, "listen_address": address}}]}]}
        path = self.ctx.write("nvmf.json", config)
        self.run("nvmf_tgt", "-c", path, "-m", "0x2", "--no-huge", "-s", "1024",
                 "--disable-cpumask-locks", "-r", self.ctx.path("nvmf.sock"), core=None)
        self.wait("its port", listens)

    def measure(self, row):
        before = self.cpu()
        command = [*self.ctx.real, "spdk_nvme_perf", "-q", str(row["depth"]), "-o", str(row["bs"]), "-w", row["rw"],
                   "-t", str(max(1, round(self.ctx.args.seconds))), "-c", hex(1 << LOAD_CORE), "--no-huge", "-s", "512", "-r",
                   "trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:44420"]
        done = call(self.ctx, command)
        used = self.cpu() - before
        line = re.search(r"^Total\s*:\s*([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)", done.stdout, re.M)
        if not line:
            sys.exit(f"perf/compare: {' '.join(command)}: {(done.stderr or done.stdout)[-2000:]}")
        iops, mib_s, mean, least, most = (float(n) for n in line.groups())
        seconds = max(1, round(self.ctx.args.seconds))
        return with_server(result(
            self.label, row["case"], "spdk_nvme_perf", "", command, iops=iops, mib_s=mib_s, ios=round(iops * seconds),
            seconds=seconds, latency_us={"min": least, "mean": mean, "max": most}), used)


def listens():
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", 44420)) == 0


def run(ctx, command, path):
    call(ctx, command)
    with open(path) as f:
        return json.load(f)


def compare(ctx):
    target = Target(ctx)
    return in_turns(ctx, ROWS, [target, RtrsLoad(ctx).share(target), Limit(ctx), NvmeTcp(ctx)])
