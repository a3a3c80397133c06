#!/usr/bin/env python3
"""A TCP proxy that cuts connections: nbd-proxy.py PORT UNIX_SOCKET SECONDS.

Listens on 127.0.0.1:PORT, passes bytes to UNIX_SOCKET and back, and every SECONDS cuts one of the connections, in turn by
closing the client's side and by resetting it. The server is let finish what it has: nothing of that is answered, and only
when it has closed its side, too, the client hears of it. Else a server that is held up by other work could execute an old
write late, after the client has written something newer, which no NBD client can know.
"""
import itertools
import socket
import struct
import sys
import threading
import time


class Pair:
    """A client and its server."""

    def __init__(self, client, server):
        self.client, self.server = client, server
        self.cut, self.server_ended = threading.Event(), threading.Event()
        for pump in (self.requests, self.answers):
            threading.Thread(target=pump, daemon=True).start()

    def requests(self):
        """From the client, until either side ends."""
        try:
            while data := self.client.recv(1 << 18):
                self.server.sendall(data)
        except OSError:
            pass
        shut(self.server, socket.SHUT_WR)

    def answers(self):
        """From the server, until it ends."""
        try:
            while data := self.server.recv(1 << 18):
                if not self.cut.is_set():
                    self.client.sendall(data)
        except OSError:
            pass
        self.server_ended.set()
        if not self.cut.is_set():
            shut(self.client, socket.SHUT_RDWR)
            shut(self.server, socket.SHUT_RDWR)

    def cut_off(self, reset):
        self.cut.set()
        shut(self.server, socket.SHUT_WR)
        self.server_ended.wait()
        if reset:
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Wakes the thread that reads from it; else a descriptor in use would keep it open.
        shut(self.client, socket.SHUT_RD if reset else socket.SHUT_RDWR)
        self.client.close()
        self.server.close()


def shut(s, how):
    try:
        s.shutdown(how)
    except OSError:
        pass


def cut(pairs, lock, seconds):
    for n in itertools.count():
        time.sleep(seconds)
        with lock:
            pairs[:] = [p for p in pairs if not p.server_ended.is_set()]
            pair = pairs.pop(n % len(pairs)) if pairs else None
        if pair:
            pair.cut_off(reset=n % 2 == 1)


def main():
    port, path, seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    pairs, lock = [], threading.Lock()
    threading.Thread(target=cut, args=(pairs, lock, seconds), daemon=True).start()
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            client, _ = listener.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(path)
            except OSError:
                client.close()
                continue
            with lock:
                pairs.append(Pair(client, server))


if __name__ == "__main__":
    main()
