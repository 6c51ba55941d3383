#!/usr/bin/env python3
"""One end of a connection of the soak: an unmodified program that sends and receives numbered bytes in every way, while it forks, execs,
dups, hands its socket on and changes its modes. What it does follows from its seed; every byte is looked at.

    soak_end.py serve ADDRESS SEED          prints its port, serves one connection
    soak_end.py connect ADDRESS:PORT SEED
    soak_end.py pool ADDRESS                prints its port, serves many, one after the other, until its input ends; says what it holds
    soak_end.py on STATE                    the end that another process had

It prints "ok SENT RECEIVED" when all has gone and come, "reset SENT RECEIVED" if the peer was lost, and else says what is wrong.
"""
import array
import fcntl
import json
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import threading

PERIOD = 65521  # bytes after which a direction's bytes repeat, no multiple of anything
HANG = 30       # seconds in which something must have come or gone
LOST = (ConnectionResetError, BrokenPipeError, ConnectionRefusedError)
PRELOAD = "SOAK_PRELOAD"
KEEPS_ITS_SOCKET = ("duplicate", "duplicate_high", "fork_idle", "spawn", "thread", "nonblocking")
MOVES_IT = ("fork_and_follow", "fork_and_return", "exec", "exec_without_library", "send_away", "mode")


class Wrong(Exception):
    pass


def pattern(key):
    once = random.Random(key).randbytes(PERIOD)
    return once + once


