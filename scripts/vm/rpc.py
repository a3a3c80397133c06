#!/usr/bin/env python3
"""One JSON-RPC 2.0 call over a unix socket: rpc.py SOCKET METHOD [JSON_PARAMS].

Prints the result as JSON (a bare string as it is) and exits 0; prints the error object to stderr and exits 1; exits 2
if nobody answers. Messages are JSON values one after the other, without a frame, as SPDK does it.
"""
import json
import os
import socket
import sys

# Some calls wait for what they ask for. The limit is only there to end what hangs.
TIMEOUT_S = 180.0 * float(os.environ.get("TIME_SCALE", "1"))


def call(path, method, params=None):
    """The response object to one call. Raises OSError, or EOFError when the peer hangs up before a whole answer."""
    request = {"jsonrpc": "2.0", "id": 1, "method": method}
    if params is not None:
        request["params"] = params
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(TIMEOUT_S)
        sock.connect(path)
        sock.sendall(json.dumps(request).encode())
        answer = b""
        while True:
            part = sock.recv(65536)
            if not part:
                raise EOFError(f"connection closed after {len(answer)} bytes of an answer: {answer[:200]!r}")
            answer += part
            try:
                return json.loads(answer)
            except ValueError:
                continue  # not whole yet


def main(argv):
    if len(argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        response = call(argv[1], argv[2], json.loads(argv[3]) if len(argv) == 4 else None)
    except (OSError, EOFError, ValueError) as e:
        print(f"rpc.py: {argv[2]} on {argv[1]}: {e}", file=sys.stderr)
        return 2
    if "error" in response:
        print(json.dumps(response["error"]), file=sys.stderr)
        return 1
    result = response.get("result")
    print(result if isinstance(result, str) else json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
