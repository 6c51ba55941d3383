#!/usr/bin/env python3
"""Kills either side of a checksummed stream at seeded moments, also in the middle of a switch, and looks at the survivor.

    kill_test.py (--lib LIBRARY | --plain) [--kills N] [--first SEED]

The writer numbers its 8-byte words, so that the reader can check each byte. Killed writer: the reader sees a clean prefix, at least
what the writer said send() had taken, then EOF or ECONNRESET within a second or so. Killed reader: the writer gets EPIPE or
ECONNRESET. Nothing of ours may stay behind: no abstract socket of the dead.
"""
import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import time

parser = argparse.ArgumentParser()
which = parser.add_mutually_exclusive_group(required=True)
which.add_argument("--lib")
which.add_argument("--plain", action="store_true", help="kernel TCP alone: the oracle")
parser.add_argument("--kills", type=int, default=60)
parser.add_argument("--first", type=int, default=1)
ARGS = parser.parse_args()

WRITER = """
import os, random, signal, socket, struct, sys
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
rng, n = random.Random(int(sys.argv[2])), 0
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
try:
    while True:
        k = rng.randrange(1, 4000)
        s.sendall(struct.pack("<%dQ" % k, *range(n, n + k)))
        n += k
        os.pwrite(3, struct.pack("<Q", n * 8), 0)
except (BrokenPipeError, ConnectionResetError):
    sys.exit(7)
"""
READER = """
import socket, struct, sys
l = socket.create_server(("127.0.0.1", 0))
print(l.getsockname()[1], flush=True)
c, _ = l.accept()
n, rest, total, how = 0, b"", 0, "eof"
try:
    while data := c.recv(65536):
        total += len(data)
        data = rest + data
        k = len(data) // 8
        if struct.unpack("<%dQ" % k, data[:k * 8]) != tuple(range(n, n + k)):
            print("corrupt", total); sys.exit(1)
        n += k
        rest = data[k * 8:]
except ConnectionResetError:
    how = "reset"
print(how, total)
"""


def one(seed):
    rng = random.Random(seed)
    env = {**os.environ, "LD_PRELOAD": os.path.abspath(ARGS.lib) if ARGS.lib else "", "SDP_UPGRADE_MESSAGES": str(rng.choice([1, 2, 8]))}
    reader = subprocess.Popen([sys.executable, "-c", READER], env=env, stdout=subprocess.PIPE, text=True)
    port = reader.stdout.readline().strip()
    progress = os.memfd_create("progress")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, port, str(seed)], env=env, pass_fds=[], preexec_fn=lambda: os.dup2(progress, 3),
                              close_fds=False)
    while os.fstat(progress).st_size == 0 and writer.poll() is None:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.1))  # the fault's moment, not a wait for anything
    victim = rng.choice(["writer", "reader"])
    try:
        if victim == "writer":
            writer.kill()
            writer.wait()
            taken = int.from_bytes(os.pread(progress, 8, 0), "little")
            begun = time.time()
            out = reader.communicate(timeout=20)[0].split()
            assert time.time() - begun < 10, "the reader took too long to see the end"
            assert out and out[0] in ("eof", "reset"), out
            if out[0] == "eof":
                assert int(out[1]) >= taken, f"{taken} bytes were taken by send(), {out[1]} arrived"
        else:
            reader.kill()
            reader.wait()
            assert writer.wait(20) == 7, writer.returncode
        return victim
    finally:
        for child in (writer, reader):
            if child.poll() is None:
                child.kill()
                child.wait()
        reader.stdout.close()
        os.close(progress)


count = {"writer": 0, "reader": 0}
for seed in range(ARGS.first, ARGS.first + ARGS.kills):
    try:
        count[one(seed)] += 1
    except Exception as error:
        sys.exit(f"seed {seed}: {error!r}")
left = [line for line in open("/proc/net/unix") if "@sdpreload/" in line]
assert not left, left
print(f"killed {count['writer']} writers and {count['reader']} readers; every survivor saw the end, nothing was lost")
