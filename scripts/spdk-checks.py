#!/usr/bin/env python3
"""What may go wrong between rnbd-target and SPDK: spdk-checks.py DIR TARGET [SPDK_TGT]. See test-spdk.sh.

Each check starts its own target, without hugepages, as the user who runs this. SPDK_TGT, SPDK's own target, is the peer of
those that need one."""
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent / "vm")]
import nbd_raw
import rpc
from nbd_raw import limit

DIR, TARGET = pathlib.Path(sys.argv[1]), sys.argv[2]
PEER = sys.argv[3] if len(sys.argv) > 3 else None
NQN = "nqn.2016-06.io.spdk:cnode1"
checks = []


def check(f):
    checks.append(f)
    return f


class Refused(Exception):
    """An error that a method answered with."""

    def __init__(self, error):
        super().__init__(f"{error['message']} ({error['code']})")
        self.code = error["code"]


class Program:
    """A program with a JSON-RPC socket."""

    def __init__(self, name, *command):
        self.name, self.sock, self.log_path = name, str(DIR / f"{name}.sock"), DIR / f"{name}.log"
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen([*command, "-r", self.sock], stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def log(self):
        return self.log_path.read_text(errors="replace")

    def wait(self, what, condition):
        end = time.monotonic() + limit(180)
        while not condition():
            assert self.process.poll() is None, f"{self.name} ended before: {what}\n{self.log()[-3000:]}"
            assert time.monotonic() < end, f"waited in vain: {what}\n{self.log()[-3000:]}"
            time.sleep(0.05)

    def call(self, method, /, **params):
        answer = rpc.call(self.sock, method, params or None)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["result"]

    def kill(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()


class Target(Program):
    """rnbd-target with SPDK; `config`: SPDK's, as its "subsystems"."""

    def __init__(self, config=(), *arguments, others=()):
        options = {"no_huge": True, "mem_size": 512, "subsystems": list(config)}
        start = {"subsystem": "spdk", "config": [{"method": "spdk_set_options", "params": options}]}
        path = DIR / "config.json"
        path.write_text(json.dumps({"subsystems": [start, *others]}))
        super().__init__("target", TARGET, "-c", str(path), "-m", "0x1", *arguments)

    def ready(self):
        self.wait("it is ready", lambda: " ready " in self.log())
        return self

    def spdk(self, method, /, **params):
        return self.call("spdk_rpc", method=method, params=params)

    def malloc(self, name, blocks=2048):
        return self.spdk("bdev_malloc_create", name=name, num_blocks=blocks, block_size=512)

    def names(self):
        return [bdev["name"] for bdev in self.call("bdev_get_bdevs")]

    def refuses(self, code, part, method, /, **params):
        try:
            result = self.call(method, **params)
        except Refused as e:
            assert e.code == code and part in str(e), e
        else:
            raise AssertionError(f"{method} was not refused: {result}")

    def export(self, bdev):
        """An NBD export, and a connection to it."""
        path = str(DIR / "nbd.sock")
        if not os.path.exists(path):
            self.call("nbd_server_add_listener", path=path)
        self.call("nbd_server_create_export", name=bdev, bdev_name=bdev)
        return nbd_raw.Client(path).simple(bdev)

    def end(self, whole=True):
        """Ends it by signal; seconds that took."""
        began = time.monotonic()
        self.process.terminate()
        try:
            status = self.process.wait(limit(120))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"SIGTERM does not end it\n{self.log()[-3000:]}") from None
        assert status == 0, f"status {status}\n{self.log()[-3000:]}"
        assert ("SPDK stopped whole=true" in self.log()) == whole, self.log()[-3000:]
        with contextlib.suppress(FileNotFoundError):
            os.unlink(DIR / "nbd.sock")
        return time.monotonic() - began


@contextlib.contextmanager
def running(*arguments, **others):
    target = Target(*arguments, **others)
    try:
        yield target
    finally:
        target.kill()


@contextlib.contextmanager
def peer():
    """SPDK's target with a disk in memory on NVMe/TCP, and what attaches to it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    # It polls without pause: not on the first core, where the target is.
    core = hex(1 << max(os.sched_getaffinity(0)))
    other = Program("peer", PEER, "--no-huge", "-s", "2048", "-m", core, "--no-pci", "--disable-cpumask-locks")
    try:
        other.wait("it listens", lambda: os.path.exists(other.sock) and answers(other))
        other.call("nvmf_create_transport", trtype="TCP")
        other.call("bdev_malloc_create", name="Far", num_blocks=16384, block_size=512)
        other.call("nvmf_create_subsystem", nqn=NQN, allow_any_host=True)
        other.call("nvmf_subsystem_add_ns", nqn=NQN, namespace={"bdev_name": "Far"})
        address = {"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port}
        other.call("nvmf_subsystem_add_listener", nqn=NQN, listen_address=address)
        yield other, {"name": "Nvme0", "subnqn": NQN, **address}
    finally:
        other.kill()


def answers(program):
    try:
        program.call("spdk_get_version")
        return True
    except OSError:
        return False


def hang(target):
    """A bdev of SPDK whose examination does not come to its end in this test: a store may be on it, and reads take an hour."""
    target.malloc("Slow", 65536)
    hour = 3600 * 1000 * 1000
    latency = {"avg_read_latency": hour, "p99_read_latency": hour, "avg_write_latency": 1, "p99_write_latency": 1}
    assert target.spdk("bdev_delay_create", name="Hung", base_bdev_name="Slow", **latency) == "Hung"


@check
def requests_that_spdk_does_not_take():
    """Each is refused by itself; SPDK's other methods, and what is saved, are as before."""
    with running() as target:
        target.ready()
        # All that our own socket takes: with SPDK's frame around it, it is more than SPDK takes.
        call = {"jsonrpc": "2.0", "id": 1, "method": "bdev_lvol_create_lvstore", "params": {"bdev_name": "", "lvs_name": "s"}}
        compact = lambda: json.dumps(call, separators=(",", ":"))
        call["params"]["bdev_name"] = "x" * (262144 - len(compact()))
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(limit(120))
            s.connect(target.sock)
            s.sendall(compact().encode())
            assert b"; SPDK takes " in s.recv(65536)
        assert target.call("bdev_lvol_get_lvstores") == []
        assert target.malloc("M") == "M"
        assert target.call("bdev_wait_for_examine") is True
        (saved,) = target.call("framework_get_config", name="spdk")
        assert "bdev" in [s["subsystem"] for s in saved["params"]["subsystems"]]
        assert len(target.log().splitlines()) < 200
        target.end()


@check
def a_bdev_can_be_used_when_its_call_is_answered():
    with running() as target:
        target.ready()
        for name in ("M", "n" * 130):
            assert target.malloc(name) == name
            assert name in target.names(), name
        hang(target)
        # Each may have something on it that SPDK's modules look for: that does not end here, and is not waited for.
        assert "Hung" in target.names()
        target.malloc("After")
        assert "After" in target.names()
        disk = target.export("After")
        assert disk.request(nbd_raw.READ, 0, 512).chunk_data(512) == bytes(512)
        # What has nothing to do with it does not wait either.
        target.call("bdev_lvol_get_lvstores")
        print(f"   ended after {target.end(whole=False):.1f} s with a module at work")


@check
def what_cannot_be_offered():
    """The call that made it says so, and no other."""
    with running() as target:
        target.ready()
        target.call("bdev_malloc_create", name="Taken", num_blocks=2048, block_size=512)
        target.refuses(-17, "Taken exists already", "spdk_rpc", method="bdev_malloc_create",
                       params={"name": "Taken", "num_blocks": 2048, "block_size": 512})
        target.malloc("Base", 65536)
        target.refuses(-22, "zoned", "bdev_zone_block_create", name="Zoned", base_bdev="Base", zone_capacity=1024,
                       optimal_open_zones=1)
        assert target.call("bdev_lvol_get_lvstores") == []
        assert target.malloc("Other") == "Other"
        # It is still SPDK's, whose calls work on it.
        assert target.call("bdev_zone_block_delete", name="Zoned") is True
        target.end()
    # At the start, too, everything else is served.
    create = {"method": "bdev_malloc_create", "params": {"name": "Base", "num_blocks": 65536, "block_size": 512}}
    zone = {"name": "Zoned", "base_bdev": "Base", "zone_capacity": 1024, "optimal_open_zones": 1}
    config = [{"subsystem": "bdev", "config": [create, {"method": "bdev_zone_block_create", "params": zone}]}]
    with running(config) as target:
        target.ready()
        assert target.names() == ["Base"]
        assert "SPDK made its bdev Zoned, which is not offered" in target.log()
        target.end()


@check
def an_examination_that_hangs_does_not_make_the_start_deaf():
    delay = {"name": "Hung", "base_bdev_name": "Slow", "avg_read_latency": 3600000000, "p99_read_latency": 3600000000,
             "avg_write_latency": 1, "p99_write_latency": 1}
    config = [{"subsystem": "bdev", "config": [
        {"method": "bdev_malloc_create", "params": {"name": "Slow", "num_blocks": 65536, "block_size": 512}},
        {"method": "bdev_delay_create", "params": delay},
        {"method": "bdev_wait_for_examine"}]}]
    with running(config) as target:
        target.wait("it waits", lambda: "SPDK has not answered yet" in target.log())
        assert target.call("spdk_get_version")
        print(f"   ended after {target.end(whole=False):.1f} s")


@check
def native_bdevs_are_no_bases_of_spdk():
    with running() as target:
        target.ready()
        target.call("bdev_malloc_create", name="Native", num_blocks=65536, block_size=512)
        layers = [("bdev_passthru_create", {"name": "P", "base_bdev_name": "Native"}),
                  ("bdev_split_create", {"base_bdev": "Native", "split_count": 2}),
                  ("bdev_raid_create", {"name": "R", "raid_level": "0", "strip_size_kb": 4, "base_bdevs": ["Native"]}),
                  ("bdev_lvol_create_lvstore", {"bdev_name": "Native", "lvs_name": "s"})]
        for method, params in layers:
            target.refuses(-19, "is a bdev of this program", method, **params)
            target.refuses(-19, "is a bdev of this program", "spdk_rpc", method=method, params=params)
        # The other way round all is well.
        target.malloc("M")
        assert target.call("bdev_passthru_create", name="P", base_bdev_name="M") == "P"
        latency = {"avg_read_latency": 1, "p99_read_latency": 1, "avg_write_latency": 1, "p99_write_latency": 1}
        assert target.call("bdev_delay_create", name="D", base_bdev_name="P", **latency) == "D"
        assert {"M", "P", "D"} <= set(target.names())
        target.end()


@check
def rows_and_limits_are_those_of_spdk():
    with running() as target:
        target.ready()
        target.malloc("Base", 131072)
        uuid = target.call("bdev_lvol_create_lvstore", bdev_name="Base", lvs_name="store")
        target.call("bdev_lvol_create", lvs_name="store", lvol_name="v", size_in_mib=8, thin_provision=True)
        (row,) = target.call("bdev_get_bdevs", name="store/v")
        assert row["product_name"] == "Logical Volume" and row["aliases"][0] == "store/v", row
        lvol = row["driver_specific"]["lvol"]
        assert lvol["lvol_store_uuid"] == uuid and lvol["base_bdev"] == "Base" and lvol["thin_provision"] is True, lvol
        (base,) = target.call("bdev_get_bdevs", name="Base")
        assert base["claimed"] is True and base["claim_type"] == "read_many_write_one", base
        # SPDK takes thousands of them.
        assert target.call("bdev_set_qos_limit", name="store/v", rw_ios_per_sec=1000) is True
        (row,) = target.call("bdev_get_bdevs", name="store/v")
        assert row["assigned_rate_limits"]["rw_ios_per_sec"] == 1000, row
        (saved,) = target.call("framework_get_config", name="spdk")
        (bdevs,) = [s["config"] for s in saved["params"]["subsystems"] if s["subsystem"] == "bdev"]
        assert any(c["method"] == "bdev_set_qos_limit" for c in bdevs), bdevs
        # That many need two seconds, and no machine is too slow to need more.
        disk, began = target.export("store/v"), time.monotonic()
        for _ in range(3000):
            disk.request(nbd_raw.READ, 0, 512).chunk_data(512)
        assert time.monotonic() - began >= 1.9, f"3000 reads within {time.monotonic() - began:.2f} s"
        target.call("bdev_malloc_create", name="Native", num_blocks=2048, block_size=512)
        target.refuses(-95, "rate limits are not implemented", "bdev_set_qos_limit", name="Native", rw_ios_per_sec=1000)
        target.end()


@check
def errors_at_the_start_can_be_ignored():
    config = [{"subsystem": "bdev", "config": [
        {"method": "bdev_aio_create", "params": {"name": "A", "filename": "/nonexistent", "block_size": 512}},
        {"method": "bdev_of_another_spdk_create", "params": {}},
        {"method": "bdev_malloc_create", "params": {"name": "M", "num_blocks": 2048, "block_size": 512}}]}]
    with running(config) as target:
        assert target.process.wait(limit(120)) == 1
        assert "bdev_of_another_spdk_create" in target.log(), target.log()
    with running(config, "--json-ignore-init-errors") as target:
        target.ready()
        assert target.names() == ["M"]
        target.end()


@check
def a_configuration_of_spdk_tgt():
    """As its save_config writes it: layers stand before their bases, and most of its subsystems are not here."""
    with peer() as (other, attach):
        for name in ("M0", "M1", "M2"):
            other.call("bdev_malloc_create", name=name, num_blocks=65536, block_size=512)
        latency = {"avg_read_latency": 1, "p99_read_latency": 1, "avg_write_latency": 1, "p99_write_latency": 1}
        other.call("bdev_passthru_create", name="P", base_bdev_name="M0")
        other.call("bdev_delay_create", name="D", base_bdev_name="P", **latency)
        other.call("bdev_error_create", base_name="M1")
        other.call("bdev_split_create", base_bdev="M2", split_count=2)
        other.call("bdev_set_qos_limit", name="D", rw_mbytes_per_sec=100)
        subsystems = [{"subsystem": s["subsystem"], "config": other.call("framework_get_config", name=s["subsystem"])}
                      for s in other.call("framework_get_subsystems")]
    with running(subsystems) as target:
        target.ready()
        wanted = {"M0", "M1", "M2", "P", "D", "EE_M1", "M2p0", "M2p1"}
        assert wanted <= set(target.names()), target.names()
        assert re.search("passed over: these subsystems.*nvmf", target.log()), target.log()
        (row,) = target.call("bdev_get_bdevs", name="D")
        assert row["assigned_rate_limits"]["rw_mbytes_per_sec"] == 100, row
        # And what this program saves of it is the same again.
        (saved,) = target.call("framework_get_config", name="spdk")
        target.end()
    with running(saved["params"]["subsystems"]) as target:
        target.ready()
        assert wanted <= set(target.names()), target.names()
        target.end()


@check
def a_namespace_over_fabrics():
    with peer() as (other, attach), running() as target:
        target.ready()
        assert target.call("bdev_nvme_attach_controller", **attach) == ["Nvme0n1"]
        (row,) = target.call("bdev_get_bdevs", name="Nvme0n1")
        assert row["product_name"] == "NVMe disk" and row["num_blocks"] == 16384, row
        assert row["driver_specific"]["nvme"][0]["trid"]["subnqn"] == NQN, row
        disk = target.export("Nvme0n1")
        data = os.urandom(65536)
        disk.request(nbd_raw.WRITE, 4096, data=data).chunk_data(0)
        assert disk.request(nbd_raw.READ, 4096, len(data)).chunk_data(len(data)) == data
        # Another namespace comes unasked.
        other.call("bdev_malloc_create", name="Far2", num_blocks=2048, block_size=512)
        other.call("nvmf_subsystem_add_ns", nqn=NQN, namespace={"bdev_name": "Far2"})
        target.wait("the second namespace", lambda: "Nvme0n2" in target.names())
        assert target.call("bdev_nvme_detach_controller", name="Nvme0") is True
        target.wait("it is gone", lambda: target.names() == [])
        # Of two that it brings, one has a name that is taken here: the other can be used.
        target.call("bdev_malloc_create", name="Nvme0n2", num_blocks=2048, block_size=512)
        assert target.call("bdev_nvme_attach_controller", **attach) == ["Nvme0n1"]
        assert "Nvme0n1" in target.names() and "SPDK made its bdev Nvme0n2, which is not offered" in target.log()
        target.end()


def lost(stop):
    """SIGTERM while SPDK holds a read that nobody will answer."""
    with peer() as (other, attach), running() as target:
        target.ready()
        # As spdk-rpc's -l -1: the controller comes back, or its requests wait for ever.
        made = target.call("bdev_nvme_attach_controller", ctrlr_loss_timeout_sec=-1, reconnect_delay_sec=1, **attach)
        assert made == ["Nvme0n1"] and "Nvme0n1" in target.names(), made
        disk = target.export("Nvme0n1")
        assert disk.request(nbd_raw.READ, 0, 4096).chunk_data(4096) == bytes(4096)
        target.malloc("Near")
        near = target.export("Near")
        if stop:
            other.process.send_signal(signal.SIGSTOP)
        else:
            other.kill()
        disk.request(nbd_raw.READ, 0, 4096)
        # The reactor has made turns since.
        for _ in range(2):
            near.request(nbd_raw.READ, 0, 512).chunk_data(512)
        seconds = target.end(whole=False)
        print(f"   ended after {seconds:.1f} s")


@check
def an_end_with_a_request_at_a_controller_that_is_gone():
    lost(stop=False)


@check
def an_end_with_a_request_at_a_controller_that_hangs():
    lost(stop=True)


def chunk_data(self, length):
    """The data of a simple reply without error."""
    magic, error, cookie = nbd_raw.struct.unpack(">IIQ", nbd_raw.receive(self.sock, 16))
    assert (magic, error, cookie) == (0x67446698, 0, 7), (magic, error, cookie)
    return nbd_raw.receive(self.sock, length)


nbd_raw.Client.chunk_data = chunk_data


def main():
    only = os.environ.get("ONLY", "")
    peers = {"a_configuration_of_spdk_tgt", "a_namespace_over_fabrics", "an_end_with_a_request_at_a_controller_that_is_gone",
             "an_end_with_a_request_at_a_controller_that_hangs"}
    for f in checks:
        if not re.search(only, f.__name__):
            continue
        if f.__name__ in peers and not PEER:
            print(f"NOT TESTED: {f.__name__}: there is no spdk_tgt")
            continue
        print(f"-- {f.__name__.replace('_', ' ')}", flush=True)
        f()


main()
