#!/usr/bin/env python3
"""SDP_TRANSPORT, and the module for RDMA devices: it is looked for when a connection leaves the host, and never loaded in vain.

    module_test.py --lib LIBRARY

Each case is a process with both ends of a few connections, preloaded, in a network namespace of its own. Where a connection's anchor is
in another namespace than the service thread, its other end cannot be found here: to the library it is on another host.
"""
import argparse
import glob
import json
import os
import subprocess
import sys
import tempfile

from harness import PYTHON, enter_private_network

PROGRAM = """
import ctypes, os, socket, sys
far = sys.argv[1] == "far"
listener = socket.create_server(("127.0.0.1", 0))
pairs = []
for _ in range(2):
    client = socket.create_connection(listener.getsockname())
    pairs.append((client, listener.accept()[0]))
if far and ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET: of this thread and of those it starts
    sys.exit(77)
for client, server in pairs:
    for _ in range(300 if far else 5000):  # near, until there is a lane, however busy the machine
        client.sendall(b"ping" * 100)
        assert len(server.recv(400, socket.MSG_WAITALL)) == 400
        server.sendall(b"pong")
        assert client.recv(4, socket.MSG_WAITALL) == b"pong"
        if not far:
            os.sched_yield()
with open("/proc/self/maps") as maps:
    loaded = maps.read()
print(*(name for name in ("libsdpverbs", "libibverbs", "librdmacm") if name in loaded))
"""


def run(library, where, **settings):
    with tempfile.TemporaryDirectory(prefix="sdpreload-module-") as folder:
        env = {k: v for k, v in os.environ.items() if not k.startswith("SDP_")}
        env.update(LD_PRELOAD=library, SDP_STATS=os.path.join(folder, "%p.json"), SDP_LOG="info", SDP_UPGRADE_MESSAGES="2", **settings)
        done = subprocess.run([PYTHON, "-c", PROGRAM, where], env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{where}: {done.returncode}: {done.stderr}"
        (path,) = glob.glob(os.path.join(folder, "*.json"))
        with open(path, encoding="utf-8") as f:
            report = json.load(f)
    report["loaded"], report["said"] = done.stdout.split(), done.stderr
    report["lane"] = sum(report["bytes"]["lane"].values())
    return report


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True)
    library = os.path.abspath(parser.parse_args().lib)
    enter_private_network()
    needed = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert "ibverbs" not in needed and "rdmacm" not in needed, needed

    near = run(library, "near")
    assert near["lane"] > 100_000, f"no lane between two ends on one host: {near}"
    assert near["loaded"] == [] and "no connections by" not in near["said"], near

    # Told once, however many connections want it; and nothing is loaded to find out that there is no device.
    far = run(library, "far")
    assert far["lane"] == 0 and far["reasons"].get("other_host") == 4, far
    if not os.path.isdir("/sys/class/infiniband") or not os.listdir("/sys/class/infiniband"):
        assert far["loaded"] == [], far
        for transport in ("ib", "rnic"):
            line = f"no connections by {transport}: this host has no RDMA device"
            assert far["said"].count(line) == 1, far["said"]

    # The order says who may carry lanes at all.
    only = run(library, "near", SDP_TRANSPORT="rnic")
    assert only["lane"] == 0 and only["said"].count("no connections by rnic") <= 1 and "by ib" not in only["said"], only
    only = run(library, "far", SDP_TRANSPORT="local")
    assert only["lane"] == 0 and only["loaded"] == [] and "no connections by" not in only["said"], only
    last = run(library, "near", SDP_TRANSPORT="rnic,local")
    assert last["lane"] > 100_000, last
    print("the module is opened for those who want it only")


if __name__ == "__main__":
    sys.exit(main())
