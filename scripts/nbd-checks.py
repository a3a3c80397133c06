#!/usr/bin/env python3
"""What clients may ask of the NBD server and how it answers: nbd-checks.py DIR PORT PID RPC_PY. See test-nbd.sh.

With libnbd, and what no library sends byte by byte (nbd_raw.py)."""
import contextlib
import errno
import faulthandler
import importlib.util
import json
import os
import socket
import struct
import sys
import time

import nbd
import nbd_raw
from nbd_raw import Client, limit

DIR, PORT, PID, RPC = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
SOCK, NEW, OLD, SEED = (f"{DIR}/{name}.sock" for name in ("nbd", "newstyle", "oldstyle", "1997"))
SIZE = 64 << 20

spec = importlib.util.spec_from_file_location("rpc", RPC)
rpc = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rpc)


def call(method, **params):
    answer = rpc.call(f"{DIR}/rpc.sock", method, params or None)
    if "error" in answer:
        raise RuntimeError(answer["error"]["message"])
    return answer["result"]


def connect(export="disk", sock=SOCK, **settings):
    h = nbd.NBD()
    h.set_export_name(export)
    for name, value in settings.items():
        getattr(h, name)(value)
    h.connect_unix(sock)
    return h


@contextlib.contextmanager
def refused(number):
    try:
        yield
    except nbd.Error as e:
        assert e.errnum == number, f"{errno.errorcode.get(e.errnum)} instead of {errno.errorcode[number]}: {e}"
    else:
        raise AssertionError(f"not refused, {errno.errorcode[number]} expected")


def wait_for(what):
    end = time.monotonic() + limit(120)
    while not what():
        assert time.monotonic() < end, f"waited {limit(120)} s in vain"
        time.sleep(0.02)


def handshakes():
    """Fixed newstyle, newstyle without it, with and without the 124 zeroes; and a server that is newstyle only."""
    for flags in (0, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, nbd.HANDSHAKE_FLAG_NO_ZEROES,
                  nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE | nbd.HANDSHAKE_FLAG_NO_ZEROES):
        for sock in (SOCK, NEW):
            h = connect(sock=sock, set_handshake_flags=flags)
            fixed = flags & nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE and sock == SOCK
            assert h.get_protocol() == ("newstyle-fixed" if fixed else "newstyle"), h.get_protocol()
            assert h.get_size() == SIZE and h.get_structured_replies_negotiated() == bool(fixed)
            h.pwrite(b"h" * 512, 0)
            assert h.pread(512, 0) == b"h" * 512
            h.shutdown()


def names():
    """The default export, and one that is not there."""
    h = connect("", set_full_info=True)
    assert h.get_canonical_export_name() == "disk", h.get_canonical_export_name()
    assert h.get_export_description() == "a disk in memory"
    h.shutdown()
    with refused(errno.ENOENT):
        connect("none")
    # Without fixed newstyle the server can only hang up.
    try:
        connect("none", sock=NEW)
    except nbd.Error:
        pass
    else:
        raise AssertionError("an unknown export over EXPORT_NAME")


def options():
    """A client that asks before it chooses."""
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_unix(SOCK)
    seen = []
    assert h.opt_list(lambda name, description: seen.append(name)) == 4
    assert seen == ["4k", "disk", "file", "readonly"], seen
    h.set_export_name("none")
    with refused(errno.ENOENT):
        h.opt_info()
    h.set_export_name("4k")
    h.opt_info()
    assert h.get_block_size(nbd.SIZE_MINIMUM) == 4096
    h.set_export_name("readonly")
    h.opt_go()
    assert h.is_read_only()
    h.shutdown()
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_unix(SOCK)
    h.opt_abort()


