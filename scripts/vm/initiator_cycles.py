#!/usr/bin/env python3
"""Maps, exports, uses, stops and unmaps a remote disk again and again: initiator_cycles.py CONFIG

CONFIG (JSON): initiator, target: RPC sockets; pid: the initiator's; map: parameters of bdev_rnbd_map; exports: names out of
nbd, ublk, vhost; cycles; rnbd_perf: path of the program. Prints a line per export, and exits 1 if a cycle failed, or
if descriptors, sessions, devices or memory are left behind. One process, as starting Python takes an emulated CPU a second.
"""
import json
import mmap
import os
import subprocess
import sys
import time

from rpc import call

# What the allocator keeps may grow by this much.
MEMORY_KIB = 1024
SOCKET = "/run/cycle.vhost"


class Failure(Exception):
    """What went wrong in a cycle."""


class Cycles:
    def __init__(self, config):
        self.config = config

    def rpc(self, method, params=None, socket="initiator"):
        answer = call(self.config[socket], method, params)
        if "error" in answer:
            raise Failure(f"{method}: {answer['error']}")
        return answer["result"]

    def use(self, device):
        """Writes and reads 1 MiB, past the page cache."""
        data = mmap.mmap(-1, 1 << 20)
        data.write(os.urandom(1 << 20))
        back = mmap.mmap(-1, 1 << 20)
        fd = os.open(device, os.O_RDWR | os.O_DIRECT)
        try:
            if os.pwrite(fd, data, 0) != len(data) or os.preadv(fd, [back], 0) != len(back):
                raise Failure(f"{device}: short I/O")
            if data[:] != back[:]:
                raise Failure(f"{device}: what was read is not what was written")
        finally:
            os.close(fd)

    def nbd(self):
        device = self.rpc("nbd_start_disk", {"bdev_name": "Remote0"})
        self.use(device)
        self.rpc("nbd_stop_disk", {"nbd_device": device})
        if open(f"/sys/block/{os.path.basename(device)}/size").read().strip() != "0":
            raise Failure(f"{device} is left")

    def ublk(self):
        self.rpc("ublk_start_disk", {"bdev_name": "Remote0", "ublk_id": 0})
        wait("/dev/ublkb0", lambda: os.path.exists("/dev/ublkb0"))
        self.use("/dev/ublkb0")
        self.rpc("ublk_stop_disk", {"ublk_id": 0})
        wait("/dev/ublkb0 is gone", lambda: not os.path.exists("/dev/ublkb0"))

    def vhost(self):
        self.rpc("vhost_create_blk_controller", {"ctrlr": SOCKET, "dev_name": "Remote0"})
        command = [self.config["rnbd_perf"], "-T", f"vhost:{SOCKET}", "-t", "0.1", "--warm-up", "0.05", "--quiet"]
        load = subprocess.run(command, capture_output=True, text=True)
        if load.returncode != 0:
            raise Failure(f"rnbd-perf: {load.stderr or load.stdout}")
        self.rpc("vhost_delete_controller", {"ctrlr": SOCKET})
        if os.path.exists(SOCKET):
            raise Failure(f"{SOCKET} is left")

    def cycle(self, export):
        self.rpc("bdev_rnbd_map", self.config["map"])
        getattr(self, export)()
        self.rpc("bdev_rnbd_unmap", {"name": "Remote0"})
        wait("the target's session ends", lambda: self.rpc("rnbd_get_sessions", socket="target") == [])

    def held(self):
        """Descriptors and resident KiB of the initiator."""
        proc = f"/proc/{self.config['pid']}"
        resident = next(line for line in open(f"{proc}/status") if line.startswith("VmRSS"))
        return len(os.listdir(f"{proc}/fd")), int(resident.split()[1])

    def run(self, export):
        for _ in range(5):
            self.cycle(export)
        # Buffers that are reused in a circle take their pages in the first round, so growth counts when it goes on.
        for again in (True, False):
            fds, kib = self.held()
            for _ in range(self.config["cycles"]):
                self.cycle(export)
            fds_after, kib_after = self.held()
            print(f"{export}: {self.config['cycles']} cycles, descriptors {fds} -> {fds_after}, resident {kib} -> {kib_after} KiB",
                  flush=True)
            if fds_after != fds:
                raise Failure("descriptors are left")
            if kib_after - kib <= MEMORY_KIB:
                return
            if not again:
                raise Failure("memory is left")


def wait(what, condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Failure(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.01)


def main(argv):
    with open(argv[1]) as file:
        config = json.load(file)
    cycles, bad = Cycles(config), 0
    if "ublk" in config["exports"]:
        cycles.rpc("ublk_create_target", {})
    for export in config["exports"]:
        try:
            cycles.run(export)
        except (Failure, OSError) as error:
            print(f"{export}: {error}", flush=True)
            bad += 1
            break
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
