#!/usr/bin/env python3
"""Small sends that wait for each other behind unacknowledged ones (sdp/lane_gather.cpp) arrive whatever their program does next: nothing,
for as long as it likes; nothing, with the peer's buffers full; end the connection in one way or another; hand it to another process.

    held_test.py --lib LIBRARY --transport ib|rnic

The reader makes no call while the sender sends, so that nothing is acknowledged. The policy is `sdp`: what has no lane has no connection.
"""
import argparse
import ctypes
import glob
import json
import os
import socket
import subprocess
import sys
import tempfile

ADDRESSES = {"ib": ("10.77.0.1", "10.77.0.2"), "rnic": ("10.77.1.1", "10.77.1.2")}
PATIENCE = 100  # seconds
WAYS = ("computes", "fills", "shuts", "closes", "exits", "exits_at_once", "exits_quickly", "forks", "execs")
ENDS = ("shuts", "closes", "exits", "exits_at_once", "exits_quickly")
SENDS = 50


def piece(i):
    return b"%09d." % i


def say(*words):
    print(*words, flush=True)


def accept(address):
    with socket.create_server((address, 0)) as listener:
        say(listener.getsockname()[1])
        peer = listener.accept()[0]
    assert peer.recv(1) == b"!"
    say("met")
    wanted = int(input())  # bytes; 0: to the end
    got = bytearray()
    while (wanted == 0 or len(got) < wanted) and (more := peer.recv(1 << 16)):
        got += more
    say(len(got), bytes(got) == b"".join(piece(i) for i in range(len(got) // 10 + 1))[:len(got)])
    input()


def send_some(s, first, count):
    for i in range(first, first + count):
        s.sendall(piece(i))


def fill(s):
    """As many bytes as go; the last piece may go in part."""
    s.setblocking(False)
    sent = 0
    try:
        while True:
            sent += s.send(piece(sent // 10)[sent % 10:])
    except BlockingIOError:
        return sent


def connect(own, server, port, way):
    s = socket.create_connection((server, int(port)), source_address=(own, 0))
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    s.sendall(b"!")
    input()
    sent = 10 * SENDS
    if way == "fills":
        sent = fill(s)
    else:
        send_some(s, 0, SENDS)
    if way == "shuts":
        s.shutdown(socket.SHUT_WR)
    elif way == "closes":
        s.close()
    elif way == "forks":
        child = os.fork()
        if child == 0:
            send_some(s, SENDS, SENDS)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        sent += 10 * SENDS
    elif way == "execs":
        s.set_inheritable(True)
        os.execv(sys.executable, [sys.executable, __file__, "after-exec", str(s.fileno())])
    say(sent)
    if way == "exits_at_once":
        os._exit(0)
    elif way == "exits_quickly":
        ctypes.CDLL(None).quick_exit(0)
    elif way != "exits":
        sys.stdin.readline()


def after_exec(fd):
    send_some(socket.socket(fileno=int(fd)), SENDS, SENDS)
    say(10 * 2 * SENDS)
    sys.stdin.readline()


def run(args, way):
    near, far = ADDRESSES[args.transport]
    with tempfile.TemporaryDirectory(prefix="sdpreload-held-") as folder:
        env = dict(os.environ, LD_PRELOAD=args.lib, SDP_TRANSPORT=args.transport, SDP_STATS=os.path.join(folder, "%p.json"),
                   SDP_POLICY="sdp")

        def start(*what):
            return subprocess.Popen([sys.executable, __file__, *what], env=env, text=True, stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE)

        def tell(process, what):
            process.stdin.write(f"{what}\n")
            process.stdin.flush()
        server = start("accept", far)
        client = start("connect", near, far, server.stdout.readline().strip(), way)
        try:
            assert server.stdout.readline() == "met\n"
            tell(client, "")
            sent = int(client.stdout.readline())
            tell(server, 0 if way in ENDS else sent)
            said = server.stdout.readline().split()
            assert said == [str(sent), "True"], f"{way}: {sent} bytes sent, the reader said {said}"
            for process in (client, server):
                process.communicate("\n" if process.poll() is None else None, timeout=PATIENCE)
        finally:
            for process in (client, server):
                process.kill()
                process.wait()
        ends = [json.load(open(path, encoding="utf-8")) for path in glob.glob(os.path.join(folder, "*.json"))]
    assert any(end["bytes"]["lane"]["received"] > 10 * SENDS / 2 for end in ends), f"{way}: {ends}"
    say(f"{way}: {sent} bytes")


def main():
    if len(sys.argv) > 1 and sys.argv[1] in ("accept", "connect", "after-exec"):
        return {"accept": accept, "connect": connect, "after-exec": after_exec}[sys.argv[1]](*sys.argv[2:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True, type=os.path.abspath)
    parser.add_argument("--transport", choices=ADDRESSES, required=True)
    parser.add_argument("ways", nargs="*", default=list(WAYS))
    args = parser.parse_args()
    for way in args.ways:
        run(args, way)
    return 0


if __name__ == "__main__":
    sys.exit(main())