def refusals():
    """Requests that make no sense get an error, and the connection goes on."""
    h = connect(set_strict_mode=0)
    for length, offset in ((512, SIZE), (1024, SIZE - 512), (512, 1 << 62), (100, SIZE - 99), (0, 0)):
        with refused(errno.EINVAL):
            h.pread(length, offset)
    with refused(errno.ENOSPC):
        h.pwrite(b"x" * 1024, SIZE - 512)
    with refused(errno.ENOSPC):
        h.zero(1024, SIZE - 512)
    with refused(errno.EINVAL):
        h.trim(1024, SIZE - 512)
    with refused(errno.EINVAL):
        h.cache(512, 0)
    with refused(errno.EINVAL):
        h.block_status(512, 0, lambda *_: 0)
    with refused(errno.EOVERFLOW):
        h.pread((32 << 20) + 512, 0, nbd.CMD_FLAG_DF)
    assert h.pread(512, 0)
    h.shutdown()
    h = connect("readonly", set_strict_mode=0)
    with refused(errno.EPERM):
        h.pwrite(b"x" * 512, 0)
    for change in (lambda: h.trim(512, 0), lambda: h.zero(512, 0), lambda: h.zero(512, 0, nbd.CMD_FLAG_FAST_ZERO)):
        with refused(errno.EPERM):
            change()
    assert h.pread(512, 0)
    h.flush()
    h.shutdown()


