#!/usr/bin/env python3
"""A stream over an RDMA device whose wire is slow: what waits to be sent, or sent again, is what the program gave, not what lies in
that memory by then.

    slow_wire_test.py --lib LIBRARY --transport ib|rnic

Policy sdp: all of it goes by the lane.
"""
import argparse
import hashlib
import random
import socket
import subprocess
import sys

from two_roles import NETWORKS, two_roles

FAR_DEVICE = {"ib": "v1", "rnic": "v3"}
PORT = 12878
STREAM = random.Random(1).randbytes(6000000)


def serve(near):
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
    near, far = NETWORKS[args.transport]
    device = FAR_DEVICE[args.transport]
    if args.role:
        return serve(near) if args.role == "serve" else send(near, far)
    subprocess.run(["tc", "qdisc", "add", "dev", device, "root", "netem", "delay", "30ms"], check=True)
    try:
        with two_roles(args.lib, PORT, args.transport, roles=("serve", "send")) as run:
            codes = [each.wait(100) for each in (run.client, run.server)]
            assert codes == [0, 0], codes
            report = run.report_of(run.client)
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", device, "root"], check=True)
    assert report["bytes"]["lane"]["sent"] == len(STREAM) and report["bytes"]["tcp"]["sent"] == 0, report
    return 0


if __name__ == "__main__":
    sys.exit(main())
