#!/usr/bin/env python3
"""Offers between processes of one host: a server with two workers, forked before they accept, whose connections come to one port.

    relay_test.py --lib LIBRARY --transport ib|rnic

The first worker that needs it has the port's rendezvous, and passes on the offers for the other's connections. When it is killed the
other one takes the rendezvous, and new connections have lanes again. The policy is `sdp`: what has no lane has no connection. On the
network that scripts/vm.d/network makes.
"""
import argparse
import glob
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "apps"))
from harness import wait_for  # noqa: E402

NETWORKS = {"ib": ("10.77.0.1", "10.77.0.2"), "rnic": ("10.77.1.1", "10.77.1.2")}
PATIENCE = 60
MESSAGE, MESSAGES = bytes(range(256)) * 16, 4


def serve(address):
    """Workers accept when their line on standard input says so, one connection each time; its peer is told their number. Prints the
    port, and who they are."""
    listener = socket.create_server((address, 0))
    words = [os.pipe() for _ in range(2)]
    pids = []
    for number, (read, _) in enumerate(words):
        pids.append(os.fork())
        if pids[-1] == 0:
            kept = []
            while os.read(read, 1):
                connection = listener.accept()[0]
                kept.append(connection)  # to the end of the worker: its lane lives
                connection.sendall(b"%d" % number + b"." * (len(MESSAGE) - 1))
                left = MESSAGES * len(MESSAGE)
                while left > 0 and (data := connection.recv(left)):
                    connection.sendall(data)
                    left -= len(data)
            os._exit(0)
    print(listener.getsockname()[1], *pids, flush=True)
    for line in sys.stdin:
        os.write(words[int(line)][1], b".")


def holder(transport, address, port):
    """The process that has the rendezvous of that port; None: nobody."""
    if transport == "ib":
        shown = subprocess.run(["rdma", "-j", "resource", "show", "cm_id"], capture_output=True, text=True, check=True).stdout
        for each in json.loads(shown or "[]"):
            if each["state"] == "LISTEN" and each["src-addr"] == f"{address}:{port}":
                with open(f"/proc/{each['pid']}/status", encoding="utf-8") as status:  # the thread's number is told
                    return int(next(line for line in status if line.startswith("Tgid:")).split()[1])
        return None
    number = 61000 + port % 4096
    local = f"{int.from_bytes(socket.inet_aton(address), sys.byteorder):08X}:{number:04X}"
    with open("/proc/net/udp", encoding="ascii") as table:
        inodes = [line.split()[9] for line in table if line.split()[1] == local]
    for link in glob.glob("/proc/[0-9]*/fd/*") if inodes else ():
        try:
            if os.readlink(link) == f"socket:[{inodes[0]}]":
                return int(link.split("/")[2])
        except OSError:
            continue
    return None


def talk(connection):
    """What worker served it."""
    first = b""
    while len(first) < len(MESSAGE):
        first += connection.recv(len(MESSAGE) - len(first))
    for _ in range(MESSAGES):
        connection.sendall(MESSAGE)
        echoed = b""
        while len(echoed) < len(MESSAGE):
            piece = connection.recv(len(MESSAGE) - len(echoed))
            assert piece, "the end"
            echoed += piece
        assert echoed == MESSAGE
    return int(first[:1])


def clients(near, far, port):
    """One connection for each line of standard input, kept to the end."""
    kept = []
    for _ in sys.stdin:
        connection = socket.create_connection((far, port), source_address=(near, 0))
        connection.settimeout(PATIENCE)
        kept.append(connection)
        try:
            print(talk(connection), flush=True)
        except (OSError, AssertionError) as error:
            print(repr(error), flush=True)


def main():
    if len(sys.argv) > 1 and sys.argv[1] in ("serve", "clients"):
        return {"serve": serve, "clients": clients}[sys.argv[1]](*(int(a) if a.isdigit() else a for a in sys.argv[2:]))
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True, type=os.path.abspath)
    parser.add_argument("--transport", choices=NETWORKS, required=True)
    args = parser.parse_args()
    near, far = NETWORKS[args.transport]
    with tempfile.TemporaryDirectory(prefix="sdpreload-relay-") as folder:
        env = dict(os.environ, LD_PRELOAD=args.lib, SDP_TRANSPORT=args.transport, SDP_POLICY="sdp",
                   SDP_STATS=os.path.join(folder, "%p.json"))

        def start(*what):
            return subprocess.Popen(["/usr/bin/python3", __file__, *what], env=env, text=True, stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, start_new_session=True)

        def served_by(number):
            for process, line in ((server, f"{number}\n"), (client, "\n")):
                process.stdin.write(line)
                process.stdin.flush()
            said = client.stdout.readline().strip()
            assert said == str(number), f"worker {number}: {said}"
        server = start("serve", far)
        port, *workers = map(int, server.stdout.readline().split())
        client = start("clients", near, far, str(port))
        try:
            passed_on = False
            for number in (0, 1, 0, 1, 0, 1):  # a rendezvous is kept for some seconds after the last need of it
                before = holder(args.transport, far, port)
                served_by(number)
                after = holder(args.transport, far, port)
                assert after in workers, (after, workers)
                passed_on = before == after != workers[number]
                if passed_on and number == 1:
                    break
            assert passed_on, "no connection of the worker that has no rendezvous"
            os.kill(workers[0], signal.SIGKILL)
            wait_for(lambda: holder(args.transport, far, port) is None, PATIENCE, "the rendezvous of the killed worker to go")
            served_by(1)
            assert holder(args.transport, far, port) == workers[1], (holder(args.transport, far, port), workers)
            client.stdin.close()
            assert client.wait(PATIENCE) == 0
        finally:
            for process in (client, server):
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # it has ended, and nothing is left of it
                process.wait()
        (report,) = [each for each in (json.load(open(path, encoding="utf-8")) for path in glob.glob(os.path.join(folder, "*.json")))
                     if each["pid"] == client.pid]
    assert report["lanes"][args.transport] >= 3 and report["bytes"]["tcp"] == {"sent": 0, "received": 0}, report
    print(f"{report['lanes'][args.transport]} lanes, some by an offer that was passed on: {report['bytes']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