def any_range():
    """Requests need not be whole blocks, whether the client has asked for the sizes or not, and however old it is."""
    for export, block in (("disk", 512), ("4k", 4096), ("file", 512)):
        for asks in (True, False):
            h = connect(export, set_request_block_size=asks, set_strict_mode=0, add_meta_context="base:allocation")
            assert h.get_block_size(nbd.SIZE_MINIMUM) == (block if asks else 0)
            h.pwrite(b"a" * 3 * block, 0)
            h.pwrite(b"b", 0, nbd.CMD_FLAG_FUA)
            h.pwrite(b"c" * block, block - 1)
            h.zero(2, block, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
            h.trim(block, 1)
            right = b"b" + b"a" * (block - 2) + b"c\0\0" + b"c" * (block - 3) + b"a" * (block + 1)
            assert h.pread(3 * block, 0) == right
            for length, offset in ((1, 0), (5, 3), (block, 7), (2 * block + 1, block - 2)):
                assert h.pread(length, offset) == right[offset:offset + length], (export, length, offset)
            seen = []
            h.block_status(block, 3, lambda name, at, extents, _: seen.append((at, extents[0])))
            assert seen == [(3, block)], seen
            h.flush()
            h.shutdown()
    h = connect("disk", OLD)
    h.pwrite(b"old", 4095)
    assert h.pread(5, 4094)[1:4] == b"old"
    h.shutdown()


def raw():
    """What no library sends."""
    def client(data):
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(limit(120))
        s.connect(SOCK)
        assert s.recv(18, socket.MSG_WAITALL) == b"NBDMAGICIHAVEOPT\0\3"
        s.sendall(data)
        return s

    def request(magic=0x25609513, command=0, offset=0, length=512, flags=0):
        return struct.pack(">IHHQQI", magic, flags, command, 7, offset, length)

    go = b"\0\0\0\3IHAVEOPT" + struct.pack(">IIIH", 1, 4, 0, 0)[:8] + b"disk"
    for end in (b"\0\0\0\7", b"\0\0\0\3GET / HTTP/1.1\r\n", b"\0\0\0\3IHAVEOPT\0\0\0\7\xff\xff\xff\xff"):
        s = client(end)
        assert s.recv(1) == b"", end
    # The first request may come with the choice of the export.
    s = client(go + request(length=1024))
    assert s.recv(10, socket.MSG_WAITALL)[:8] == struct.pack(">Q", SIZE)
    assert s.recv(16, socket.MSG_WAITALL) == struct.pack(">IIQ", 0x67446698, 0, 7)
    assert len(s.recv(1024, socket.MSG_WAITALL)) == 1024
    # The payload of a refused write is passed over; an unknown command has none.
    s.sendall(request(command=1, offset=SIZE, length=4096) + b"x" * 4096 + request(command=99) + request(flags=0x80))
    errors = [struct.unpack(">IIQ", s.recv(16, socket.MSG_WAITALL))[1] for _ in range(3)]
    assert errors == [errno.ENOSPC, errno.EINVAL, errno.EINVAL], errors
    # After a wrong magic nobody knows where the next request begins.
    s.sendall(request(magic=0x25609514))
    assert s.recv(1) == b""
    s = client(go + request(command=1, length=(32 << 20) + 512))
    assert s.recv(11, socket.MSG_WAITALL)[10:] == b""


def chunks():
    """Structured replies: data in one chunk, holes for what is all zeroes, errors with an offset."""
    h = connect()
    h.pwrite(b"c" * 65536, 0)
    h.zero(65536, 65536)

    def read(length, offset, flags=0):
        seen = []
        data = h.pread_structured(length, offset, lambda part, at, kind, _: seen.append((len(part), at, kind)), flags)
        return data, seen

    for flags in (0, nbd.CMD_FLAG_DF):
        data, seen = read(65536, 0, flags)
        assert data == b"c" * 65536 and seen == [(65536, 0, nbd.READ_DATA)], seen
        data, seen = read(4096, 65536, flags)
        assert data == bytes(4096) and [s[1:] for s in seen] == [(65536, nbd.READ_HOLE)], seen
        data, seen = read(65536, 32768, flags)
        assert data == b"c" * 32768 + bytes(32768) and [s[2] for s in seen] == [nbd.READ_DATA], seen
    assert h.can_df() and h.can_fast_zero() and not h.can_cache()
    h.zero(1 << 20, 1 << 20, nbd.CMD_FLAG_FAST_ZERO)
    h.shutdown()
    h = connect(set_request_structured_replies=False)
    assert not h.get_structured_replies_negotiated() and not h.can_df()
    assert h.pread(131072, 0) == b"c" * 65536 + bytes(65536)
    h.shutdown()


def extents(h, length, offset, flags=0):
    seen = []
    h.block_status(length, offset, lambda context, at, entries, _: seen.append((context, at, list(entries))), flags)
    ((context, at, entries),) = seen
    assert context == "base:allocation" and at == offset, seen
    return list(zip(entries[::2], entries[1::2]))


def block_status():
    """What is allocated: known of a file, all data of a disk in memory."""
    def ask(export):
        h = nbd.NBD()
        h.set_export_name(export)
        h.add_meta_context("base:allocation")
        h.add_meta_context("x-none:this")
        h.connect_unix(SOCK)
        assert h.can_meta_context("base:allocation") and not h.can_meta_context("x-none:this")
        return h

    h = ask("file")
    h.trim(SIZE, 0)
    h.pwrite(b"f" * 65536, 1 << 20)
    h.pwrite(b"f" * 65536, 4 << 20)
    hole = nbd.STATE_HOLE | nbd.STATE_ZERO
    whole = [(1 << 20, hole), (65536, 0), ((3 << 20) - 65536, hole), (65536, 0), (SIZE - (4 << 20) - 65536, hole)]
    assert extents(h, SIZE, 0) == whole, extents(h, SIZE, 0)
    assert extents(h, SIZE, 0, nbd.CMD_FLAG_REQ_ONE) == whole[:1]
    assert extents(h, 512, 1 << 20) == [(512, 0)]
    assert extents(h, 131072, (1 << 20) + 512) == [(65024, 0), (66048, hole)]
    # Many questions at once, and requests between them.
    cookies = [h.aio_block_status(512, 512 * i, lambda *_: 0) for i in range(200)]
    assert h.pread(512, 1 << 20) == b"f" * 512
    # The read may have seen all of them come: then there is nothing left to wait for.
    while cookies := [c for c in cookies if not h.aio_command_completed(c)]:
        h.poll(-1)
    h.shutdown()
    h = ask("disk")
    assert extents(h, SIZE, 0) == [(SIZE, 0)]
    h.shutdown()
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.set_export_name("disk")
    h.connect_unix(SOCK)
    names = []
    assert h.opt_list_meta_context(names.append) == 1 and names == ["base:allocation"], names
    h.opt_abort()


def extended():
    """Extended headers: replies with the request's offset, lengths of 64 bits, status of chosen contexts."""
    c = Client(SOCK).extended("file")
    flags = nbd_raw.HAS_FLAGS | nbd_raw.SEND_DF | nbd_raw.BLOCK_STATUS_PAYLOAD
    assert c.flags & flags == flags, hex(c.flags)
    c.request(nbd_raw.WRITE, offset=8192, data=b"e" * 4096)
    assert c.chunk() == (nbd_raw.NONE, 8192, b"")
    c.request(nbd_raw.READ, offset=8192, length=4096)
    assert c.chunk() == (nbd_raw.OFFSET_DATA, 8192, struct.pack(">Q", 8192) + b"e" * 4096)
    c.request(nbd_raw.TRIM, offset=0, length=SIZE)
    assert c.chunk() == (nbd_raw.NONE, 0, b"")
    c.request(nbd_raw.READ, offset=8192, length=4096)
    assert c.chunk() == (nbd_raw.OFFSET_HOLE, 8192, struct.pack(">QI", 8192, 4096))
    status = struct.pack(">IIQQ", 1, 1, SIZE, 3)
    c.request(nbd_raw.BLOCK_STATUS, length=SIZE)
    assert c.chunk() == (nbd_raw.BLOCK_STATUS_EXT, 0, status)
    c.request(nbd_raw.BLOCK_STATUS, data=struct.pack(">QI", SIZE, 1))
    assert c.chunk() == (nbd_raw.BLOCK_STATUS_EXT, 0, status)
    # 64-bit lengths are looked at as a whole.
    for command, length, error in ((nbd_raw.TRIM, (1 << 32) + 512, errno.EINVAL),
                                   (nbd_raw.WRITE_ZEROES, 1 << 63, errno.ENOSPC),
                                   (nbd_raw.BLOCK_STATUS, 1 << 32, errno.EINVAL),
                                   (nbd_raw.READ, (1 << 32) + 512, errno.EINVAL)):
        c.request(command, length=length)
        assert c.error() == error, command
    # Payloads that nobody wants are passed over.
    for command, data in ((nbd_raw.READ, b"x" * 512), (nbd_raw.TRIM, b"y"), (99, b"z" * 100000),
                          (nbd_raw.BLOCK_STATUS, struct.pack(">QII", 512, 1, 1)),
                          (nbd_raw.BLOCK_STATUS, struct.pack(">QI", 512, 2)),
                          (nbd_raw.BLOCK_STATUS, b"short"), (nbd_raw.BLOCK_STATUS, struct.pack(">Q", 512)),
                          (nbd_raw.BLOCK_STATUS, b"l" * 5000)):
        c.request(command, data=data)
        assert c.error() == errno.EINVAL, command
    # QEMU's client never sets PAYLOAD_LEN: the data of a WRITE follow all the same.
    c.request(nbd_raw.WRITE, offset=8192, length=512)
    c.sock.sendall(b"q" * 512)
    assert c.chunk() == (nbd_raw.NONE, 8192, b"")
    c.request(nbd_raw.READ, offset=8192, length=512)
    assert c.chunk() == (nbd_raw.OFFSET_DATA, 8192, struct.pack(">Q", 8192) + b"q" * 512)
    c.request(nbd_raw.FLUSH)
    assert c.chunk() == (nbd_raw.NONE, 0, b"")
    c.request(nbd_raw.WRITE, data_len=(32 << 20) + 512)
    assert c.is_closed()


def old_dialects():
    """Oldstyle with libnbd, and 1997 byte by byte."""
    h = connect("", sock=OLD)
    assert h.get_protocol() == "oldstyle" and h.get_size() == SIZE and h.can_flush() and not h.can_df()
    h.pwrite(b"o" * 4096, 0)
    assert h.pread(4096, 0) == b"o" * 4096
    h.shutdown()
    s = nbd_raw.connect(SEED)
    s.sendall(struct.pack(">IIIQI", 0x12560953, SIZE - 1024, 1024, 0xabcdef, 1) + b"1" * 1024)
    assert nbd_raw.receive(s, 16) == struct.pack(">IQI", 0x96744668, 0xabcdef, 0)
    s.sendall(struct.pack(">IIIQI", 0x12560953, SIZE - 512, 512, 77, 0))
    assert nbd_raw.receive(s, 16 + 512) == struct.pack(">IQI", 0x96744668, 77, 0) + b"1" * 512
    for offset, length, kind in ((SIZE - 512, 1024, 0), (0xfffffe00, 1024, 0), (0, 512, 2), (0, 0, 0), (0, 512, 1 << 16)):
        s.sendall(struct.pack(">IIIQI", 0x12560953, offset, length, 5, kind))
        assert nbd_raw.receive(s, 16) == struct.pack(">IQI", 0x96744668, 5, errno.EINVAL), (offset, length, kind)
    s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 512))
    assert s.recv(1) == b"", "a modern client"
    call("bdev_null_create", name="huge", num_blocks=(8 << 20) + 1, block_size=512)
    call("nbd_server_create_export", name="huge", bdev_name="huge")
    try:
        call("nbd_server_add_listener", path=f"{DIR}/huge.sock", dialect="1997", export="huge")
    except RuntimeError as e:
        assert "32-bit offsets: 4294967296 bytes are the most" in str(e), e
    else:
        raise AssertionError("more than 4 GiB over 1997")
    call("nbd_server_delete_export", name="huge")
    call("bdev_null_delete", name="huge")


