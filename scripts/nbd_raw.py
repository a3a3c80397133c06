"""An NBD client of single bytes, for what no library would send. Used by nbd-checks.py."""
import errno
import os
import socket
import struct

HAS_FLAGS, SEND_DF, BLOCK_STATUS_PAYLOAD = 1 << 0, 1 << 7, 1 << 12
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << i for i in range(6))
NONE, OFFSET_DATA, OFFSET_HOLE, STATUS, BLOCK_STATUS_EXT, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 6, 0x8001, 0x8002
EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META, SET_META, EXTENDED = range(1, 12)
ACK = 1
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, _, TOO_BIG, EXT_REQD = (
    (1 << 31) + i for i in range(1, 11))
CLOSED = "closed"


def limit(seconds):
    """What ends something that hangs: so much longer as everything may take here, see lib.sh."""
    return seconds * float(os.environ.get("TIME_SCALE", 1))


def connect(path):
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(limit(120))
    s.connect(path)
    return s


def receive(s, length):
    data = b""
    while len(data) < length:
        piece = s.recv(length - len(data))
        if not piece:
            raise EOFError(f"closed after {len(data)} of {length} bytes")
        data += piece
    return data


def name(text):
    return struct.pack(">I", len(text)) + text


def info(export, *types):
    return name(export) + struct.pack(f">{len(types) + 1}H", len(types), *types)


def meta(export, *queries):
    return name(export) + struct.pack(">I", len(queries)) + b"".join(map(name, queries))


class Client:
    """One connection, from the greeting on. Requests have cookie 7 and are answered one by one."""

    def __init__(self, path, greeting=True):
        self.sock = connect(path)
        if greeting:
            assert receive(self.sock, 18) == b"NBDMAGICIHAVEOPT\0\3"
        self.framing, self.flags, self.size = "simple", 0, 0

    def client_flags(self, flags=3):
        self.sock.sendall(struct.pack(">I", flags))
        return self

    def option(self, number, data=b"", length=None, magic=b"IHAVEOPT"):
        self.sock.sendall(magic + struct.pack(">II", number, len(data) if length is None else length) + data)
        return self

    def reply(self):
        """The last reply to an option: its type. What came before is in `told`, by its type."""
        self.told = []
        while True:
            magic, self.answered, kind, length = struct.unpack(">QIII", receive(self.sock, 20))
            assert magic == 0x3e889045565a9, hex(magic)
            data = receive(self.sock, length)
            if kind == ACK or kind >> 31:
                return kind
            self.told.append((kind, data))

    def choose(self, export, *options, framing):
        self.client_flags()
        for option, data in options:
            assert self.option(option, data).reply() == ACK, option
        assert self.option(GO, info(export.encode(), 3)).reply() == ACK
        (main,) = [data for kind, data in self.told if kind == 3 and data[:2] == b"\0\0"]
        self.size, self.flags = struct.unpack(">QH", main[2:])
        self.framing = framing
        return self

    def simple(self, export="disk"):
        return self.choose(export, framing="simple")

    def structured(self, export="disk"):
        context = meta(export.encode(), b"base:allocation")
        return self.choose(export, (STRUCTURED_REPLY, b""), (SET_META, context), framing="structured")

    def extended(self, export="disk"):
        context = meta(export.encode(), b"base:allocation")
        return self.choose(export, (EXTENDED, b""), (SET_META, context), framing="extended")

    def request(self, command, offset=0, length=0, data=None, flags=0, data_len=None, magic=None):
        """`data` follows the header, which says `data_len` of it."""
        if data is not None or data_len is not None:
            length = len(data) if data_len is None else data_len
            flags |= PAYLOAD_LEN if self.framing == "extended" else 0
        if self.framing == "extended":
            header = struct.pack(">IHHQQQ", magic or 0x21e41c71, flags, command, 7, offset, length)
        else:
            header = struct.pack(">IHHQQI", magic or 0x25609513, flags, command, 7, offset, length)
        self.sock.sendall(header + (data or b""))
        return self

    def chunk(self):
        """One chunk, which must be the last of its reply: type, offset (None if there is none), payload."""
        (magic,) = struct.unpack(">I", receive(self.sock, 4))
        if magic == 0x67446698:
            error, cookie = struct.unpack(">IQ", receive(self.sock, 12))
            assert cookie == 7
            return (ERROR, None, struct.pack(">IH", error, 0)) if error else (NONE, None, b"")
        if magic == 0x668e33ef:
            flags, kind, cookie, length = struct.unpack(">HHQI", receive(self.sock, 16))
            offset = None
        else:
            assert magic == 0x6e8a278c, hex(magic)
            flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", receive(self.sock, 28))
        assert flags == 1 and cookie == 7, (flags, cookie)
        return kind, offset, receive(self.sock, length)

    def error(self):
        """The error of a reply that must be one, with its text in the right place; None if the server hangs up."""
        kind, _, payload = self.chunk()
        assert kind in (ERROR, ERROR_OFFSET), kind
        number, length = struct.unpack(">IH", payload[:6])
        assert len(payload) == 6 + length + (8 if kind == ERROR_OFFSET else 0)
        payload[6:6 + length].decode()
        return number

    def is_closed(self):
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def answers(self):
        """Types of all that the server says; CLOSED if it hangs up before it has answered an ABORT of ours."""
        kinds = []
        try:
            self.option(ABORT)
        except (ConnectionResetError, BrokenPipeError):
            pass
        try:
            while True:
                kind = self.reply()
                if self.answered == ABORT:
                    return kinds
                kinds.append(kind)
        except (EOFError, ConnectionResetError):
            return kinds + [CLOSED]


