#!/usr/bin/env python3
"""A peer that is late is not taken for one without the library.

    late_test.py --lib LIBRARY

Both ends are on one host and preloaded, but one looks for a lane only when the other's first search is over: its settings let it
carry more by TCP. The first must look again, and the connection get its lane. Both ends are the late one in turn.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "apps"))
from harness import PYTHON, enter_private_network  # pylint: disable=wrong-import-position

SEARCH = 3  # seconds that a first look takes
SERVER = """
import socket
listener = socket.create_server(("127.0.0.1", 20000))
print("listens", flush=True)
link = listener.accept()[0]
while data := link.recv(1):
    link.sendall(data)
"""
CLIENT = """
import socket, sys, time
log, pause = sys.argv[1], float(sys.argv[2])
link = socket.create_connection(("127.0.0.1", 20000))

def turns(count):
    for _ in range(count):
        link.sendall(b"x")
        assert link.recv(1) == b"x"

turns(20)          # enough for one end to look
time.sleep(pause)  # its search is over
turns(200)         # enough for the other
until = time.monotonic() + 30
while "lane up" not in open(log).read() and time.monotonic() < until:
    turns(1)
    time.sleep(0.01)
turns(1000)
"""


def environment(library, folder, role, messages):
    return dict(os.environ, LD_PRELOAD=library, SDP_STATS=f"{folder}/{role}.json", SDP_LOG=f"info:{folder}/{role}.log",
                SDP_UPGRADE_MESSAGES=str(messages), SDP_UPGRADE_BYTES=str(1 << 30))


def run(library, late):
    with tempfile.TemporaryDirectory(prefix="sdp-late-") as folder:
        def start(role, code, *args):
            return subprocess.Popen([PYTHON, "-c", code, *args], env=environment(library, folder, role, 100 if role == late else 2),
                                    stdout=subprocess.PIPE, text=True)
        with start("server", SERVER) as server:
            server.stdout.readline()
            with start("client", CLIENT, f"{folder}/client.log", str(SEARCH + 0.5)) as client:
                client.wait(60)
            server.wait(60)
        failed = [server.returncode, client.returncode] != [0, 0]
        for role in ("server", "client"):
            with open(f"{folder}/{role}.json", encoding="utf-8") as report:
                said = json.load(report)
            print(f"late {late}: the {role}: {said['lanes']} {said['bytes']} {said['reasons']}", flush=True)
            failed |= said["lanes"]["local"] != 1 or said["bytes"]["lane"]["sent"] < 500
        return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lib", required=True)
    library = os.path.abspath(parser.parse_args().lib)
    enter_private_network()
    return int(any([run(library, late) for late in ("server", "client")]))


if __name__ == "__main__":
    sys.exit(main())