def injection():
    """What somebody puts in the clear behind STARTTLS is taken for TLS, which it is not; nothing of it is answered."""
    for behind in (b"", struct.pack(">II", nbd_raw.LIST, 0)):
        c = Client(f"{DIR}/tls.sock").client_flags()
        for option in (nbd_raw.LIST, nbd_raw.GO, nbd_raw.STRUCTURED_REPLY, nbd_raw.EXTENDED, nbd_raw.SET_META):
            assert c.option(option).reply() == nbd_raw.TLS_REQD
        c.sock.sendall(b"IHAVEOPT" + struct.pack(">II", nbd_raw.STARTTLS, 0) + b"IHAVEOPT" + behind)
        assert c.reply() == nbd_raw.ACK
        if not behind:
            c.sock.shutdown(socket.SHUT_WR)
        said = receive_all(c.sock)
        # An alert, if anything.
        assert said == b"" or said[0] == 21 and len(said) == 7, said
    c = Client(f"{DIR}/tls.sock").client_flags().option(nbd_raw.EXPORT_NAME, b"disk")
    assert c.is_closed()


def allow_lists():
    """Who may have an export, and see it."""
    mine, other = os.getuid(), os.getuid() + 1
    call("nbd_server_create_export", name="mine", bdev_name="M0", read_only=True, allow=[{"uid": mine}])
    call("nbd_server_create_export", name="other", bdev_name="M0", read_only=True,
         allow=[{"uid": other}, {"addr": "192.0.2.0/24"}])
    call("nbd_server_create_export", name="local", bdev_name="M0", read_only=True, allow=[{"addr": "127.0.0.0/8"}])

    def listed(connect_to):
        h = nbd.NBD()
        h.set_opt_mode(True)
        connect_to(h)
        names = []
        h.opt_list(lambda name, _: names.append(name))
        h.opt_abort()
        return [n for n in names if n in ("mine", "other", "local")]

    assert listed(lambda h: h.connect_unix(SOCK)) == ["mine"]
    assert listed(lambda h: h.connect_tcp("127.0.0.1", str(PORT))) == ["local"]
    connect("mine").shutdown()
    for name in ("other", "local"):
        try:
            connect(name)
        except nbd.Error as e:
            assert "policy" in str(e), e
        else:
            raise AssertionError(f"{name} is not for us")
    for name in ("mine", "other", "local"):
        call("nbd_server_delete_export", name=name)


