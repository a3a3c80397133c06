#!/usr/bin/env python3
"""The workspace's unit, property and integration tests, with several test programs at a time: most of them wait for
something most of the time. Usage: scripts/test-unit.py [CARGO_TEST_ARGUMENT...], for instance `-p bdev` or `--target T`.

`cargo test` does the same, one program after the other. The output of a program appears whole when it has ended.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys
import time


def programs(arguments):
    """Builds the tests; the program and the folder of the package of each, integration tests first (they take longest)."""
    build = ["cargo", "test", *arguments, "--no-run", "--message-format=json-render-diagnostics"]
    done = subprocess.run(build, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    found = []
    for line in done.stdout.splitlines():
        message = json.loads(line)
        if message["reason"] != "compiler-artifact" or not message["executable"] or not message["profile"]["test"]:
            continue
        target = message["target"]
        found.append((target["kind"] != ["test"], target["src_path"], message["executable"], message["manifest_path"]))
    return sorted(found)


def run(program):
    """Runs one test program as Cargo would: in its package's folder."""
    _, source, executable, manifest = program
    folder = pathlib.Path(manifest).parent
    began = time.monotonic()
    runner = os.environ.get("TEST_RUNNER", "").split()
    done = subprocess.run(
        [*runner, executable],
        cwd=folder,
        env=os.environ | {"CARGO_MANIFEST_DIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
    )
    print(f"     Running {os.path.relpath(source)} ({time.monotonic() - began:.0f} s)\n{done.stdout}", flush=True)
    if done.returncode == 0:
        return None
    # Under this heading libtest prints the messages of the tests that failed, and their names. Backtraces stay above.
    told = done.stdout[max(done.stdout.find("\nfailures:\n"), 0) :].strip().splitlines()
    told = [line[:300] for line in told if not re.match(r"\s+(\d+: |at )", line)][-30:]
    return "\n".join(told) + f"\nfailed: {os.path.relpath(source)}: status {done.returncode}"


def main():
    arguments = sys.argv[1:] or ["--workspace"]
    # Cargo refuses documentation tests for a package without a library, and beside a choice of others.
    with_docs = arguments == ["--workspace"]
    tests = programs(arguments)
    if not tests:
        sys.exit("test-unit.py: no test program was built")
    with concurrent.futures.ThreadPoolExecutor((os.cpu_count() or 1) + 1) as pool:
        failed = [failure for failure in pool.map(run, tests) if failure]
    doc = subprocess.run(["cargo", "test", *arguments, "--doc"]).returncode if with_docs else 0
    # Once more at the end, where whoever sees only the end of the log looks.
    for failure in failed:
        print(failure)
    sys.exit(bool(failed) or doc)


if __name__ == "__main__":
    main()
