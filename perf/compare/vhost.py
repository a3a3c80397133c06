"""vhost-user-blk back ends; the load is rnbd-perf as front end and driver."""
import os

from common import Contender, in_turns, perf, with_server

SIZE = 256 << 20
ROWS = [{"case": f"vhost {name} {bs} {rw} QD{depth}", "rw": rw, "bs": bs, "depth": depth, "bdev": name}
        for name in ("null", "malloc") for rw, bs, depth in (("randread", "4k", 1), ("randread", "4k", 32), ("read", "128k", 8))]
BDEVS = [
    {"method": "bdev_null_create", "params": {"name": "null", "num_blocks": SIZE // 4096, "block_size": 4096}},
    {"method": "bdev_malloc_create", "params": {"name": "malloc", "num_blocks": SIZE // 4096, "block_size": 4096}}]


class BackEnd(Contender):
    def socket(self, bdev):
        return self.ctx.path(f"{self.label}-{bdev}")

    def start(self):
        self.serve()
        self.wait("its sockets", lambda: all(os.path.exists(self.socket(b["params"]["name"])) for b in BDEVS))
        # Blocks that were never written have no memory to read.
        row = {"case": "fill", "rw": "write", "bs": 65536, "depth": 8}
        perf(self.ctx, self.label, row, f"vhost:{self.socket('malloc')}", time_s=2)

    def measure(self, row):
        before = self.cpu()
        r = perf(self.ctx, self.label, row, f"vhost:{self.socket(row['bdev'])}")
        return with_server(r, self.cpu() - before)


class Rnbd(BackEnd):
    label = "rnbd-target"

    def serve(self):
        controllers = [{"method": "vhost_create_blk_controller", "params": {"ctrlr": self.socket(name), "dev_name": name}}
                       for name in ("null", "malloc")]
        config = {"subsystems": [{"subsystem": "bdev", "config": BDEVS}, {"subsystem": "vhost_blk", "config": controllers}]}
        path = self.ctx.write("rnbd.json", config)
        self.run(self.ctx.own("rnbd-target"), "-c", path, "-r", self.ctx.path("rnbd-rpc.sock"), "-m", "0x2")


class Qemu(BackEnd):
    label, needs = "qemu-storage-daemon", ("qemu-storage-daemon",)

    def serve(self):
        image = self.ctx.path("qemu.img")
        with open(image, "wb") as f:
            f.truncate(SIZE)
        nodes = {"null": f"driver=null-co,node-name=null,size={SIZE},read-zeroes=off",
                 "malloc": f"driver=file,node-name=malloc,filename={image}"}
        words = []
        for name, node in nodes.items():
            words += ["--blockdev", node, "--export", f"type=vhost-user-blk,id={name},node-name={name},writable=on,"
                      f"addr.type=unix,addr.path={self.socket(name)}"]
        self.run("qemu-storage-daemon", *words)


class Spdk(BackEnd):
    """SPDK's vhost polls all the time."""

    label, needs = "spdk-vhost", ("vhost",)

    def serve(self):
        controllers = [{"method": "vhost_create_blk_controller", "params": {
            "ctrlr": os.path.basename(self.socket(name)), "dev_name": name}} for name in ("null", "malloc")]
        config = {"subsystems": [{"subsystem": "bdev", "config": BDEVS}, {"subsystem": "vhost_blk", "config": controllers}]}
        path = self.ctx.write("spdk.json", config)
        # Beside its sockets it puts others; sizes as large as a guest's memory need room.
        self.run("vhost", "-c", path, "-S", self.ctx.scratch, "-m", "0x2", "--no-huge", "-s", "1024", "--disable-cpumask-locks",
                 "-r", self.ctx.path("spdk-rpc.sock"), core=None)


def compare(ctx):
    return in_turns(ctx, ROWS, [Rnbd(ctx), Qemu(ctx), Spdk(ctx)])