def hostile():
    """Bytes that no client should send; the table of all of them is the machine's (nbd-proto)."""
    for name, send, wanted in nbd_raw.HOSTILE_HANDSHAKES:
        c = Client(SOCK)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send(c)
        answers = c.answers()
        assert answers == wanted, f"{name}: {answers} instead of {wanted}"
    for name, setup, send, wanted in nbd_raw.HOSTILE_REQUESTS:
        c = setup(Client(SOCK))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send(c)
        answers = [c.error() for e in wanted if e is not None] + ([None] if None in wanted and c.is_closed() else [])
        assert answers == wanted, f"{name}: {answers} instead of {wanted}"
    assert connect().pread(512, 0)


def loris():
    """Those who say little and slowly are shed, and hold nothing for long."""
    # Handshakes may take so long here, and there are 64 at a time: the first have made room for the last.
    begin, seconds = time.monotonic(), int(os.environ["HANDSHAKE_MS"]) / 1000
    silent = [Client(SOCK, greeting=False) for _ in range(70)]
    for client in silent[-30:]:
        client.sock.sendall(b"\0\0\0\3IHAVE")

    def handshakes():
        return sum(listener["handshakes"] for listener in call("nbd_server_get_listeners"))

    most = handshakes()
    for client in silent:
        assert len(receive_all(client.sock)) == 18
        most = max(most, handshakes())
    took = time.monotonic() - begin
    assert took > seconds, f"shed after {took} s, too early"
    assert most <= 64, f"{most} handshakes at a time"
    print(f"70 silent clients were shed after {took:.1f} s")
    # Long writes that never go on: the memory is theirs as far as they came (in huge pages), the connection for a while.
    stalled = [Client(SOCK).simple("disk") for _ in range(20)]
    before = rss()
    for client in stalled:
        client.request(nbd_raw.WRITE, data_len=32 << 20, data=b"s" * 4096)
    time.sleep(0.5)
    assert rss() - before < 32 << 20, f"{rss() - before} bytes more"
    assert connect().pread(1 << 20, 0)
    for client in stalled:
        client.sock.close()


