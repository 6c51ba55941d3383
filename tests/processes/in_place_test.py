#!/usr/bin/env python3
"""Long blocking sends between two processes of one host are read from the sender's memory (SDP_ZCOPY_THRESHOLD), by the counters of both
ends, and arrive whole: also while signals end calls in the middle, both ways at once, when the reader is stopped or does not read, when
either end is killed, closes or forks, and where another thread unmaps the memory. Data is checked by its digest; the sender overwrites its
memory the moment a send returns. A peer that cannot read there gets it by messages.

    in_place_test.py --lib LIBRARY

Policy sdp: all of it goes by the lane.
"""
import argparse
import ctypes
import errno
import hashlib
import json
import mmap
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import threading
import time

import ends

MIB = 1 << 20
BLOCKS = 24
PATTERN = random.Random(3).randbytes(MIB)
SNDTIMEO = struct.pack("ll", 0, 100_000)
PR_SET_DUMPABLE = 4
libc = ctypes.CDLL(None, use_errno=True)


def fill(memory, number):
    memory[:] = PATTERN[number % 251:] + PATTERN[:number % 251]


def accept(listener):
    return listener.accept()[0]


def connect(port):
    return socket.create_connection(("127.0.0.1", int(port)))


# --- what a server does with its connection

def digest(peer):
    total, memory = hashlib.sha256(), memoryview(bytearray(MIB))
    while count := peer.recv_into(memory):
        total.update(memory[:count])
    peer.sendall(total.digest())


def digest_undumpable(peer):
    libc.prctl(PR_SET_DUMPABLE, 0)
    digest(peer)


def read_for_ever(peer):
    memory = bytearray(MIB)
    try:
        while peer.recv_into(memory):
            pass
        print("end")
    except OSError as error:
        print(error.strerror)


