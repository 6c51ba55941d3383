#!/usr/bin/env python3
"""Lanes of connections by IPv6, by addresses that only the link knows, and by IPv4 that one or both ends name in IPv6's way.

    families_test.py --lib LIBRARY --transport ib|rnic

A client pours numbered bytes into a server that sends them back, on the network that scripts/vm.d/network makes.
The policy is `sdp`: what has no lane has no connection.
"""
import argparse
import glob
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time

PATIENCE = 60  # seconds
BLOCK = 16384
# Of each kind of device: its network, and the netdevs of the client and of the server.
NETWORKS = {"ib": (0, "v0", "v1"), "rnic": (1, "v2", "v3")}
# The client's address, the server's as the client names it, and as the server does.
FAMILIES = {
    "ipv6": ("fd77:{net}::1", "fd77:{net}::2", "fd77:{net}::2"),
    "link-local": ("fe80::77:{net}:1%{client}", "fe80::77:{net}:2%{client}", "fe80::77:{net}:2%{server}"),
    "ipv6, any address": ("fd77:{net}::1", "fd77:{net}::2", "::"),
    "the server's is mapped": ("10.77.{net}.1", "10.77.{net}.2", "::"),
    "the client's is mapped": ("::ffff:10.77.{net}.1", "::ffff:10.77.{net}.2", "10.77.{net}.2"),
    "both are mapped": ("::ffff:10.77.{net}.1", "::ffff:10.77.{net}.2", "::"),
}


def block(number):
    return hashlib.shake_128(number.to_bytes(8, "big")).digest(BLOCK)


def serve(address):
    family, *_, name = socket.getaddrinfo(address, 0)[0]  # with the link's number, if it is of one
    listener = socket.create_server(name, family=family, dualstack_ipv6=address == "::")
    print(listener.getsockname()[1], flush=True)
    connection = listener.accept()[0]
    while data := connection.recv(65536):
        connection.sendall(data)
    connection.close()


def pour(near, far, port):
    """Until something is on standard input; then to the end. Says what happened."""
    connection = socket.create_connection((far, port), source_address=socket.getaddrinfo(near, 0)[0][4])
    connection.settimeout(PATIENCE)
    ends, sent, problem = threading.Event(), 0, []

    def write():
        nonlocal sent
        try:
            while sent == 0 or not ends.is_set():
                connection.sendall(block(sent))
                sent += 1
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            problem.append(f"send of block {sent}: {error!r}")
    writer = threading.Thread(target=write, daemon=True)
    threading.Thread(target=lambda: (sys.stdin.readline(), ends.set()), daemon=True).start()
    writer.start()
    received = 0
    try:
        while True:
            data = b""
            while len(data) < BLOCK and (piece := connection.recv(BLOCK - len(data))):
                data += piece
            if not data:
                break
            if data != block(received):
                raise ValueError(f"block {received} is not what was sent")
            received += 1
    except (OSError, ValueError) as error:
        problem.append(f"receive of block {received}: {error!r}")
    writer.join(PATIENCE)
    if sent != received:
        problem.append(f"{sent} blocks sent, {received} received")
    print("; ".join(problem) or f"ok {sent}", flush=True)


def run(args, family):
    net, client_dev, server_dev = NETWORKS[args.transport]
    near, far, at = (each.format(net=net, client=client_dev, server=server_dev) for each in FAMILIES[family])
    with tempfile.TemporaryDirectory(prefix="sdpreload-families-") as folder:
        env = dict(os.environ, LD_PRELOAD=args.lib, SDP_TRANSPORT=args.transport, SDP_STATS=os.path.join(folder, "%p.json"),
                   SDP_POLICY="sdp")

        def start(*what):
            return subprocess.Popen(["/usr/bin/python3", __file__, *what], env=env, text=True, stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE)
        server = start("serve", at)
        client = start("pour", near, far, server.stdout.readline().strip())
        try:
            time.sleep(args.seconds)
            outcome = client.communicate("\n", timeout=3 * PATIENCE)[0].strip()
            server.wait(PATIENCE)
        finally:
            for process in (client, server):
                process.kill()
                process.wait()
        ends = [json.load(open(path, encoding="utf-8")) for path in glob.glob(os.path.join(folder, "*.json"))]
    assert outcome.startswith("ok"), f"{family}: {outcome}: {ends}"
    assert len(ends) == 2, f"{family}: {len(ends)} reports"
    for end in ends:
        assert end["lanes"][args.transport] == 1, f"{family}: {end}"
        assert end["bytes"]["tcp"] == {"sent": 0, "received": 0} and end["bytes"]["lane"]["sent"] >= BLOCK, f"{family}: {end}"
    print(f"{family}: {outcome.split()[1]} blocks of {BLOCK} bytes", flush=True)


def main():
    if sys.argv[1] in ("serve", "pour"):
        return {"serve": serve, "pour": pour}[sys.argv[1]](*(int(a) if a.isdigit() else a for a in sys.argv[2:]))
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True, type=os.path.abspath)
    parser.add_argument("--transport", choices=NETWORKS, required=True)
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    args = parser.parse_args()
    failed = 0
    for family in args.families:
        try:
            run(args, family)
        except AssertionError as error:
            print(f"FAILED: {error}", flush=True)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
