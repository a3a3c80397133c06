#!/usr/bin/env python3
"""A TCP proxy that cuts connections: nbd-proxy.py PORT UNIX_SOCKET SECONDS.

Listens on 127.0.0.1:PORT, passes bytes to UNIX_SOCKET and back, and every SECONDS cuts one of the connections, in turn by
closing both sides and by resetting the client's.
"""
import itertools
import socket
import struct
import sys
import threading
import time


def pump(source, sink):
    try:
        while data := source.recv(1 << 18):
            sink.sendall(data)
    except OSError:
        pass
    for s in (source, sink):
        try:
            s.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def cut(pairs, lock, seconds):
    for n in itertools.count():
        time.sleep(seconds)
        with lock:
            if not pairs:
                continue
            client, server = pairs.pop(n % len(pairs))
        if n % 2:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for s in (client, server):
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            s.close()


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
                pairs.append((client, server))
            for pair in ((client, server), (server, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()


if __name__ == "__main__":
    main()
