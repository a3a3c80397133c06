#!/usr/bin/env python3
"""What rnbd-target and rnbd-initiator take while nobody uses what they export, though everything is connected.

The target's disk (malloc) is connected by RNBD over soft-roce, by NBD and as a vhost-user-blk disk; the initiator has both
remote disks and exports each as vhost-user-blk and by NBD, each with a client. vhost front ends make a request a second. Needs no
root. Exits 1 if a program takes 1 % of a core or more, or more than 64 MiB besides the memory of its chunks and disks.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(ROOT, "scripts", "vm"), os.path.join(ROOT, "perf", "compare")]
from common import idle_nbd  # noqa: E402
from rpc import call  # noqa: E402

TICK = 1 / os.sysconf("SC_CLK_TCK")
ADDRESS = "127.93.0.1"
DISK_BLOCKS = 32768  # of 512 bytes: 16 MiB
CPU_LIMIT, MEMORY_LIMIT_MIB = 1.0, 64


class Program:
    def __init__(self, binary, config, folder):
        self.name, self.socket = os.path.basename(binary), os.path.join(folder, os.path.basename(binary) + ".rpc")
        path = os.path.join(folder, self.name + ".json")
        with open(path, "w") as file:
            json.dump(config, file)
        self.log = os.path.join(folder, self.name + ".log")
        self.process = subprocess.Popen([binary, "-c", path, "-r", self.socket, "-m", "0x1"], stderr=open(self.log, "w"), stdout=subprocess.DEVNULL)

    def ready(self):
        for _ in range(200):
            with open(self.log) as file:
                if " ready " in file.read():
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        sys.exit(f"perf/idle.py: {self.name} did not start: {open(self.log).read()[-1000:]}")

    def rpc(self, method, **params):
        answer = call(self.socket, method, params or None)
        if "error" in answer:
            sys.exit(f"perf/idle.py: {method}: {answer['error']}")
        return answer["result"]

    def cpu(self):
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) * TICK

    def memory_mib(self):
        with open(f"/proc/{self.process.pid}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--bin", default=os.path.join(ROOT, "build", "release"), help="folder of the programs (default: %(default)s)")
    options.add_argument("-t", "--seconds", type=float, default=60, help="how long to watch (default: %(default)s)")
    args = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="rnbd-idle.") as folder:
        path = lambda name: os.path.join(folder, name)  # noqa: E731
        binary = lambda name: os.path.join(args.bin, name)  # noqa: E731
        started, clients = [], []
        try:
            target = Program(binary("rnbd-target"), {"subsystems": [
                {"subsystem": "bdev", "config": [{"method": "bdev_malloc_create", "params": {"name": "Disk0", "num_blocks": DISK_BLOCKS, "block_size": 512}}]},
                {"subsystem": "rnbd", "config": [{"method": "rnbd_create_listener", "params": {"traddr": ADDRESS, "provider": "soft-roce"}}]},
                {"subsystem": "vhost_blk", "config": [{"method": "vhost_create_blk_controller", "params": {"ctrlr": path("Disk0.vhost"), "dev_name": "Disk0"}}]},
                {"subsystem": "nbd_server", "config": [
                    {"method": "nbd_server_create_export", "params": {"name": "Disk0", "bdev_name": "Disk0"}},
                    {"method": "nbd_server_add_listener", "params": {"path": path("target.nbd")}}]}]}, folder)
            started.append(target)
            target.ready()
            initiator = Program(binary("rnbd-initiator"), {"subsystems": []}, folder)
            started.append(initiator)
            initiator.ready()
            initiator.rpc("bdev_rnbd_map", name="Rnbd0", sessname="idle", device_path="Disk0", provider="soft-roce", paths=[{"src": "127.93.0.2", "dst": ADDRESS}])
            initiator.rpc("bdev_nbd_create", name="Nbd0", path=path("target.nbd"), export="Disk0")
            initiator.rpc("nbd_server_add_listener", path=path("initiator.nbd"))
            sockets = [path("Disk0.vhost")]
            for bdev in ("Rnbd0", "Nbd0"):
                sockets.append(path(f"{bdev}.vhost"))
                initiator.rpc("vhost_create_blk_controller", ctrlr=sockets[-1], dev_name=bdev)
                initiator.rpc("nbd_server_create_export", name=bdev, bdev_name=bdev)
                clients.append(idle_nbd(path("initiator.nbd"), bdev, DISK_BLOCKS * 512))
            clients.append(idle_nbd(path("target.nbd"), "Disk0", DISK_BLOCKS * 512))
            loads = [subprocess.Popen([binary("rnbd-perf"), "-T", f"vhost:{s}", "-t", str(args.seconds + 8), "-q", "1", "--rate-iops", "1", "-m", "0x2", "--quiet",
                                       "--spin-us", "0", "-r", f"{s}.perf"], stdout=subprocess.DEVNULL) for s in sockets]
            time.sleep(5)
            programs = [target, initiator]
            before = [p.cpu() for p in programs]
            time.sleep(args.seconds)
            bad = False
            for program, cpu in zip(programs, before):
                share = 100 * (program.cpu() - cpu) / args.seconds
                memory, allowed = program.memory_mib(), MEMORY_LIMIT_MIB
                if program is target:
                    sessions = program.rpc("rnbd_get_sessions")
                    allowed += (DISK_BLOCKS * 512 + sum(s["chunk_size"] * s["queue_depth"] * len(s["paths"]) for s in sessions)) / (1 << 20)
                print(f"{program.name}: {share:.2f} % of a core (limit {CPU_LIMIT:.0f} %), {memory:.1f} MiB resident (limit {allowed:.0f})")
                bad |= share >= CPU_LIMIT or memory > allowed
            for load in loads:
                if load.wait(60) != 0:
                    sys.exit("perf/idle.py: a vhost front end failed")
            return int(bad)
        finally:
            for client in clients:
                client.close()
            for program in reversed(started):
                program.process.terminate()
                program.process.wait(30)


if __name__ == "__main__":
    sys.exit(main())
