"""More clients of rnbd-target: what a request costs beside idle ones, and what many at work get together.

A null bdev, so that all of the cost is the server's own. Idle clients are connected and ask nothing: NBD sockets, or sessions of an
rnbd-initiator.
"""
import os
import subprocess
import sys
import time

from common import LOAD_CORE, Contender, idle_nbd, in_turns, perf, with_server

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "scripts", "vm"))
import rpc  # noqa: E402

SERVER, CLIENT = "127.95.0.1", "127.95.0.2"
BLOCKS, BLOCK = 262144, 4096
MANY = 64
ROWS = [{"case": f"{protocol} 4k randread QD8, beside {idle} idle", "protocol": protocol, "idle": idle, "clients": 1, "rw": "randread",
         "bs": 4096, "depth": 8} for protocol in ("nbd", "rnbd") for idle in (0, 16, MANY)]
ROWS += [{"case": f"{protocol} 4k randread QD1, {clients} clients", "protocol": protocol, "idle": 0, "clients": clients, "rw": "randread",
          "bs": 4096, "depth": 1} for protocol in ("nbd", "rnbd") for clients in (1, 4, 16, MANY)]


def call(path, method, params=None):
    """The result of one JSON-RPC call."""
    answer = rpc.call(path, method, params)
    if "error" in answer:
        sys.exit(f"perf/compare: {method}: {answer['error']}")
    return answer["result"]


class Target(Contender):
    label = "rnbd-target"

    def start(self):
        config = {"subsystems": [
            {"subsystem": "bdev", "config": [{"method": "bdev_null_create", "params": {"name": f"Null{n}", "num_blocks": BLOCKS, "block_size": BLOCK}}
                                                for n in range(MANY)]},
            {"subsystem": "rnbd", "config": [
                {"method": "rnbd_set_options", "params": {"queue_depth": 32, "max_sessions": 2 * MANY, "max_paths": 2 * MANY, "max_connections": 8 * MANY}},
                *({"method": "rnbd_create_export", "params": {"device_path": f"Null{n}", "bdev_name": f"Null{n}"}} for n in range(MANY)),
                {"method": "rnbd_create_listener", "params": {"traddr": SERVER, "provider": "soft-roce"}}]},
            {"subsystem": "nbd_server", "config": [
                {"method": "nbd_server_create_export", "params": {"name": "Null0", "bdev_name": "Null0"}},
                {"method": "nbd_server_add_listener", "params": {"path": self.ctx.path("nbd.sock")}}]}]}
        self.idle, self.initiator, self.sessions = [], None, 0
        self.run(self.ctx.own("rnbd-target"), "-c", self.ctx.write("scaling.json", config), "-m", "0x2", "-r", self.ctx.path("rpc.sock"))
        self.wait("ready", lambda: " ready " in self.log())

    def want_idle(self, row):
        """As many idle clients as the row says, and no others."""
        nbd = row["idle"] if row["protocol"] == "nbd" else 0
        while len(self.idle) > nbd:
            self.idle.pop().close()
        while len(self.idle) < nbd:
            self.idle.append(idle_nbd(self.ctx.path("nbd.sock"), "Null0", BLOCKS * BLOCK))
        rnbd = row["idle"] if row["protocol"] == "rnbd" else 0
        if self.initiator and self.sessions > rnbd:
            self.end_initiator()
        rpc = self.ctx.path("initiator.sock")
        if rnbd and not self.initiator:
            config = self.ctx.write("initiator.json", {"subsystems": []})
            log = open(self.ctx.path("initiator.log"), "wb")
            self.initiator = subprocess.Popen(["taskset", "-c", str(LOAD_CORE), self.ctx.own("rnbd-initiator"), "-c", config, "-m", "0x1", "-r", rpc], stdout=log, stderr=log)
            self.wait("the initiator", lambda: b" ready " in open(self.ctx.path("initiator.log"), "rb").read())
        while self.sessions < rnbd:
            self.sessions += 1
            call(rpc, "bdev_rnbd_map", {"name": f"Idle{self.sessions}", "sessname": f"idle{self.sessions}", "device_path": "Null0",
                                        "access_mode": "ro", "provider": "soft-roce", "paths": [{"src": "127.95.0.3", "dst": SERVER}]})
        # The target has looked for the last time at those that came and went.
        time.sleep(0.5)

    def end_initiator(self):
        if self.initiator:
            self.initiator.terminate()
            self.initiator.wait(common.limit(60))
        self.initiator, self.sessions = None, 0

    def stop(self):
        for client in self.idle:
            client.close()
        self.end_initiator()
        super().stop()

    def measure(self, row):
        self.want_idle(row)
        if row["protocol"] == "nbd":
            targets = [f"nbd+unix:///Null0?socket={self.ctx.path('nbd.sock')}"] * row["clients"]
        else:
            # One client writes a device.
            targets = [f"rnbd://{CLIENT}@{SERVER}/Null{n}?provider=soft-roce" for n in range(row["clients"])]
        before = self.cpu()
        r = perf(self.ctx, self.label, row, targets[0], *[word for t in targets[1:] for word in ("-T", t)])
        return with_server(r, self.cpu() - before)


def compare(ctx):
    return in_turns(ctx, ROWS, [Target(ctx)])
