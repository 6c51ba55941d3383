"""One of the two processes of kill_test.py: moves checked bytes until it is killed, or until its peer is.

  kill_peer.py survive listen|connect PORT            stays for all connections; takes one order a line, answers with one line of JSON
  kill_peer.py victim listen|connect PORT ORDER NOTE  has one connection; may kill itself; counts in the file NOTE what calls took

ORDER is JSON: seed, shape (who sends), die_after (calls until the victim kills itself; 0: somebody else will), poll (non-blocking with
epoll), slow (the survivor reads with pauses).
"""
import errno
import json
import mmap
import os
import random
import select
import signal
import socket
import struct
import sys
import time

BLOCK = 262_139  # prime: chunks of round sizes begin everywhere in it


def pattern(seed):
    block = random.Random(seed).randbytes(BLOCK)
    return block + block


def memfd_count():
    """memfds that this process has open or mapped."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        count = len({line.split()[4] for line in maps if "/memfd:" in line})
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink("/proc/self/fd/" + fd).startswith("/memfd:")
        except OSError:
            pass  # the listing's own descriptor
    return count


class Mover:
    def __init__(self, sock, order, sends, receives, note=None, die_after=0, slow=False):
        self.sock, self.sends, self.receives, self.note, self.die_after, self.slow = sock, sends, receives, note, die_after, slow
        # Each direction has a pattern of its own, so that bytes can't come back to their sender unnoticed.
        mine, theirs = ("victim", "survivor") if note is not None else ("survivor", "victim")
        self.out, self.expected = pattern(f"{order['seed']}{mine}"), pattern(f"{order['seed']}{theirs}")
        self.random = random.Random(f"{order['seed']}{mine} sizes")
        self.sent = self.received = self.calls = 0
        self.wrong = None
        self.end = None

    def tick(self):
        self.calls += 1
        if self.note is not None:
            struct.pack_into("=QQ", self.note, 0, self.sent, self.received)
        if self.calls == self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def send_some(self):
        size = self.random.choice((1, 64, 1000, 4096, 16384, 65536))
        start = self.sent % BLOCK
        self.sent += self.sock.send(self.out[start:start + size])
        self.tick()

    def receive_some(self):
        data = self.sock.recv(self.random.choice((100, 4096, 65536)))
        if not data:
            self.end = "EOF"
            return
        start = self.received % BLOCK
        if data != self.expected[start:start + len(data)] and self.wrong is None:
            self.wrong = f"other bytes than were sent, in {len(data)} at {self.received}"
        self.received += len(data)
        if self.slow and self.calls % 8 == 0:
            time.sleep(0.001)
        self.tick()

    def blocking(self):
        turn = 0
        while self.end is None:
            # With both directions, turns: neither side's writing can block for want of its own reading for ever.
            if self.sends and (not self.receives or turn % 2 == 0):
                self.send_some()
            if self.receives and self.end is None and (not self.sends or turn % 2 == 1):
                self.receive_some()
            turn += 1

    def polling(self):
        self.sock.setblocking(False)
        wanted = (select.EPOLLIN if self.receives else 0) | (select.EPOLLOUT if self.sends else 0)
        with select.epoll() as poll:
            poll.register(self.sock, wanted)
            while self.end is None:
                events = poll.poll(20)
                if not events:
                    self.end = "nothing for 20 s"
                    return
                for _, mask in events:
                    try:
                        if self.receives and mask & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                            self.receive_some()
                        if self.sends and self.end is None and mask & (select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR):
                            self.send_some()
                    except BlockingIOError:
                        pass

    def run(self, poll):
        try:
            self.polling() if poll else self.blocking()
        except OSError as error:
            self.end = errno.errorcode[error.errno]
        self.ended = time.monotonic()


def one_connection(sock, order, victim, note=None):
    shape = order["shape"]
    me = "victim" if victim else "survivor"
    sends, receives = shape in (me, "both"), shape != me
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    mover = Mover(sock, order, sends, receives, note, order["die_after"] if victim else 0, order["slow"] and not victim)
    # With both directions a blocking pair could stop for good with both buffers full, as over TCP: that shape always polls.
    mover.run(order["poll"] or shape == "both")
    return mover


def survive(how, port):
    listener = None
    if how == "listen":
        listener = socket.create_server(("127.0.0.1", port))
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        sock = listener.accept()[0] if listener else socket.create_connection(("127.0.0.1", order["port"]))
        mover = one_connection(sock, order, victim=False)
        sock.close()
        # Links to a process that is gone may be cleaned up by the next call or by a thread: give that a moment.
        print(json.dumps({"end": mover.end, "ended": mover.ended, "sent": mover.sent, "received": mover.received, "wrong": mover.wrong,
                          "memfds": memfd_count(), "fds": len(os.listdir("/proc/self/fd"))}), flush=True)


def victim(how, port, order, note_path):
    with open(note_path, "r+b") as file:
        note = mmap.mmap(file.fileno(), 16)
    if how == "listen":
        with socket.create_server(("127.0.0.1", port)) as listener:
            print("ready", flush=True)
            sock = listener.accept()[0]
    else:
        print("ready", flush=True)
        sock = socket.create_connection(("127.0.0.1", port))
    one_connection(sock, order, victim=True, note=note)
    time.sleep(60)  # until killed


if sys.argv[1] == "survive":
    survive(sys.argv[2], int(sys.argv[3]))
else:
    victim(sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]), sys.argv[5])
