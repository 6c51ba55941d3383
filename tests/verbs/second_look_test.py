#!/usr/bin/env python3
"""A connection whose first search for a lane falls into a moment without a device: it has one later, since others with that service had one.

    second_look_test.py --lib LIBRARY --sdp SDP --transport ib|rnic
"""
import argparse
import json
import os
import socket
import subprocess
import sys
import time

from fault_test import add, remove
from two_roles import NETWORKS, serve_echo, two_roles

PORT = 12881
MESSAGE = bytes(range(100))
PATIENCE = 150


def ask(near, far):
    """One connection; another for each line of standard input. Messages go to and fro on all of them."""
    os.set_blocking(0, False)
    connections = []
    while True:
        if not connections or read_line():
            connections.append(socket.create_connection((near, PORT), source_address=(far, 0)))
        for each in connections:
            each.sendall(MESSAGE)
            assert each.recv(len(MESSAGE), socket.MSG_WAITALL) == MESSAGE
        time.sleep(0.002)


def read_line():
    try:
        return os.read(0, 1)
    except BlockingIOError:
        return b""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib")
    parser.add_argument("--sdp")
    parser.add_argument("--transport", choices=NETWORKS, required=True)
    parser.add_argument("--role", choices=("serve", "ask"))
    args = parser.parse_args()
    near, far = NETWORKS[args.transport]
    if args.role:
        return serve_echo(near, PORT) if args.role == "serve" else ask(near, far)
    settings = {"SDP_POLICY": "both", "SDP_LANE_TIMEOUT": "1"}
    with two_roles(args.lib, PORT, args.transport, settings=settings, stdin=subprocess.PIPE) as run:

        def look(count):
            """What `sdp stat` says of the connections of each end, the oldest first; [] until there are so many."""
            pids = [str(process.pid) for process in (run.server, run.client)]
            shown = subprocess.run([args.sdp, "stat", "--json", *pids], capture_output=True, check=False).stdout
            ends = [sorted((c for c in process["connections"] if c["remote"]), key=lambda c: c["fd"])
                    for process in (json.loads(shown)["processes"] if shown else [])]
            return ends if len(ends) == 2 and all(len(end) == count for end in ends) else []

        def await_(what, count, condition):
            deadline = time.monotonic() + PATIENCE
            while not ((ends := look(count)) and all(condition(end[-1]) for end in ends)):
                assert all(process.poll() is None for process in (run.server, run.client)), f"{what}: a program has ended"
                assert time.monotonic() < deadline, f"{what}: not in time: {ends}"
                time.sleep(0.05)
            return ends

        def carries(connection):
            return connection["transport"] == args.transport and connection["lane"]["bytes_received"] > 20 * len(MESSAGE)

        await_("the first connection's lane", 1, carries)
        remove(args.transport, 1)
        try:
            run.client.stdin.write(b"x")
            run.client.stdin.flush()
            without = await_("the end of the first search", 2, lambda c: c["looks"]["to_come"] == 1)
            assert all(end[-1]["lane"]["bytes_received"] == 0 for end in without), without
        finally:
            add(args.transport, 1)
        late = await_("the second connection's lane", 2, carries)
        assert all(end[-1]["looks"]["again"] >= 1 and end[-1]["looks"]["to_come"] == 0 for end in late), late
        assert all(end[-1]["failures"]["lanes"] == 0 for end in late), late
        print(f"{args.transport}: a lane after {late[0][-1]['looks']['again']} and {late[1][-1]['looks']['again']} more looks", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
