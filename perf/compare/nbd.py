"""NBD servers on a unix socket, 256 MiB of random data in memory; the load is fio's nbd engine, or rnbd-perf."""
import os
import socket
import subprocess

from common import Contender, fio, in_turns, perf, say, with_server

SIZE = 256 << 20
ROWS = [{"case": f"nbd {bs} {rw} QD{depth}", "rw": rw, "bs": bs, "depth": depth} for rw, bs, depth in (
    ("randread", "4k", 1), ("randread", "4k", 32), ("read", "128k", 8),
    ("randwrite", "4k", 1), ("randwrite", "4k", 32), ("write", "128k", 8))]


class Server(Contender):
    export = ""

    @property
    def socket(self):
        return self.ctx.path(f"{self.label}.sock")

    @property
    def uri(self):
        return f"nbd+unix:///{self.export}?socket={self.socket}"

    def listens(self):
        return subprocess.run(["nbdinfo", "--size", self.uri], capture_output=True).returncode == 0

    def start(self):
        self.serve()
        self.wait("an answer", self.listens)
        subprocess.run(["nbdcopy", self.ctx.path("random.img"), self.uri], check=True)

    def measure(self, row):
        before = self.cpu()
        if self.ctx.args.load == "fio":
            r = fio(self.ctx, self.label, row, "--ioengine=nbd", f"--uri={self.uri}", f"--size={SIZE}")
        else:
            r = perf(self.ctx, self.label, row, self.uri)
        return with_server(r, self.cpu() - before)


class Rnbd(Server):
    """Polls for 1 ms after the last work, as by default, which counts as its CPU."""

    label, export, spin_us = "rnbd", "disk", 1000

    def serve(self):
        config = {"subsystems": [
            {"subsystem": "framework", "config": [
                {"method": "framework_set_idle_policy", "params": {"policy": "adaptive", "spin_us": self.spin_us}}]},
            {"subsystem": "bdev", "config": [
                {"method": "bdev_malloc_create", "params": {"name": "M0", "num_blocks": SIZE // 4096, "block_size": 4096}}]},
            {"subsystem": "nbd_server", "config": [
                {"method": "nbd_server_create_export", "params": {"name": "disk", "bdev_name": "M0"}},
                {"method": "nbd_server_add_listener", "params": {"path": self.socket}}]}]}
        path = self.ctx.write(f"{self.label}.json", config)
        self.run(self.ctx.own("rnbd-target"), "-c", path, "-r", self.ctx.path(f"{self.label}-rpc.sock"), "-m", "0x2")


class RnbdSleep(Rnbd):
    """Sleeps at once when there is nothing to do."""

    label, spin_us = "rnbd-sleep", 0


class Nbdkit(Server):
    label, needs = "nbdkit", ("nbdkit",)

    def serve(self):
        self.run("nbdkit", "-f", "-U", self.socket, "memory", str(SIZE))


class QemuNbd(Server):
    label, needs = "qemu-nbd", ("qemu-nbd",)

    def serve(self):
        image = self.ctx.path("qemu.img")
        with open(image, "wb") as f:
            f.truncate(SIZE)
        self.run("qemu-nbd", "-t", "-e", "4", "-f", "raw", "-k", self.socket, image)


class NbdServer(Server):
    label, needs, export = "nbd-server", ("nbd-server",), "disk"

    def serve(self):
        image, pid_file = self.ctx.path("nbd.img"), self.ctx.path("nbd-server.pid")
        with open(image, "wb") as f:
            f.truncate(SIZE)
        # A port of its own, or it would want 10809 on every address.
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        config = self.ctx.write("nbd-server.conf", f"[generic]\nport = {port}\nlistenaddr = 127.0.0.1\nunixsock = {self.socket}\n"
                                                   f"[disk]\nexportname = {image}\nflush = true\n")
        # It goes to the background by itself: in the foreground it serves one client, and not well.
        subprocess.run([*self.ctx.real, "taskset", "-c", "1", "nbd-server", "-C", config, "-p", pid_file], check=True)
        self.wait("its pid", lambda: os.path.exists(pid_file) and open(pid_file).read().strip())
        self.pids = [int(open(pid_file).read())]


def compare(ctx):
    missing = [p for p in ("nbdinfo", "nbdcopy", *(("fio",) if ctx.args.load == "fio" else ()))
               if subprocess.run(["which", p], capture_output=True).returncode]
    if missing:
        say(f"left out: nbd: {', '.join(missing)} not in PATH (apt-get install fio libnbd-bin)")
        return []
    with open(ctx.path("random.img"), "wb") as f:
        for _ in range(SIZE >> 20):
            f.write(os.urandom(1 << 20))
    return in_turns(ctx, ROWS, [c(ctx) for c in (Rnbd, RnbdSleep, Nbdkit, QemuNbd, NbdServer)])