class End:
    """The state of an end, which goes from process to process as JSON beside its descriptor."""

    def __init__(self, state, fd):
        self.__dict__.update(state)
        self.socket, self.pages = socket.socket(fileno=fd), None
        self.chance = random.Random(f"{self.seed} {self.role} {self.hops}")
        self.patterns = {way: pattern(f"{self.seed} {way}") for way in ("serve", "connect")}

    def state(self):
        return {"seed": self.seed, "role": self.role, "hops": self.hops + 1, "sent": self.sent, "received": self.received,
                "tricks": self.tricks, "moves": self.moves, "totals": self.totals}

    def bytes_of(self, way, position, count):
        start = position % PERIOD
        return self.patterns[way][start:start + min(count, PERIOD)]

    @property
    def peer(self):
        return "connect" if self.role == "serve" else "serve"

    def left(self):
        return self.totals[self.role] - self.sent, self.totals[self.peer] - self.received

    # ---- bytes

    def wait(self, wanted):
        """What is ready of `wanted`, a mask of poll's, told by whichever call."""
        fd, way = self.socket.fileno(), self.chance.choice(("poll", "select", "epoll", "edge"))
        if way == "select" and fd < 1024:
            reads, writes, _ = select.select([fd] if wanted & select.POLLIN else [], [fd] if wanted & select.POLLOUT else [], [], HANG)
            got = (select.POLLIN if reads else 0) | (select.POLLOUT if writes else 0)
        elif way in ("epoll", "edge"):
            with select.epoll() as waiter:
                waiter.register(fd, wanted | (select.EPOLLET if way == "edge" else 0))
                got = next((events for _, events in waiter.poll(HANG)), 0)
        else:
            waiter = select.poll()
            waiter.register(fd, wanted)
            got = next((events for _, events in waiter.poll(HANG * 1000)), 0)
        if not got:
            raise Wrong(f"{way} for {wanted} says nothing in {HANG} s")
        return got

    def send_some(self, most):
        data = self.bytes_of(self.role, self.sent, self.chance.choice((1, 7, 100, 1500, 9000, 40_000, 60_000)))[:most]
        fd, way = self.socket.fileno(), self.chance.choice(("send", "sendmsg", "write", "writev", "sendfile", "timed"))
        try:
            if way == "send":
                count = self.socket.send(data, socket.MSG_DONTWAIT)
            elif way == "sendmsg":
                cut = self.chance.randint(0, len(data))
                count = self.socket.sendmsg([data[:cut], data[cut:]], (), socket.MSG_DONTWAIT)
            elif way == "sendfile":
                os.set_blocking(fd, False)
                count = os.sendfile(fd, self.file(), self.sent % PERIOD, len(data))
            elif way == "timed":  # a blocking call, which may not be for ever: the peer may be in one, too
                os.set_blocking(fd, True)
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, self.chance.randint(1, 30_000)))
                count = self.socket.send(data)
            else:
                os.set_blocking(fd, False)
                count = os.write(fd, data) if way == "write" else os.writev(fd, [data[:len(data) // 2], data[len(data) // 2:]])
        except BlockingIOError:
            return
        self.sent += count

    def file(self):
        """Of what this end sends. It never changes: the kernel sends its pages themselves."""
        if self.pages is None:
            self.pages = os.memfd_create("soak")
            os.write(self.pages, self.patterns[self.role])
        return self.pages

    def receive_some(self, most):
        count = min(most, self.chance.choice((1, 13, 512, 4000, 30_000, 60_000)))
        fd, way = self.socket.fileno(), self.chance.choice(("recv", "peek", "recvmsg", "read", "readv", "blocking"))
        try:
            if way == "recv":
                data = self.socket.recv(count, socket.MSG_DONTWAIT)
            elif way == "peek":
                seen = self.socket.recv(count, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                data = self.socket.recv(len(seen), socket.MSG_DONTWAIT) if seen else seen
                if data != seen[:len(data)]:
                    raise Wrong("what was peeked is not what came")
            elif way == "recvmsg":
                data = self.socket.recvmsg(count, 0, socket.MSG_DONTWAIT)[0]
            elif way == "blocking":
                os.set_blocking(fd, True)
                data = self.socket.recv(count)
            else:
                os.set_blocking(fd, False)
                if way == "read":
                    data = os.read(fd, count)
                else:
                    pieces = bytearray(count // 2), bytearray(count - count // 2)
                    count = os.readv(fd, pieces)
                    data = b"".join(pieces)[:count]
        except BlockingIOError:
            return
        if not data:
            raise Wrong(f"the end after {self.received} bytes of {self.totals[self.peer]}")
        if data != self.bytes_of(self.peer, self.received, len(data)):
            at = self.patterns[self.peer].find(data[:64])
            raise Wrong(f"bytes {self.received} to {self.received + len(data)} are not what was sent: they begin with those that come "
                        f"{(at - self.received) % PERIOD} later, or {(self.received - at) % PERIOD} before" if at >= 0 else "with none")
        self.received += len(data)

    def turn(self):
        """Something sent, or received, or both."""
        to_send, to_receive = self.left()
        wanted = (select.POLLOUT if to_send else 0) | (select.POLLIN if to_receive else 0)
        ready = self.wait(wanted)
        if to_receive and ready & (select.POLLIN | select.POLLHUP | select.POLLERR):
            self.receive_some(to_receive)
        if to_send and ready & select.POLLOUT:
            self.send_some(to_send)

    def turns(self, count):
        for _ in range(count):
            if not any(self.left()):
                return
            self.turn()

    # ---- what programs do with sockets

    def move_to(self, fd):
        self.socket.close()
        self.socket = socket.socket(fileno=fd)

    def duplicate(self):
        self.move_to(os.dup(self.socket.fileno()))

    def duplicate_high(self):
        self.move_to(fcntl.fcntl(self.socket.fileno(), fcntl.F_DUPFD_CLOEXEC, self.chance.randint(50, 900)))

    def fork_and_follow(self):
        """The child goes on with the socket; this process is there until the child has ended."""
        child = os.fork()
        if child:
            if self.chance.random() < 0.5:
                self.socket.close()
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xff)
        self.chance.seed(f"{self.seed} {self.role} {self.hops} child")

    def fork_and_return(self):
        """The child uses the socket for a while, and gives it back."""
        back, told = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                self.turns(self.chance.randint(1, 30))
                os.write(told, json.dumps([self.sent, self.received]).encode())
                os._exit(0)
            except LOST:
                os.write(told, b"lost")
            except Exception as problem:  # pylint: disable=broad-except
                print(f"in a child: {problem!r}", flush=True)
            os._exit(1)
        os.close(told)
        said = os.read(back, 100)
        os.close(back)
        status = os.waitpid(child, 0)[1]
        if said == b"lost":
            raise ConnectionResetError
        if not said:
            raise Wrong(f"a child ended with {os.waitstatus_to_exitcode(status)}")
        self.sent, self.received = json.loads(said)

    def fork_idle(self):
        """A child that has a copy and lives for a moment, or longer than this process uses the socket."""
        lives = self.chance.choice((0, 0.01, 0.3))
        child = os.fork()
        if child == 0:
            if self.chance.random() < 0.5:
                self.socket.close()
            threading.Event().wait(lives)
            os._exit(0)
        if lives < 0.3:
            os.waitpid(child, 0)

    def spawn(self):
        if self.chance.random() < 0.5:
            os.waitpid(os.posix_spawn("/bin/true", ["true"], os.environ), 0)
        else:
            os.system("true")

    def thread(self):
        problem = []

        def other():
            try:
                self.turns(self.chance.randint(1, 30))
            except Exception as what:  # pylint: disable=broad-except
                problem.append(what)
        worker = threading.Thread(target=other)
        worker.start()
        worker.join()
        if problem:
            raise problem[0]

    def mode(self):
        """Of those for which a lane has to go."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)
        if min(self.left()) > 2 * PERIOD:
            self.turns(1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def nonblocking(self):
        fcntl.ioctl(self.socket.fileno(), 0x5421, array.array("i", [self.chance.randint(0, 1)]))  # FIONBIO

    def exec(self, preload=True):
        os.set_inheritable(self.socket.fileno(), True)
        env = dict(os.environ, LD_PRELOAD=os.environ[PRELOAD]) if preload and PRELOAD in os.environ else \
            {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        os.execve(sys.executable, [sys.executable, __file__, "on", json.dumps({**self.state(), "fd": self.socket.fileno()})], env)

    def exec_without_library(self):
        self.exec(False)

    def send_away(self):
        """To another process by SCM_RIGHTS; this one waits for it."""
        here, there = socket.socketpair()
        os.set_inheritable(there.fileno(), True)
        if (child := os.fork()) == 0:
            self.socket.close()
            here.close()
            state = json.dumps({**self.state(), "by": there.fileno()})
            os.execve(sys.executable, [sys.executable, __file__, "on", state], os.environ)
        there.close()
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self.socket.fileno()]))])
        self.socket.close()
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xff)

    # ---- a life

    def live(self):
        while any(self.left()):
            self.turns(self.chance.randint(1, 400))
            if self.tricks and all(self.left()):
                self.tricks -= 1
                trick = self.chance.choice(MOVES_IT if self.moves and self.chance.random() < 0.5 else KEEPS_ITS_SOCKET)
                if os.environ.get("SOAK_LOUD"):
                    print(f"{self.seed} {self.role} {os.getpid()} {trick} at {self.sent} {self.received}", file=sys.stderr, flush=True)
                getattr(self, trick)()
        # Each knows that the other has all before anybody shuts down.
        os.set_blocking(self.socket.fileno(), True)
        self.socket.settimeout(HANG)
        self.socket.sendall(b"!")
        if (last := self.socket.recv(1)) != b"!":
            raise Wrong(f"{last!r} for the last byte")
        self.socket.shutdown(socket.SHUT_WR)
        if (more := self.socket.recv(1)) != b"":
            raise Wrong(f"{more!r} behind the last byte")
        self.socket.close()


def run(state, fd):
    end = End(state, fd)
    try:
        end.live()
        print(f"ok {end.sent} {end.received}", flush=True)
        return 0
    except LOST:
        print(f"reset {end.sent} {end.received}", flush=True)
    except (Wrong, OSError) as problem:
        print(f"{end.role}, hop {end.hops}, at {end.sent} {end.received} of {end.totals}: {problem!r}", flush=True)
    return 1


def first_state(seed, role):
    chance = random.Random(seed)
    totals = {way: chance.choice((1_000_000, 8_000_000, 20_000_000)) + chance.randint(0, 100_000) for way in ("serve", "connect")}
    # Only one of the two hands its socket on: see the README, Limits.
    tricks = {way: chance.randint(0, 6) for way in ("serve", "connect")}
    moves = chance.choice(("serve", "connect"))
    return {"seed": seed, "role": role, "hops": 0, "sent": 0, "received": 0, "tricks": tricks[role], "moves": role == moves, "totals": totals}


def listener_at(address):
    listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    print(listener.getsockname()[1], flush=True)
    return listener


def pool(address):
    """Echoes to each what it sends until it ends in whichever way. Each line of input is answered by what the process holds."""
    listener = listener_at(address)
    while True:
        ready = select.select([listener, sys.stdin], [], [])[0]
        if sys.stdin in ready:
            if not sys.stdin.readline():
                return 0
            print(len(os.listdir("/proc/self/fd")), resource_kib(), flush=True)
        if listener in ready:
            connection = listener.accept()[0]
            try:
                while data := connection.recv(30_000):
                    connection.sendall(data)
            except LOST:
                pass
            connection.close()


def resource_kib():
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() // 1024


def main(role, *rest):
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if role == "pool":
        return pool(rest[0])
    if role == "on":
        state = json.loads(rest[0])
        fd = state.pop("fd", None)
        if (by := state.pop("by", None)) is not None:
            with socket.socket(fileno=by) as channel:
                fd = array.array("i", channel.recvmsg(1, socket.CMSG_SPACE(4))[1][0][2])[0]
        return run(state, fd)
    if role == "serve":
        with listener_at(rest[0]) as listener:
            listener.settimeout(HANG)
            try:
                connection = listener.accept()[0]
            except TimeoutError:  # its client was killed before it came
                print("reset 0 0")
                return 1
            connection.setblocking(True)
    else:
        host, _, port = rest[0].rpartition(":")
        try:
            connection = socket.create_connection((host, int(port)))
        except LOST:
            print("reset 0 0")
            return 1
    return run(first_state(rest[1], role), connection.detach())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
