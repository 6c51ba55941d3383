#!/usr/bin/env python3
"""Many connections of the policy `sdp` that are opened at once: each gets a lane, however long the others keep the peer busy.

    many_test.py --lib LIBRARY --transport ib|rnic [--connections N]

Nothing here measures: a slow machine makes it slow, and ends it after minutes.
"""
import argparse
import selectors
import socket
import sys

from two_roles import NETWORKS, serve_echo, two_roles

PORT = 12879
MESSAGE = bytes(range(100))


def ask(near, far, count):
    connections = [socket.socket() for _ in range(count)]
    ready = selectors.DefaultSelector()
    for each in connections:
        each.bind((far, 0))
        each.setblocking(False)
        each.connect_ex((near, PORT))
        ready.register(each, selectors.EVENT_WRITE)
    left = count
    while left:
        for key, _ in ready.select():
            if key.events == selectors.EVENT_WRITE:
                key.fileobj.send(MESSAGE)  # refused if there is no lane
                ready.modify(key.fileobj, selectors.EVENT_READ)
            else:
                assert key.fileobj.recv(4096) == MESSAGE
                ready.unregister(key.fileobj)
                left -= 1
    for each in connections:
        each.setblocking(True)
    for _ in range(3):  # all of them live, at once
        for each in connections:
            each.sendall(MESSAGE)
        for each in connections:
            assert each.recv(len(MESSAGE), socket.MSG_WAITALL) == MESSAGE


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib")
    parser.add_argument("--transport", choices=NETWORKS, required=True)
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--role", choices=("serve", "ask"))
    args = parser.parse_args()
    near, far = NETWORKS[args.transport]
    if args.role:
        return serve_echo(near, PORT) if args.role == "serve" else ask(near, far, args.connections)
    with two_roles(args.lib, PORT, args.transport, "--connections", args.connections) as run:
        assert run.client.wait(240) == 0
        report = run.report_of(run.client)
    assert report["bytes"]["lane"]["sent"] == 4 * len(MESSAGE) * args.connections and report["bytes"]["tcp"]["sent"] == 0, report["bytes"]
    return 0


if __name__ == "__main__":
    sys.exit(main())