def begin_and_stop():
    """Clients that begin a request, and go on with it or not, for as long as the other tests take."""
    since, clients = time.monotonic(), []
    for begin in (lambda c: c.sock.sendall(b"\x25\x60\x95"), lambda c: c.request(nbd_raw.WRITE, data_len=8192, data=b"x"),
                  lambda c: c.request(nbd_raw.WRITE, data_len=1 << 20, data=b"x" * 5000), lambda c: None):
        clients.append(Client(SOCK).simple("file"))
        begin(clients[-1])
    return since, clients


def are_shed(since, clients):
    """They were, after 30 s; a client that is just quiet stays."""
    *stopped, quiet = clients
    for c in stopped:
        assert c.is_closed()
    took = time.monotonic() - since
    assert took >= 30, f"shed after {took} s, too early"
    quiet.request(nbd_raw.READ, length=512)
    assert quiet.chunk()[0] == nbd_raw.NONE and len(nbd_raw.receive(quiet.sock, 512)) == 512
    quiet.sock.close()


def receive_all(s):
    data = b""
    while piece := s.recv(4096):
        data += piece
    return data


def rss():
    with open(f"/proc/{PID}/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def large():
    """The longest request that there may be."""
    h = connect()
    data = os.urandom(1 << 20) * 32
    h.pwrite(data, 4096)
    assert h.pread(32 << 20, 4096) == data
    h.shutdown()


def queue():
    """Many requests at once, of all sizes, on connections of one export."""
    def piece(i, j):
        return (i * 128 + j) << 17, bytes([(i * 120 + j) % 251 + 1]) * (512 << j % 9)

    clients = [connect() for _ in range(4)]
    for i, h in enumerate(clients):
        for j in range(120):
            offset, data = piece(i, j)
            h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset)
    for h in clients:
        while h.aio_in_flight() > 0:
            h.poll(-1)
            while h.aio_in_flight() > 0 and h.aio_peek_command_completed() > 0:
                h.aio_command_completed(h.aio_peek_command_completed())
    # A flush of one covers the others, and each sees what the others wrote.
    clients[0].flush()
    for i, h in enumerate(clients):
        for j in range(120):
            offset, data = piece((i + 1) % 4, j)
            assert h.pread(len(data), offset) == data, (i, j)
        h.shutdown()