def started(*options):
    """Sends client flags and options."""
    def send(c):
        c.client_flags()
        for option in options:
            c.option(*option) if isinstance(option, tuple) else c.sock.sendall(option)
    return send


# What is sent behind the greeting, and the replies; CLOSED: the server hangs up.
HOSTILE_HANDSHAKES = [
    ("unknown client flag", lambda c: c.client_flags(7), [CLOSED]),
    ("HTTP", lambda c: c.sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"), [CLOSED]),
    ("wrong option magic", started((GO, info(b"disk"), None, b"IHAVEOPX")), [CLOSED]),
    ("option of 4 GiB", started((GO, b"", 0xffffffff)), [CLOSED]),
    ("option of 6 KiB", started((GO, b"x" * 6000)), [TOO_BIG]),
    ("unknown option", started((77, b"data")), [UNSUP]),
    ("withdrawn option", started((PEEK_EXPORT, b"disk")), [UNSUP]),
    ("LIST with data", started((LIST, b"x")), [INVALID]),
    ("STRUCTURED_REPLY with data", started((STRUCTURED_REPLY, b"x")), [INVALID]),
    ("EXTENDED_HEADERS with data", started((EXTENDED, b"\0\0\0\0")), [INVALID]),
    ("STARTTLS with data", started((STARTTLS, b"x")), [INVALID]),
    ("STARTTLS without TLS", started((STARTTLS,)), [UNSUP]),
    ("structured after extended", started((EXTENDED,), (STRUCTURED_REPLY,)), [ACK, EXT_REQD]),
    ("EXPORT_NAME after extended", started((EXTENDED,), (EXPORT_NAME, b"disk")), [ACK, CLOSED]),
    ("unknown EXPORT_NAME", started((EXPORT_NAME, b"none")), [CLOSED]),
    ("GO for nobody", started((GO, info(b"none"))), [UNKNOWN]),
    ("GO without a count", started((GO, name(b"disk"))), [INVALID]),
    ("GO with a long name length", started((GO, struct.pack(">I", 1000) + b"disk\0\0")), [INVALID]),
    ("GO with a name of 4 GiB", started((GO, struct.pack(">I", 0xffffffff) + b"disk\0\0")), [INVALID]),
    ("GO with too many types", started((GO, name(b"disk") + b"\xff\xff\0\3")), [INVALID]),
    ("GO with too few types", started((GO, name(b"disk") + b"\0\0\0\3")), [INVALID]),
    ("GO with bad UTF-8", started((GO, info(b"\xff\xfe"))), [INVALID]),
    ("GO with NUL", started((GO, info(b"di\0sk"))), [INVALID]),
    ("context without structured replies", started((SET_META, meta(b"disk", b"base:allocation"))), [INVALID]),
    ("contexts of nobody", started((STRUCTURED_REPLY,), (SET_META, meta(b"none", b"base:allocation"))), [ACK, UNKNOWN]),
    ("query without a colon", started((STRUCTURED_REPLY,), (LIST_META, meta(b"disk", b"base"))), [ACK, INVALID]),
    ("fewer queries", started((STRUCTURED_REPLY,), (SET_META, name(b"disk") + b"\0\0\0\2" + name(b"a:b"))), [ACK, INVALID]),
    ("more bytes than queries", started((STRUCTURED_REPLY,), (SET_META, meta(b"disk", b"a:b") + b"x")), [ACK, INVALID]),
    ("4 G queries", started((STRUCTURED_REPLY,), (LIST_META, name(b"disk") + b"\xff" * 4)), [ACK, INVALID]),
    ("query of 4 GiB", started((STRUCTURED_REPLY,), (SET_META, name(b"disk") + b"\0\0\0\1\xff\xff\xff\xff")), [ACK, INVALID]),
    ("too many options", started(*[(77,)] * 1100), [UNSUP] * 1024 + [CLOSED]),
]

# How to connect, what is sent, and the errors of the replies; None: the server hangs up.
HOSTILE_REQUESTS = [
    ("wrong magic", Client.simple, lambda c: c.request(READ, length=512, magic=0x25609512), [None]),
    ("extended magic", Client.structured, lambda c: c.request(READ, length=512, magic=0x21e41c71), [None]),
    ("compact magic", Client.extended, lambda c: c.request(READ, length=512, magic=0x25609513), [None]),
    ("reply instead of request", Client.simple, lambda c: c.request(READ, magic=0x67446698), [None]),
    ("too long a write", Client.simple, lambda c: c.request(WRITE, data_len=(32 << 20) + 1), [None]),
    ("the longest write", Client.structured, lambda c: c.request(WRITE, data_len=0xffffffff), [None]),
    ("a payload of 2^63", Client.extended, lambda c: c.request(TRIM, data_len=1 << 63), [None]),
    ("unknown commands", Client.simple,
     lambda c: [c.request(n, length=512) for n in (8, 9, 99, 0xffff)], [errno.EINVAL] * 4),
    ("unknown commands, structured", Client.structured,
     lambda c: [c.request(n, length=512) for n in (8, 9, 99, 0xffff)], [errno.EINVAL] * 4),
    ("unknown flags", Client.structured,
     lambda c: [c.request(READ, length=512, flags=1 << n) for n in range(6, 16)], [errno.EINVAL] * 10),
    ("PAYLOAD_LEN on a compact write", Client.structured,
     lambda c: c.request(WRITE, data=b"x" * 512, flags=PAYLOAD_LEN), [errno.EINVAL]),
    ("flags of others", Client.structured,
     lambda c: [c.request(READ, length=512, flags=f) for f in (NO_HOLE, REQ_ONE, FAST_ZERO)], [errno.EINVAL] * 3),
    ("DF without chunks", Client.simple, lambda c: c.request(READ, length=512, flags=DF), [errno.EINVAL]),
    ("status without a context", Client.simple, lambda c: c.request(BLOCK_STATUS, length=512), [errno.EINVAL]),
    ("status of nothing", Client.structured, lambda c: c.request(BLOCK_STATUS), [errno.EINVAL]),
    ("status past the end", Client.structured,
     lambda c: c.request(BLOCK_STATUS, offset=c.size, length=512), [errno.EINVAL]),
    ("ranges that wrap", Client.extended,
     lambda c: [c.request(n, offset=(1 << 64) - 512, length=1024) for n in (READ, TRIM, WRITE_ZEROES)],
     [errno.EINVAL, errno.EINVAL, errno.ENOSPC]),
    ("an empty payload", Client.extended, lambda c: c.request(BLOCK_STATUS, data=b""), [errno.EINVAL]),
    ("a flush with a range", Client.simple, lambda c: c.request(FLUSH, offset=512), [errno.EINVAL]),
    ("a refused write, and what follows", Client.extended,
     lambda c: (c.request(WRITE, offset=c.size, data=b"x" * 65536), c.request(99)), [errno.ENOSPC, errno.EINVAL]),
    ("half a header", Client.simple, lambda c: (c.sock.sendall(b"\x25\x60\x95"), c.sock.shutdown(1)), [None]),
    ("half a payload", Client.extended,
     lambda c: (c.request(WRITE, data_len=65536, data=b"x" * 100), c.sock.shutdown(1)), [None]),
]
