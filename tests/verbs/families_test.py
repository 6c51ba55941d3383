#!/usr/bin/env python3
"""Lanes of connections by IPv6, by addresses that only the link knows, and by IPv4 that one or both ends name in IPv6's way.

    families_test.py --lib LIBRARY --transport ib|rnic

Two programs send each other numbered bytes, as in fault_test.py, on the network that scripts/vm.d/network makes.
The policy is `sdp`: what has no lane has no connection.
"""
import argparse
import glob
import json
import os
import subprocess
import sys
import tempfile

from fault_test import BLOCK, PATIENCE, flow

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


def run(args, family):
    net, client_dev, server_dev = NETWORKS[args.transport]
    near, far, at = (each.format(net=net, client=client_dev, server=server_dev) for each in FAMILIES[family])
    with tempfile.TemporaryDirectory(prefix="sdpreload-families-") as folder:
        env = dict(os.environ, LD_PRELOAD=args.lib, SDP_TRANSPORT=args.transport, SDP_STATS=os.path.join(folder, "%p.json"),
                   SDP_POLICY="sdp")

        def start(*what):
            return subprocess.Popen(["/usr/bin/python3", __file__, *what], env=env, text=True, stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE)
        server = start("flow", "accept", at, "-", "yes")
        client = start("flow", "connect", near, f"{far}:{server.stdout.readline().strip()}", "yes")
        try:
            for process in (client, server):
                process.stdin.write("\n")
                process.stdin.flush()
            words = [process.communicate(timeout=PATIENCE)[0].split() for process in (client, server)]
        finally:
            for process in (client, server):
                process.kill()
                process.wait()
        ends = [json.load(open(path, encoding="utf-8")) for path in glob.glob(os.path.join(folder, "*.json"))]
    assert all("ok" in said for said in words) and words[0][-2:] == words[1][:-3:-1], f"{family}: {words}: {ends}"
    assert len(ends) == 2, f"{family}: {len(ends)} reports"
    for end in ends:
        assert end["lanes"][args.transport] == 1, f"{family}: {end}"
        assert end["bytes"]["tcp"] == {"sent": 0, "received": 0} and end["bytes"]["lane"]["sent"] >= BLOCK, f"{family}: {end}"
    print(f"{family}: blocks of {BLOCK} bytes sent and received: {words[0][-2:]}", flush=True)


def main():
    if sys.argv[1] == "flow":
        return flow(*sys.argv[2:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True, type=os.path.abspath)
    parser.add_argument("--transport", choices=NETWORKS, required=True)
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
