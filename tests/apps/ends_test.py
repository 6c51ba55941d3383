#!/usr/bin/env python3
"""A writer sends more than three megabytes in small pieces that nobody reads yet, and ends: by close, exit, kill -9, shutdown, exec, a fork
whose child goes on, or not at all. Then the reader reads. It must get every byte that send() took, and the end that TCP shows.

    ends_test.py --lib LIBRARY | --plain
"""
import argparse
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

LAST_BALL = b"!"
HOWS = ("close", "exit", "kill", "shutdown", "idle", "exec", "fork")
PIECES = [b"%09d," % i * 8 for i in range(40000)]


def acknowledged(c):
    """What the kernel's TCP carried and had acknowledged (tcpi_bytes_acked)."""
    return struct.unpack_from("=Q", c.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128), 120)[0]


def warm_up(c):
    """Plays ball until TCP stands still, which is when a lane carries the bytes (or for two seconds, where there is none)."""
    until = time.monotonic() + 2
    by_tcp = still = 0
    while still < 50 and time.monotonic() < until:
        c.sendall(b"b")
        assert c.recv(1) == b"b"
        before, by_tcp = by_tcp, acknowledged(c)
        still = still + 1 if by_tcp == before else 0
    c.sendall(LAST_BALL)


def write(port, how):
    c = socket.create_connection(("127.0.0.1", port))
    warm_up(c)
    for piece in PIECES:
        c.sendall(piece)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "shutdown":
        c.shutdown(socket.SHUT_WR)
    if how in ("shutdown", "idle"):
        assert c.recv(4, socket.MSG_WAITALL) == b"done"
    if how == "exec":
        c.set_inheritable(True)
        os.execve("/bin/true", ["true"], {})
    if how == "fork":
        child = os.fork()
        if child == 0:
            c.sendall(b"and the child")
            os._exit(0)
        os.waitpid(child, 0)
    if how == "exit":
        os._exit(0)
    c.close()


def read(how):
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    s, _ = listener.accept()
    while (ball := s.recv(1)) != LAST_BALL:
        s.sendall(ball)
    sys.stdin.readline()  # the parent says when the writer has done its part
    want = b"".join(PIECES) + (b"and the child" if how == "fork" else b"")
    s.settimeout(20)
    got = bytearray()
    while len(got) < len(want):
        data = s.recv(65536)
        if not data:
            break
        got += data
    assert got == want, f"{len(got)} bytes of {len(want)}, or not the same"
    if how in ("shutdown", "idle"):
        s.sendall(b"done")
    assert s.recv(1) == b"", "no end after the last byte"


def run(how, lib, folder):
    env = {k: v for k, v in os.environ.items() if not k.startswith("SDP_") and k != "LD_PRELOAD"}
    if lib:
        env.update(LD_PRELOAD=lib, SDP_STATS=os.path.join(folder, how + ".%p.json"))
    reader = subprocess.Popen([sys.executable, __file__, "read", how], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    port = reader.stdout.readline().strip()
    writer = subprocess.Popen([sys.executable, __file__, "write", how, port], env=env)
    if how in ("shutdown", "idle"):
        time.sleep(1)  # the fault is a reader that comes late
    else:
        writer.wait(30)
    reader.communicate("go\n", timeout=60)
    assert reader.returncode == 0, f"{how}: the reader failed"
    writer.wait(30)
    if lib:
        report = json.load(open(os.path.join(folder, f"{how}.{reader.pid}.json"), encoding="utf-8"))
        lane = report["bytes"]["lane"]["received"]
        least = 1 if how == "fork" else 3_000_000
        assert lane >= least, f"{how}: only {lane} bytes came by the lane"
    print(f"{how}: every byte arrived")


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(int(sys.argv[3]), sys.argv[2])
    elif sys.argv[1] == "read":
        read(sys.argv[2])
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--lib")
        parser.add_argument("--plain", action="store_true")
        args = parser.parse_args()
        with tempfile.TemporaryDirectory(prefix="sdpreload-ends-") as where:
            for each in HOWS:
                run(each, os.path.abspath(args.lib) if args.lib else None, where)
