#!/usr/bin/env python3
"""Paths and devices that fail in the middle of a transfer: every byte arrives, once, and the connection lives on by TCP.

A client pours numbered bytes into a server that sends them back, both unmodified, on the network that scripts/vm.d/network makes. When a
lane carries them the fault is made; then the stream must still be whole, to its end. What counts as a fault must have been one: the lane
is gone at both ends, and said why.
"""
import argparse
import glob
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

DEVICES = {"ib": ("rxe0", ("v0", "v1"), ("10.77.0.1", "10.77.0.2")), "rnic": ("siw0", ("v2", "v3"), ("10.77.1.1", "10.77.1.2"))}
PATIENCE = 60  # seconds
BLOCK = 16384


def block(number):
    return hashlib.shake_128(number.to_bytes(8, "big")).digest(BLOCK)


def serve(address):
    listener = socket.create_server((address, 0))
    print(listener.getsockname()[1], flush=True)
    connection = listener.accept()[0]
    while data := connection.recv(65536):
        connection.sendall(data)
    connection.close()


def pour(near, far, port):
    """Until something is on standard input; then to the end. Says what happened."""
    connection = socket.create_connection((far, port), source_address=(near, 0))
    connection.settimeout(PATIENCE)
    ends, sent, problem = threading.Event(), 0, []

    def write():
        nonlocal sent
        try:
            while not ends.is_set():
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


def lose_everything(args, _, seconds):
    interfaces = DEVICES[args.transport][1]
    for interface in interfaces:
        subprocess.run(["tc", "qdisc", "add", "dev", interface, "root", "netem", "loss", "100%"], check=True)
    time.sleep(seconds)
    for interface in interfaces:
        subprocess.run(["tc", "qdisc", "del", "dev", interface, "root"], check=True)


def take_link_down(args, _, seconds):
    """The routes of a table of its own go with the link; see scripts/vm.d/network."""
    _, (_, far_interface), (near, far) = DEVICES[args.transport]
    table = {"ib": "20", "rnic": "21"}[args.transport]
    subprocess.run(["ip", "link", "set", far_interface, "down"], check=True)
    time.sleep(seconds)
    subprocess.run(["ip", "link", "set", far_interface, "up"], check=True)
    for interface, own, other in ((far_interface, far, near), (DEVICES[args.transport][1][0], near, far)):
        subprocess.run(["ip", "route", "replace", other, "dev", interface, "src", own, "table", table], check=True)


def stop_server(_, server, seconds):
    server.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    server.send_signal(signal.SIGCONT)


def kill_server(_, server, __):
    server.kill()


def delete_device(args, _, __):
    device, interfaces, _ = DEVICES[args.transport]
    kind = {"rxe0": "rxe", "siw0": "siw"}[device]
    command = subprocess.Popen(["rdma", "link", "delete", device])
    assert command.wait(PATIENCE) == 0
    subprocess.run(["rdma", "link", "add", device, "type", kind, "netdev", interfaces[0]], check=True)


FAULTS = {"loss": (lose_everything, 3), "down": (take_link_down, 3), "removal": (delete_device, 0), "stopped": (stop_server, 4),
          "killed": (kill_server, 0)}
# Soft-iWARP's own TCP outlasts what is over in time, Soft-RoCE at times a link that is down, and a stopped process is no fault of a lane's.
LANE_FAILS = {"ib": {"loss", "removal"}, "rnic": {"removal"}}
LANE_MAY_FAIL = {"down"}


def run(args, fault):
    _, _, (near, far) = DEVICES[args.transport]
    act, seconds = FAULTS[fault]
    with tempfile.TemporaryDirectory(prefix="sdpreload-fault-") as folder:
        env = dict(os.environ, LD_PRELOAD=args.lib, SDP_TRANSPORT=args.transport, SDP_STATS=os.path.join(folder, "%p.json"),
                   SDP_POLICY="sdp", SDP_LANE_TIMEOUT="1")

        def start(*what):
            return subprocess.Popen(["/usr/bin/python3", __file__, *what], env=env, text=True, stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE)
        server = start("serve", far)
        client = start("pour", near, far, server.stdout.readline().strip())
        try:
            time.sleep(args.before)
            act(args, server, seconds)
            time.sleep(args.after)
            outcome = client.communicate("\n", timeout=3 * PATIENCE)[0].strip()
            server.wait(PATIENCE)
        finally:
            for process in (client, server):
                process.kill()
                process.wait()
        ends = [json.load(open(path, encoding="utf-8")) for path in glob.glob(os.path.join(folder, "*.json"))]
    if fault == "killed":  # the end is told as an error, and soon
        assert "ConnectionResetError" in outcome or "BrokenPipeError" in outcome, f"{fault}: {outcome}: {ends}"
        print(f"{fault}: {outcome}")
        return
    assert outcome.startswith("ok"), f"{fault}: {outcome}: {ends}"
    assert len(ends) == 2, f"{fault}: {len(ends)} reports"
    for end in ends:
        assert min(end["bytes"]["lane"].values()) > BLOCK, f"{fault}: the lane carried nothing: {end}"
        failed = int(fault in LANE_FAILS[args.transport])
        assert fault in LANE_MAY_FAIL or end["reasons"].get("device_lost", 0) == failed, f"{fault}: {'no' if failed else 'a'} failure at one end: {end}"
    print(f"{fault}: {outcome.split()[1]} blocks of {BLOCK} bytes, {[end['bytes'] for end in ends]}")


def main():
    if sys.argv[1] in ("serve", "pour"):
        return {"serve": serve, "pour": pour}[sys.argv[1]](*(int(a) if a.isdigit() else a for a in sys.argv[2:]))
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True, type=os.path.abspath)
    parser.add_argument("--transport", choices=DEVICES, required=True)
    parser.add_argument("--before", type=float, default=2)
    parser.add_argument("--after", type=float, default=1)
    parser.add_argument("faults", nargs="*", default=list(FAULTS))
    args = parser.parse_args()
    for fault in args.faults:
        run(args, fault)


if __name__ == "__main__":
    sys.exit(main())