def slow_reader():
    """A client that does not read its answers holds nobody up, and does not stay for ever when it is told to go."""
    def stuck():
        s = socket.socket(socket.AF_UNIX)
        s.connect(SOCK)
        s.recv(18, socket.MSG_WAITALL)
        s.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\1\0\0\0\4disk")
        s.recv(10, socket.MSG_WAITALL)
        for i in range(64):
            s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, i, 0, 1 << 20))
        return s

    s = stuck()
    wait_for(lambda: any(c["num_read_ops"] >= 4 for c in call("nbd_server_get_connections", export="disk")))
    h = connect()
    assert h.pread(4096, 0)
    ident = min(c["id"] for c in call("nbd_server_get_connections", export="disk"))
    assert call("nbd_server_disconnect", id=ident) is True
    assert ident not in [c["id"] for c in call("nbd_server_get_connections")]
    assert h.pread(4096, 0)
    h.shutdown()
    s.close()


def control():
    """Exports and listeners come and go under their clients."""
    before = len(os.listdir(f"/proc/{PID}/fd"))
    call("nbd_server_create_export", name="passing", bdev_name="M0")
    call("nbd_server_add_listener", path=f"{DIR}/more.sock", export="passing")
    rows = call("nbd_server_get_listeners")
    # As many handshakes as are set, or as the limit of open files allows.
    assert all(1 <= row.pop("max_handshakes") <= 64 for row in rows), rows
    assert {"path": f"{DIR}/more.sock", "dialect": "auto", "export": "passing", "handshakes": 0} in rows, rows
    h = connect("", sock=f"{DIR}/more.sock")
    h.pwrite(b"p" * 1024, 0)
    (row,) = call("nbd_server_get_connections", export="passing")
    assert row["peer"]["pid"] == os.getpid() and row["bytes_written"] == 1024 and row["state"] == "connected", row
    (row,) = call("nbd_server_get_exports", name="passing")
    assert row["connections"] == 1 and row["size"] == SIZE, row
    assert call("nbd_server_remove_listener", path=f"{DIR}/more.sock") is True
    assert not os.path.exists(f"{DIR}/more.sock")
    assert h.pread(1024, 0) == b"p" * 1024
    assert call("nbd_server_delete_export", name="passing") is True
    try:
        h.pread(512, 0)
    except nbd.Error:
        pass
    else:
        raise AssertionError("served after the end of the export")
    for method, params, word in (
            ("nbd_server_delete_export", {"name": "passing"}, "no export named 'passing'"),
            ("nbd_server_create_export", {"name": "disk", "bdev_name": "M0"}, "exists already"),
            ("nbd_server_create_export", {"name": "x", "bdev_name": "none"}, "no bdev named none"),
            ("nbd_server_create_export", {"name": "", "bdev_name": "M0"}, "no export name"),
            ("nbd_server_create_export", {"name": "x", "bdev_name": "M0", "readonly": True}, "did you mean 'read_only'"),
            ("nbd_server_add_listener", {"path": SOCK}, "listened on already"),
            ("nbd_server_add_listener", {"path": f"{DIR}/target.log"}, "is not a socket"),
            ("nbd_server_add_listener", {"path": f"{DIR}/rpc.sock"}, "in use"),
            ("nbd_server_add_listener", {}, "give either path"),
            ("nbd_server_add_listener", {"traddr": "localhost"}, "no IP address"),
            ("nbd_server_add_listener", {"traddr": "127.0.0.1", "trsvcid": str(PORT)}, "listened on already"),
            ("nbd_server_add_listener", {"path": f"{DIR}/x", "dialect": "1998"}, "expected one of auto, fixed, newstyle"),
            ("nbd_server_add_listener", {"path": f"{DIR}/x", "dialect": "fixed", "reply_magic": 1}, "only replies of dialect 1997"),
            ("nbd_server_add_listener", {"path": f"{DIR}/x", "tls": "allow"}, "TLS needs a directory"),
            ("nbd_server_add_listener", {"path": f"{DIR}/x", "tls": "require", "tls_certificates": "/none"}, "/none/server-cert.pem"),
            ("nbd_server_add_listener", {"path": f"{DIR}/x", "tls_certificates": f"{DIR}/pki"}, "with tls allow or require only"),
            ("nbd_server_add_listener", {"path": f"{DIR}/x", "dialect": "oldstyle", "tls": "allow"}, "without STARTTLS"),
            ("nbd_server_create_export", {"name": "x", "bdev_name": "M0", "allow": [{}]}, "needs addr, uid or tls_cn"),
            ("nbd_server_create_export", {"name": "x", "bdev_name": "M0", "allow": [{"addr": "10.0.0.0/33"}]}, "no network"),
            ("nbd_server_remove_listener", {"traddr": "127.0.0.1"}, "nothing listens on 127.0.0.1:10809"),
            ("nbd_server_disconnect", {"id": 123456}, "no connection 123456")):
        try:
            call(method, **params)
        except RuntimeError as e:
            assert word in str(e) and str(e).startswith(method), f"{method} {params}: {e}"
        else:
            raise AssertionError(f"{method} {params} succeeded")
    for _ in range(50):
        connect().shutdown()
    wait_for(lambda: len(os.listdir(f"/proc/{PID}/fd")) <= before)


