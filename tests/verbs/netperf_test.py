#!/usr/bin/env python3
"""netperf over an RDMA device, on the network that scripts/vm.d/network makes: a server that forks for each connection, unmodified.

Each test must have had a lane of that transport at both ends, which carried the same bytes at both: what TCP carried alone fails.
"""
import argparse
import glob
import json
import os
import subprocess
import sys
import tempfile
import time

ADDRESSES = {"ib": ("10.77.0.1", "10.77.0.2"), "rnic": ("10.77.1.1", "10.77.1.2")}
PORT = "12865"


def reports(folder, program):
    for path in glob.glob(os.path.join(folder, "*.json")):
        with open(path, encoding="utf-8") as f:
            report = json.load(f)
        if report["program"] == program:
            yield report


def start_server(env, address):
    server = subprocess.Popen(["netserver", "-D", "-4", "-L", address, "-p", PORT], env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while f":{int(PORT):04X} 00000000:0000 0A" not in open("/proc/net/tcp", encoding="ascii").read():
        assert server.poll() is None and time.monotonic() < deadline, "netserver does not listen"
        time.sleep(0.05)
    return server


def run(library, transport, test):
    near, far = ADDRESSES[transport]
    with tempfile.TemporaryDirectory(prefix="sdpreload-netperf-") as folder:
        env = dict(os.environ, LD_PRELOAD=library, SDP_TRANSPORT=transport, SDP_STATS=os.path.join(folder, "%p.json"))
        server = start_server(env, near)
        try:
            command = ["netperf", "-4", "-L", far, "-H", near, "-p", PORT, "-l", "2", "-t", test]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        finally:
            server.terminate()
            server.wait(30)
        assert done.returncode == 0, f"{test}: {done.returncode}: {done.stdout}{done.stderr}"
        ends = [r for name in ("netperf", "netserver") for r in reports(folder, name) if r["lanes"][transport] > 0]
    assert len(ends) == 2, f"{test}: lanes at {len(ends)} ends: {done.stderr}"
    lane = [end["bytes"]["lane"] for end in ends]
    assert lane[0]["sent"] + lane[0]["received"] > 100, f"{test}: the lane carried nothing: {lane}"
    if test != "TCP_MAERTS":  # whose client stops reading when the time is over
        assert lane[0]["sent"] == lane[1]["received"], f"{test}: {lane}"
    if test != "TCP_STREAM":
        assert lane[1]["sent"] >= lane[0]["received"], f"{test}: {lane}"
    print(f"{test}: {lane[0]}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True)
    parser.add_argument("--transport", choices=ADDRESSES, required=True)
    args = parser.parse_args()
    for test in ("TCP_STREAM", "TCP_MAERTS", "TCP_RR"):
        run(os.path.abspath(args.lib), args.transport, test)


if __name__ == "__main__":
    sys.exit(main())