def read_half_of_a_block(peer):
    peer.recv(MIB // 2, socket.MSG_WAITALL)


def read_nothing_at_first(peer):
    time.sleep(1)
    digest(peer)


# --- what a client does

def send_blocks(client, signals=False, reuse=True):
    interrupted, total, memory = 0, hashlib.sha256(), bytearray(MIB)

    def interrupt(*_):
        nonlocal interrupted
        interrupted += 1
    if signals:
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
    for number in range(10 * BLOCKS if signals else BLOCKS):
        fill(memory, number)
        total.update(memory)
        view = memoryview(memory)
        while view:
            view = view[client.send(view):]
        if reuse:
            memory[:] = bytes(MIB)
    signal.setitimer(signal.ITIMER_REAL, 0)
    client.shutdown(socket.SHUT_WR)
    assert client.recv(32, socket.MSG_WAITALL) == total.digest(), "another stream arrived"
    assert not signals or interrupted > 10, f"{interrupted} signals"


def send_with_signals(client):
    send_blocks(client, signals=True)


def send_for_ever(client):
    memory = bytearray(PATTERN)
    try:
        while True:
            client.sendall(memory)
    except OSError as error:
        print(error.strerror)


def send_undumpable(client):
    libc.prctl(PR_SET_DUMPABLE, 0)
    send_blocks(client)


def send_with_timeouts(client):
    """The reader is asleep for a second: sends end with what crossed, or nothing, and it all adds up."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, SNDTIMEO)
    total, memory, short = hashlib.sha256(), bytearray(4 * MIB), 0
    for number in range(8):
        memory[:] = PATTERN * 3 + bytes([number]) * MIB
        total.update(memory)
        view = memoryview(memory)
        while view:
            begun = time.monotonic()
            try:
                count = client.send(view)
            except BlockingIOError:
                count = 0
            assert time.monotonic() - begun < 1, "SO_SNDTIMEO is late"
            short += count < len(view)
            view = view[count:]
        memory[:] = bytes(len(memory))
    client.shutdown(socket.SHUT_WR)
    assert client.recv(32, socket.MSG_WAITALL) == total.digest(), "another stream arrived"
    assert short > 2, f"{short} sends were short"


def send_while_forking(client):
    def fork_often():
        for _ in range(20):
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
    forks = threading.Thread(target=fork_often)
    forks.start()
    send_blocks(client)
    forks.join()


def send_what_another_thread_unmaps(client):
    """The second half goes while send() waits for the reader: EFAULT, or what was before it, as from the kernel; never other bytes."""
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.send.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.send.restype = ctypes.c_ssize_t
    at = libc.mmap(None, 2 * MIB, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    ctypes.memmove(at, PATTERN, MIB)
    ctypes.memmove(at + MIB, PATTERN, MIB)
    unmaps = threading.Timer(0.002, lambda: libc.munmap(at + MIB, MIB))
    unmaps.start()
    count = libc.send(client.fileno(), at, 2 * MIB, 0)
    error = ctypes.get_errno()
    unmaps.join()
    assert count <= 2 * MIB and (count > 0 or error == errno.EFAULT), f"{count}, errno {error}"
    sent = hashlib.sha256((PATTERN * 2)[:max(count, 0)])
    client.sendall(b"more")
    sent.update(b"more")
    client.shutdown(socket.SHUT_WR)
    assert client.recv(32, socket.MSG_WAITALL) == sent.digest(), f"another stream arrived, of {count} bytes"


def exchange(peer):
    """Both ways at once: neither side may wait for the other to read."""
    def write():
        memory = bytearray(MIB)
        for number in range(BLOCKS):
            fill(memory, number)
            peer.sendall(memory)
        peer.shutdown(socket.SHUT_WR)
    writer = threading.Thread(target=write)
    writer.start()
    memory, expected = bytearray(MIB), bytearray(MIB)
    for number in range(BLOCKS):
        fill(expected, number)
        assert peer.recv_into(memory, MIB, socket.MSG_WAITALL) == MIB and memory == expected, f"block {number} is another"
    assert peer.recv(1) == b""
    writer.join()


def send_then_read(peer):
    """Both send all before they read: resolved at once, not by a time-out."""
    for step in range(4):  # until both directions go by the lane; strict streams that both send first wait for each other
        if (step % 2 == 0) == ("--client" in sys.argv):
            peer.sendall(b"x")
        else:
            peer.recv(1)
    begun = time.monotonic()
    for number in range(20):
        memory = bytearray(256 * 1024)
        memory[0] = number
        peer.sendall(memory)
        assert peer.recv(len(memory), socket.MSG_WAITALL) == memory, f"round {number}"
    print(f"took {time.monotonic() - begun:.3f}")


SERVERS = {each.__name__: each for each in
           (digest, digest_undumpable, read_for_ever, read_half_of_a_block, read_nothing_at_first, exchange, send_then_read)}
CLIENTS = {each.__name__: each for each in
           (send_blocks, send_with_signals, send_for_ever, send_undumpable, send_with_timeouts, send_while_forking,
            send_what_another_thread_unmaps, exchange, send_then_read)}


class Run:
    """Both ends, each with its report in the end."""

    def __init__(self, args, server, client, threshold="64K", user=None):
        self._folder = tempfile.TemporaryDirectory(prefix="sdpreload-in-place-")
        os.chmod(self._folder.name, 0o777)
        self._env = ends.environment(LD_PRELOAD=os.path.abspath(args.lib), SDP_POLICY="sdp", SDP_ZCOPY_THRESHOLD=threshold,
                                     SDP_STATS=os.path.join(self._folder.name, "%p.json"))
        self._user = [] if user is None else ["--user", str(user)]
        self.server = self._start("--server", server)
        self.client = self._start("--client", client, self.server.stdout.readline().strip())

    def _start(self, *arguments):
        return ends.start([sys.executable, sys.argv[0], *self._user, *arguments], self._env)

    def finish(self, excused=None):
        """What both said, and their zero_copy counters."""
        said = ends.finish({"server": self.server, "client": self.client}, excused=excused)
        counts = []
        for end in (self.client, self.server):
            path = os.path.join(self._folder.name, f"{end.pid}.json")
            report = json.load(open(path, encoding="utf-8")) if os.path.exists(path) else {"zero_copy": {}, "lanes": {"local": 1}}
            assert sum(report["lanes"].values()) >= 1, f"no lane: {report}"
            counts.append(report["zero_copy"])
        return said, *counts


def transfer(args, server, client, least, **options):
    _, source, sink = Run(args, server, client, **options).finish()
    print(client, "to", server, options, "source", source, "sink", sink, flush=True)
    assert source["bytes_sent"] == sink["bytes_received"], "the ends differ"
    assert source["bytes_sent"] >= least, f"only {source['bytes_sent']} bytes crossed in place"
    return source


def killed(args, victim):
    run = Run(args, "read_for_ever", "send_for_ever")
    time.sleep(0.5)
    (run.server if victim == "server" else run.client).kill()
    said, source, sink = run.finish(excused=-signal.SIGKILL)
    print(victim, "killed:", said, flush=True)
    if victim == "server":
        assert "reset" in said["client"] or "Broken pipe" in said["client"], said
        assert source["bytes_sent"] > 0
    else:
        assert "reset" in said["server"] or "end" in said["server"], said
        assert sink["bytes_received"] > 0


def stopped(args):
    """A reader that is stopped while bytes are offered to it: the sender's SO_SNDTIMEO is kept, and nothing is lost."""
    run = Run(args, "read_nothing_at_first", "send_with_timeouts")
    time.sleep(1.0)
    for _ in range(10):
        run.server.send_signal(signal.SIGSTOP)
        time.sleep(0.15)
        run.server.send_signal(signal.SIGCONT)
        time.sleep(0.02)
    run.finish()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib")
    parser.add_argument("--user", type=int)
    parser.add_argument("--server", choices=SERVERS)
    parser.add_argument("--client", nargs=2)
    args = parser.parse_args()
    if args.user:
        "".encode("idna")  # or it is looked for later, where that user may not
        os.setuid(args.user)
        libc.prctl(PR_SET_DUMPABLE, 1)  # as a program that was started by that user
    if args.server:
        listener = socket.create_server(("127.0.0.1", 0))
        print(listener.getsockname()[1], flush=True)
        return SERVERS[args.server](accept(listener))
    if args.client:
        return CLIENTS[args.client[0]](connect(args.client[1]))
    transfer(args, "digest", "send_blocks", BLOCKS * MIB // 2)
    assert transfer(args, "digest", "send_blocks", 0, threshold="off")["bytes_sent"] == 0
    transfer(args, "digest", "send_with_signals", MIB)
    transfer(args, "digest", "send_while_forking", MIB)
    transfer(args, "read_nothing_at_first", "send_with_timeouts", 0)
    transfer(args, "exchange", "exchange", 0)
    for _ in range(5):
        transfer(args, "digest", "send_what_another_thread_unmaps", 0)
    run = Run(args, "send_then_read", "send_then_read")
    said, *_ = run.finish()
    assert all(float(each.split()[1]) < 5 for each in said.values()), said
    stopped(args)
    for victim in ("server", "client"):
        killed(args, victim)
    said, *_ = Run(args, "read_half_of_a_block", "send_for_ever").finish()
    assert "reset" in said["client"] or "Broken pipe" in said["client"], said
    if os.geteuid() == 0:  # root may read anybody
        transfer(args, "digest", "send_blocks", MIB, user=12345)
        counts = transfer(args, "digest", "send_undumpable", 0, user=12345)
        assert counts["bytes_sent"] == 0 and counts["unregistered"] + counts["refused"] > 0, counts
        transfer(args, "digest_undumpable", "send_blocks", 0, user=12345)  # it may still read the other


if __name__ == "__main__":
    sys.exit(main())
