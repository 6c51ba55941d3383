#!/usr/bin/env python3
"""Long sends by messages, read in place by the peer and written in place to it, in turns: MB/s of whole blocks over an RDMA device.

    in_place.py --lib LIBRARY --transport ib|rnic [--seconds S] [--rounds N] [SIZE...]

A sender calls send() of a block, a reader recv(MSG_WAITALL) of one, one after the other. The peer's reader reads in place where only
the sender has SDP_ZCOPY_THRESHOLD, and is written to where both have it. Each figure is the median of the rounds (least..most), with
the bytes in a hundred that went that way.
"""
import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "tests", "apps"))
from harness import listening, wait_for  # noqa: E402

NETWORKS = {"ib": ("10.77.0.1", "10.77.0.2"), "rnic": ("10.77.1.1", "10.77.1.2")}
PORT = 12890
WAYS = {"messages": ("off", "off"), "read": ("off", "64K"), "written": ("64K", "64K")}  # the reader's threshold, the sender's


def read_blocks(near, size):
    listener = socket.create_server((near, PORT))
    peer = listener.accept()[0]
    memory = bytearray(size)
    count, begun = 0, 0.0
    while peer.recv_into(memory, size, socket.MSG_WAITALL) == size:
        count += 1
        if count == 20:
            begun = time.monotonic()
    print((count - 20) * size / (time.monotonic() - begun) / 1e6, flush=True)


def send_blocks(near, far, size, seconds):
    client = socket.socket()
    client.bind((far, 0))
    client.connect((near, PORT))
    memory = bytearray(size)
    for _ in range(20):
        client.sendall(memory)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        client.sendall(memory)


def run(args, way, size):
    """MB/s, and the share of the bytes that crossed in place."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for role, threshold in zip(("read", "send"), WAYS[way]):
            settings = dict(os.environ, LD_PRELOAD=os.path.abspath(args.lib), SDP_POLICY="sdp", SDP_TRANSPORT=args.transport,
                            SDP_ZCOPY_THRESHOLD=threshold, SDP_STATS=os.path.join(folder, role))
            processes.append(subprocess.Popen(
                [sys.executable, __file__, "--transport", args.transport, "--seconds", str(args.seconds), "--role", role, str(size)],
                env=settings, stdout=subprocess.PIPE, text=True))
            if role == "read":
                wait_for(lambda: listening(PORT), 60, "the reader")
        said = [each.communicate(timeout=120)[0] for each in processes]
        with open(os.path.join(folder, "send"), encoding="utf-8") as file:
            report = json.load(file)
    sent, counts = report["bytes"]["lane"]["sent"], report["zero_copy"]
    crossed = counts["bytes_written"] if way == "written" else counts["bytes_sent"] - counts["bytes_written"]
    return float(said[0]), 100 * crossed / max(sent, 1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib")
    parser.add_argument("--transport", choices=NETWORKS, required=True)
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--role", choices=("read", "send"))
    parser.add_argument("sizes", nargs="*", type=int)
    args = parser.parse_args()
    near, far = NETWORKS[args.transport]
    if args.role == "read":
        return read_blocks(near, args.sizes[0])
    if args.role == "send":
        return send_blocks(near, far, args.sizes[0], args.seconds)
    for size in args.sizes or (65536, 262144, 1 << 20, 4 << 20):
        figures = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way, found in figures.items():
                found.append(run(args, way, size))
        cells = []
        for way, found in figures.items():
            rates = [rate for rate, _ in found]
            share = statistics.median(part for _, part in found)
            cells.append(f"{way} {statistics.median(rates):.0f} ({min(rates):.0f}..{max(rates):.0f}) {share:.0f} %")
        print(f"{args.transport} {size // 1024:5} KiB:", "; ".join(cells), flush=True)


if __name__ == "__main__":
    sys.exit(main())
