#!/usr/bin/env python3
"""Many connections of the policy `sdp` that are opened at once: each gets a lane, however long the others keep the peer busy.

    many_test.py --lib LIBRARY --transport ib|rnic [--connections N]

Nothing here measures: a slow machine makes it slow, and ends it after minutes.
"""
import argparse
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "apps"))
from harness import listening, wait_for  # noqa: E402

NETWORKS = {"ib": ("10.77.0.1", "10.77.0.2"), "rnic": ("10.77.1.1", "10.77.1.2")}
PORT = 12879
MESSAGE = bytes(range(100))


def serve(near):
    listener = socket.create_server((near, PORT), backlog=1024)
    ready = selectors.DefaultSelector()
    ready.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in ready.select():
            if key.fileobj is listener:
                ready.register(listener.accept()[0], selectors.EVENT_READ)
            elif data := key.fileobj.recv(4096):
                key.fileobj.sendall(data)
            else:
                ready.unregister(key.fileobj)
                key.fileobj.close()


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
        return serve(near) if args.role == "serve" else ask(near, far, args.connections)
    processes = []
    with tempfile.TemporaryDirectory(prefix="sdpreload-many-") as folder:
        env = dict(os.environ, LD_PRELOAD=os.path.abspath(args.lib), SDP_TRANSPORT=args.transport, SDP_POLICY="sdp",
                   SDP_STATS=os.path.join(folder, "%p.json"))
        try:
            for role in ("serve", "ask"):
                command = [sys.executable, __file__, "--transport", args.transport, "--connections", str(args.connections), "--role", role]
                processes.append(subprocess.Popen(command, env=env))
                wait_for(lambda: listening(PORT) or processes[0].poll() is not None, 60, "the server")
            assert processes[1].wait(240) == 0
        finally:
            for each in processes:
                each.kill()
                each.wait()
        with open(os.path.join(folder, f"{processes[1].pid}.json"), encoding="utf-8") as file:
            report = json.load(file)
    assert report["bytes"]["lane"]["sent"] == 4 * len(MESSAGE) * args.connections and report["bytes"]["tcp"]["sent"] == 0, report["bytes"]
    return 0


if __name__ == "__main__":
    sys.exit(main())
