#!/usr/bin/env python3
"""A writer sends more than three megabytes in small pieces that nobody reads yet, and ends: by close, exit, kill -9, shutdown, exec, a fork
whose child goes on, or not at all. Then the reader reads. It must get every byte that send() took, and the end that TCP shows.

The same with a reader that becomes a program without the library before it reads: then the writer's process sends them by TCP, which
takes little at a time here, and the end comes behind them.

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
TO_PLAIN_HOWS = ("close", "exit", "shutdown", "idle")
PIECES = [b"%09d," % i * 8 for i in range(40000)]


def acknowledged(c):
    """What the kernel's TCP carried and had acknowledged (tcpi_bytes_acked)."""
    return struct.unpack_from("=Q", c.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128), 120)[0]


def warm_up(c):
    """Plays ball until TCP stands still, which is when a lane carries the bytes. Without the library there is none."""
    until = time.monotonic() + (60 if "LD_PRELOAD" in os.environ else 0)
    by_tcp = still = 0
    while still < 50 and time.monotonic() < until:
        c.sendall(b"b")
        assert c.recv(1) == b"b"
        before, by_tcp = by_tcp, acknowledged(c)
        still = still + 1 if by_tcp == before else 0
    c.sendall(LAST_BALL)


def write(port, how, to_plain):
    c = socket.socket()
    if to_plain:
        c.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    c.connect(("127.0.0.1", port))
    warm_up(c)
    for piece in PIECES:
        c.sendall(piece)
    if to_plain:
        print("sent", flush=True)
        sys.stdin.readline()  # the reader has changed
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
    if how == "exit" and to_plain:
        sys.exit(0)
    if how == "exit":
        os._exit(0)
    c.close()


def read(how, to_plain):
    listener = socket.create_server(("127.0.0.1", 0))
    if to_plain:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    print(listener.getsockname()[1], flush=True)
    s, _ = listener.accept()
    while (ball := s.recv(1)) != LAST_BALL:
        s.sendall(ball)
    sys.stdin.readline()  # the parent says when the writer has done its part
    if to_plain:
        s.set_inheritable(True)
        os.execve(sys.executable, [sys.executable, __file__, "read-on", how, str(s.fileno())], {})
    read_on(s, how)


def read_on(s, how):
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


def run(how, lib, folder, to_plain):
    env = {k: v for k, v in os.environ.items() if not k.startswith("SDP_") and k != "LD_PRELOAD"}
    if lib:
        env.update(LD_PRELOAD=lib, SDP_STATS=os.path.join(folder, "%p.json"))

    def start(*args):
        command = [sys.executable, __file__, *args] + ["to-plain"] * to_plain
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    reader = start("read", how)
    writer = start("write", how, reader.stdout.readline().strip())
    if to_plain:
        assert writer.stdout.readline() == "sent\n"
        reader.stdin.write("go\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "changed\n"
        writer.communicate("go\n", timeout=60)
    elif how in ("shutdown", "idle"):
        time.sleep(1)  # the fault is a reader that comes late
    else:
        writer.wait(30)
    reader.communicate("" if to_plain else "go\n", timeout=60)
    assert reader.returncode == 0, f"{how}: the reader failed"
    writer.wait(30)
    if lib:
        counted, way = (writer, "sent") if to_plain else (reader, "received")
        report = json.load(open(os.path.join(folder, f"{counted.pid}.json"), encoding="utf-8"))
        lane = report["bytes"]["lane"][way]
        least = 1 if how == "fork" else 3_000_000
        if how == "exit" and not to_plain:  # by _exit()
            with open(os.path.join(folder, f"{writer.pid}.json"), encoding="utf-8") as own:
                assert json.load(own)["bytes"]["lane"]["sent"] >= least, f"{how}: the writer's report"
        assert lane >= least, f"{how}: only {lane} bytes {way} by the lane"
    print(f"{how}{', then read by a plain program' if to_plain else ''}: every byte arrived", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(int(sys.argv[3]), sys.argv[2], sys.argv[4:] == ["to-plain"])
    elif sys.argv[1] == "read":
        read(sys.argv[2], sys.argv[3:] == ["to-plain"])
    elif sys.argv[1] == "read-on":
        print("changed", flush=True)
        read_on(socket.socket(fileno=int(sys.argv[3])), sys.argv[2])
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--lib")
        parser.add_argument("--plain", action="store_true")
        args = parser.parse_args()
        library = os.path.abspath(args.lib) if args.lib else None
        with tempfile.TemporaryDirectory(prefix="sdpreload-ends-") as where:
            for each in HOWS:
                run(each, library, where, False)
            for each in TO_PLAIN_HOWS if library else ():  # TCP would not take so much
                run(each, library, where, True)
