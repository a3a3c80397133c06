#!/usr/bin/env python3
"""One command to QEMU's monitor: qmp.py SOCKET COMMAND [JSON_ARGUMENTS].

Prints what it returns as JSON and exits 0; prints QEMU's error to stderr and exits 1.
"""
import json
import socket
import sys


def main(argv):
    if len(argv) not in (3, 4):
        print(__doc__, file=sys.stderr)
        return 2
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(60)
        sock.connect(argv[1])
        lines = sock.makefile("rw")

        def ask(command, arguments=None):
            request = {"execute": command}
            if arguments is not None:
                request["arguments"] = arguments
            lines.write(json.dumps(request) + "\n")
            lines.flush()
            for line in lines:
                answer = json.loads(line)
                if "return" in answer or "error" in answer:
                    return answer
            return {"error": {"desc": "the monitor hung up"}}

        lines.readline()  # the greeting
        ask("qmp_capabilities")
        answer = ask(argv[2], json.loads(argv[3]) if len(argv) == 4 else None)
    if "error" in answer:
        print(f"{argv[2]}: {answer['error'].get('desc', answer['error'])}", file=sys.stderr)
        return 1
    print(json.dumps(answer["return"]))
    return 0


sys.exit(main(sys.argv))