def bdev_removed():
    """A bdev that goes takes its exports and their connections along."""
    call("bdev_malloc_create", name="gone", num_blocks=2048, block_size=512)
    call("nbd_server_create_export", name="gone", bdev_name="gone")
    h = connect("gone")
    h.pwrite(b"g" * 512, 0)
    assert call("bdev_malloc_delete", name="gone") is True
    assert "gone" not in [e["name"] for e in call("nbd_server_get_exports")]
    try:
        h.pread(512, 0)
    except nbd.Error:
        pass
    else:
        raise AssertionError("served after the end of the bdev")


def resize():
    """Requests follow the size of the bdev; a client hears of it when it connects again."""
    call("bdev_null_create", name="N0", num_blocks=2048, block_size=512)
    call("nbd_server_create_export", name="null", bdev_name="N0")
    h = connect("null", set_strict_mode=0)
    assert h.get_size() == 1 << 20
    with refused(errno.EINVAL):
        h.pread(512, 1 << 20)
    call("bdev_null_resize", name="N0", new_size=2)
    h.pread(512, 1 << 20)
    h.shutdown()
    assert connect("null").get_size() == 2 << 20
    call("nbd_server_delete_export", name="null")
    call("bdev_null_delete", name="N0")


def configuration():
    """What is saved is what was loaded."""
    calls = call("framework_get_config", name="nbd_server")
    create = [c["params"] for c in calls if c["method"] == "nbd_server_create_export"]
    assert {"name": "readonly", "bdev_name": "M0", "read_only": True} in create, create
    listen = [c["params"] for c in calls if c["method"] == "nbd_server_add_listener"]
    assert {"path": SOCK, "dialect": "auto", "export": "disk"} in listen, listen
    assert {"adrfam": "ipv4", "traddr": "127.0.0.1", "trsvcid": str(PORT), "dialect": "auto"} in listen, listen
    assert {"path": SEED, "dialect": "1997", "export": "disk"} in listen, listen
    tls = {"path": f"{DIR}/tls.sock", "dialect": "auto", "tls": "require", "tls_certificates": f"{DIR}/pki",
           "tls_verify_peer": True}
    assert tls in listen, listen
    assert len(calls) == int(os.environ["CALLS"]), json.dumps(calls)


def idle():
    """Quiet connections cost nothing."""
    clients = [connect() for _ in range(100)]
    assert all(h.pread(512, 0) for h in clients)

    def ticks():
        with open(f"/proc/{PID}/stat") as stat:
            return sum(int(n) for n in stat.read().rsplit(")", 1)[1].split()[11:13])

    def quiet():
        """A second in which it uses less than a twentieth of a core. A server that looks about all the time has none."""
        before = ticks()
        time.sleep(1)
        return ticks() - before <= 0.05 * os.sysconf("SC_CLK_TCK")

    wait_for(quiet)
    for h in clients:
        h.shutdown()


shed = begin_and_stop()
for test in (handshakes, names, options, refusals, any_range, chunks, block_status, extended, old_dialects, injection, allow_lists,
             hostile, loris, raw, large, queue, slow_reader, control, bdev_removed, resize, configuration, idle):
    print(test.__name__, flush=True)
    # What hangs ends, and says where.
    faulthandler.dump_traceback_later(limit(600), exit=True)
    test()
print("stalled", flush=True)
are_shed(*shed)
