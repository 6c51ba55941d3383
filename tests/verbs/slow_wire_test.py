#!/usr/bin/env python3
"""A stream over an RDMA device whose wire is slow: what waits to be sent, or sent again, is what the program gave, not what lies in
that memory by then.

    slow_wire_test.py --lib LIBRARY --transport ib|rnic

Policy sdp: all of it goes by the lane.
"""
import argparse
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "apps"))
from harness import listening, wait_for  # noqa: E402

NETWORKS = {"ib": ("v1", "10.77.0.1", "10.77.0.2"), "rnic": ("v3", "10.77.1.1", "10.77.1.2")}
PORT = 12878
STREAM = random.Random(1).randbytes(6000000)


def serve(near, _far):
    listener = socket.socket()
    listener.bind((near, PORT))
    listener.listen()
    peer = listener.accept()[0]
    total = hashlib.sha256()
    for left in range(len(STREAM), 0, -1000):
        total.update(peer.recv(min(left, 1000), socket.MSG_WAITALL))
    peer.sendall(total.digest())
    peer.recv(1)


def send(near, far):
    client = socket.socket()
    client.bind((far, 0))
    client.connect((near, PORT))
    client.sendall(STREAM)
    assert client.recv(32, socket.MSG_WAITALL) == hashlib.sha256(STREAM).digest(), "another stream arrived"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib")
    parser.add_argument("--transport", choices=NETWORKS, required=True)
    parser.add_argument("--role", choices=("serve", "send"))
    args = parser.parse_args()
    device, near, far = NETWORKS[args.transport]
    if args.role:
        return (serve if args.role == "serve" else send)(near, far)
    subprocess.run(["tc", "qdisc", "add", "dev", device, "root", "netem", "delay", "30ms"], check=True)
    processes = []
    with tempfile.TemporaryDirectory(prefix="sdpreload-slow-") as folder:
        env = dict(os.environ, LD_PRELOAD=os.path.abspath(args.lib), SDP_TRANSPORT=args.transport, SDP_POLICY="sdp",
                   SDP_STATS=os.path.join(folder, "%p.json"))
        try:
            for role in ("serve", "send"):
                command = [sys.executable, __file__, "--transport", args.transport, "--role", role]
                processes.append(subprocess.Popen(command, env=env))
                wait_for(lambda: listening(PORT) or processes[0].poll() is not None, 60, "the server")
            codes = [each.wait(100) for each in reversed(processes)]
        finally:
            for each in processes:
                each.kill()
                each.wait()
            subprocess.run(["tc", "qdisc", "del", "dev", device, "root"], check=True)
        assert codes == [0, 0], codes
        with open(os.path.join(folder, f"{processes[1].pid}.json"), encoding="utf-8") as file:
            report = json.load(file)
    assert report["bytes"]["lane"]["sent"] == len(STREAM) and report["bytes"]["tcp"]["sent"] == 0, report
    return 0


if __name__ == "__main__":
    sys.exit(main())
