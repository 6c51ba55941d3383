#!/usr/bin/env python3
"""What idle lanes hold of the machine: registered memory, which the kernel pins, and the queues that it keeps for their QPs.

    idle_test.py --lib LIBRARY --transport ib|rnic [--connections N]

Two processes have N lanes. What each of them has pinned is printed per lane: with no byte carried, after a few messages, after a load, and when
that is over. Then it must have come back to what it was, and stay below a bound.
"""
import argparse
import socket
import subprocess
import sys
import time

from two_roles import NETWORKS, two_roles

PORT = 12880
LOAD = 2 << 20
PATIENCE = 60
BOUND = {"pinned": 96, "queues": 192}  # KiB per lane, at either end


def give(sock, count):
    sock.sendall(bytes(count))


def take(sock, count):
    while count:
        count -= len(sock.recv(min(count, 1 << 16)) or sys.exit("the connection ended"))


def serve(near, count):
    """Answers each command byte of the first connection on all of them: `m` by a message, `l` by a load."""
    listener = socket.create_server((near, PORT), backlog=1024)
    all_of_them = [listener.accept()[0] for _ in range(count)]
    for sock in all_of_them:
        take(sock, 1)
        give(sock, 1)
    while what := all_of_them[0].recv(1):
        for sock in all_of_them:
            give(sock, 200 if what == b"m" else LOAD)


def ask(near, far, count):
    all_of_them = [socket.create_connection((near, PORT), source_address=(far, 0)) for _ in range(count)]
    for sock in all_of_them:
        give(sock, 1)
        take(sock, 1)
    print("ready", flush=True)
    for line in sys.stdin:
        all_of_them[0].sendall(line[:1].encode())
        for sock in all_of_them:
            take(sock, 200 if line[0] == "m" else LOAD)
        print("done", flush=True)


def held(pid):
    """KiB: what the kernel has pinned for the process, and queues that it shares with it."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        pinned = next(int(line.split()[1]) for line in status if line.startswith("VmPin:"))
    queues = 0
    with open(f"/proc/{pid}/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            if "uverbs" in line:
                first, last = (int(end, 16) for end in line.split()[0].split("-"))
                queues += (last - first) >> 10
    return {"pinned": pinned, "queues": queues}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib")
    parser.add_argument("--transport", choices=NETWORKS, required=True)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--role", choices=("serve", "ask"))
    args = parser.parse_args()
    near, far = NETWORKS[args.transport]
    if args.role:
        return serve(near, args.connections) if args.role == "serve" else ask(near, far, args.connections)
    with two_roles(args.lib, PORT, args.transport, "--connections", args.connections,
                   text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        def show(when):
            each = [held(process.pid) for process in (run.server, run.client)]
            print(f"{args.transport}, {when}, KiB per lane:",
                  *(f"{end} {what} {have[what] / args.connections:.0f}" for end, have in zip(("sender", "reader"), each) for what in have), flush=True)
            return each

        def do(what):
            run.client.stdin.write(f"{what}\n")
            run.client.stdin.flush()
            assert run.client.stdout.readline() == "done\n"

        assert run.client.stdout.readline() == "ready\n"
        show("as made")
        do("m")
        show("after a message")
        do("l")
        loaded = show("after a load")
        deadline = time.monotonic() + PATIENCE
        while any(held(process.pid)[what] > BOUND[what] * args.connections for process in (run.server, run.client) for what in BOUND):
            assert time.monotonic() < deadline, f"does not go back: {show('in vain')}"
            time.sleep(0.1)
        for before, after in zip(loaded, show("idle")):
            assert after["pinned"] + args.connections * 128 < before["pinned"], "the load has pinned nothing: this proves nothing"
        do("m")
        do("l")
        for first, second in zip(loaded, show("after another load")):
            assert second["pinned"] < 2 * first["pinned"], "it pins more each time"
    return 0


if __name__ == "__main__":
    sys.exit(main())
