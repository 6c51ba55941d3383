#!/usr/bin/env python3
"""Paths, devices, addresses and memory that fail in the middle of a transfer: every byte arrives, once, the connection lives on by TCP,
and when the fault is over a lane carries it again.

Two unmodified programs send each other numbered bytes, both ways or one, on the network that scripts/vm.d/network makes. When a lane
carries them the fault is made; then the stream must be whole, to its end. What counts as a fault must have been one, and what counts
as a lane must have carried bytes at both ends: `sdp stat` says so. A seed chooses direction, moment, side and length of the fault.
"""
import argparse
import hashlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

DEVICES = {"ib": ("rxe", ("v0", "v1"), ("10.77.0.1", "10.77.0.2"), "20"), "rnic": ("siw", ("v2", "v3"), ("10.77.1.1", "10.77.1.2"), "21"),
           "local": (None, (), ("127.0.0.1", "127.0.0.1"), None)}
ADDRESSES6 = {"ib": ("fd77::1", "fd77::2"), "rnic": ("fd77:1::1", "fd77:1::2")}
PATIENCE = 120  # seconds: a guest's clock runs much faster than its programs
BLOCK = 16384
NO_CAP_IPC_LOCK = ["setpriv", "--bounding-set=-ipc_lock"]  # who has it is not limited


def block(stream, number):
    return hashlib.shake_128(stream.encode() + number.to_bytes(8, "big")).digest(BLOCK)


def confine(limits):
    """This process, from here on: as=BYTES of address space more than it has, memlock=BYTES registered in all, nofile=N descriptors
    more."""
    for kind, value in (limit.split("=") for limit in limits):
        which, used = {"as": (resource.RLIMIT_AS, address_space()), "memlock": (resource.RLIMIT_MEMLOCK, 0),
                       "nofile": (resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) - 1)}[kind]
        resource.setrlimit(which, (used + int(value), resource.getrlimit(which)[1]))


def address_space(pid="self"):
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def flow(role, here, there, sends, *limits):
    """One program: reads to the end what the other sends, and sends, if it is to, until a line is on standard input."""
    family, *_, name = socket.getaddrinfo(here, 0)[0]  # with the link's number, if it is of one
    if role == "accept":
        listener = socket.create_server(name, family=family, dualstack_ipv6=here == "::")
        print(listener.getsockname()[1], flush=True)
        connection = listener.accept()[0]
    else:
        host, _, port = there.rpartition(":")
        connection = socket.create_connection((host, int(port)), source_address=name)
    begins, ends, sent, received, problem = threading.Event(), threading.Event(), 0, 0, []

    def write():
        nonlocal sent
        begins.wait()
        try:
            while sends == "yes" and (sent == 0 or not ends.is_set()):
                connection.sendall(block(role, sent))
                sent += 1
            ends.wait()
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            problem.append(f"send of block {sent}: {error!r}")
    threading.Thread(target=lambda: (sys.stdin.readline(), ends.set()), daemon=True).start()
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    confine(limits)
    print("connected", flush=True)
    begins.set()
    try:
        while True:
            data = b""
            while len(data) < BLOCK and (piece := connection.recv(BLOCK - len(data))):
                data += piece
            if not data:
                break
            if data != block("accept" if role == "connect" else "connect", received):
                raise ValueError(f"block {received} is not what was sent")
            received += 1
    except (OSError, ValueError) as error:
        problem.append(f"receive of block {received}: {error!r}")
    if not problem:
        writer.join()
    print("; ".join(problem) or f"ok {sent} {received}", flush=True)


class Ended(AssertionError):
    pass


class Flow:
    def __init__(self, args, seed, limited=(False, False), limit=None, confined=((), ())):
        self.transport, self.chance = args.transport, random.Random(f"{args.transport} {seed}")
        self.sdp = args.sdp
        near, far = ADDRESSES6[args.transport] if args.ipv6 else DEVICES[args.transport][2]
        sends = self.chance.choice([(True, True), (True, True), (True, False), (False, True)])
        self.active = [end for end in (0, 1) if sends[end]]
        env = dict(os.environ, LD_PRELOAD=args.lib, SDP_TRANSPORT=args.transport, SDP_LANE_TIMEOUT="1",
                   SDP_POLICY=self.chance.choice(["both", "sdp"]) if limit is None and not any(confined) else "both")

        def start(end, *what):
            command = [*(NO_CAP_IPC_LOCK if limited[end] else []), "/usr/bin/python3", __file__, *what, "yes" if sends[end] else "no",
                       *confined[end]]
            confine = (lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))) if limited[end] and limit is not None else None
            return subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=confine)
        server = start(1, "flow", "accept", far, "-")
        self.ends = [None, server]
        try:
            port = server.stdout.readline().strip()
            self.ends[0] = start(0, "flow", "connect", near, f"{far}:{port}")
            for end in self.ends:
                assert end.stdout.readline().strip() == "connected", "no connection"
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.ends:
            if process is not None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()

    def look(self):
        """What `sdp stat` says of both ends' connection; {} of one that has none yet."""
        pids = [end.pid for end in self.ends]
        shown = subprocess.run([self.sdp, "stat", "--json", *map(str, pids)], capture_output=True, check=False).stdout
        processes = json.loads(shown)["processes"] if shown else []
        found = [next((c for p in processes if p["pid"] == pid for c in p["connections"]), {}) for pid in pids]
        return found

    def await_(self, what, condition):
        deadline = time.monotonic() + PATIENCE
        while True:
            seen = self.look()
            if all(seen) and condition(seen):
                return seen
            if any(end.poll() is not None for end in self.ends):
                raise Ended(f"{what}: a program has ended: {self.last_words()}: {seen}")
            assert time.monotonic() < deadline, f"{what}: not in time: {seen}"
            time.sleep(0.05)

    def by_lane(self, seen):
        """Bytes that lanes have brought, by sender; None without a lane."""
        if any(c.get("transport") != self.transport for c in seen):
            return None
        return [seen[1 - end]["lane"]["bytes_received"] for end in (0, 1)]

    def await_lane(self, what):
        """Until lanes have brought something that they had not brought yet when we began, wherever something is sent."""
        first = []

        def carries(seen):
            now = self.by_lane(seen)
            if now is None:
                first.clear()
                return False
            if not first:
                first.extend(now)
            return all(now[end] >= first[end] + 4 * BLOCK for end in self.active)
        return self.await_(what, carries)

    def has_lane_at_all(self):
        """Both ends may have looked for it at different times: then the connection stays with TCP, or with policy sdp is refused."""
        def is_decided(seen):
            without = [c["reason"] not in ("below_threshold", "no_peer", "none", "pursued") for c in seen]
            given_up = all(c["reason"] == "no_peer" and sum(c["tcp"][b] for b in ("bytes_sent", "bytes_received")) > 1 << 27 for c in seen)
            return self.by_lane(seen) or any(without) or given_up
        try:
            return self.by_lane(self.await_("a lane or none", is_decided)) is not None
        except Ended as ended:
            if "ConnectionRefusedError" in str(ended):
                return False
            raise

    def last_words(self):
        return [end.stdout.read().strip() if end.poll() is not None else "?" for end in self.ends]

    def finish(self):
        words = []
        for end in self.ends:
            end.stdin.write("\n")
            end.stdin.flush()
        for end in self.ends:
            words.append(end.communicate(timeout=PATIENCE)[0].strip())
        assert all(w.startswith("ok") for w in words), f"{words}"
        (_, sent0, received0), (_, sent1, received1) = (w.split() for w in words)
        assert (sent0, sent1) == (received1, received0), f"{words}"
        return int(sent0) + int(sent1)


def call(*command):
    subprocess.run(command, check=True)


def failed(seen):
    return any(c["failures"]["lanes"] for c in seen)


def wait(flow, lane_fails):
    """As long as a fault lasts: until the lane has failed, or for a while that it may survive."""
    if lane_fails and flow.chance.random() < 0.6:
        flow.await_("the lane's failure", failed)
    else:
        time.sleep(flow.chance.uniform(0, 3))


def mend_routes(transport):
    """Those of a table of its own go with the link or the address; see scripts/vm.d/network."""
    _, interfaces, addresses, table = DEVICES[transport]
    for end in (0, 1):
        call("ip", "route", "replace", addresses[1 - end], "dev", interfaces[end], "src", addresses[end], "table", table)


def loss(flow):
    interfaces = DEVICES[flow.transport][1]
    for interface in interfaces:
        call("tc", "qdisc", "add", "dev", interface, "root", "netem", "loss", "100%")
    wait(flow, flow.transport == "ib")
    for interface in interfaces:
        call("tc", "qdisc", "del", "dev", interface, "root")


def late(flow):
    """What is acknowledged comes after the time-out, and something is lost beside it. With it Soft-RoCE may put a packet into a message twice."""
    def brought(seen):
        return sum(c[by]["bytes_received"] for c in seen for by in ("lane", "tcp"))
    interfaces = DEVICES[flow.transport][1]
    before = brought(flow.look())
    for interface in interfaces:
        call("tc", "qdisc", "add", "dev", interface, "root", "netem", "delay", "60ms", "limit", "100000", "loss", "2%")
    flow.await_("bytes, or the lane's failure", lambda seen: brought(seen) > before + (24 << 20) or failed(seen))
    for interface in interfaces:
        call("tc", "qdisc", "del", "dev", interface, "root")


def down(flow):
    interface = flow.chance.choice(DEVICES[flow.transport][1])
    call("ip", "link", "set", interface, "down")
    wait(flow, flow.transport == "ib")
    call("ip", "link", "set", interface, "up")
    mend_routes(flow.transport)


def address(flow):
    _, interfaces, addresses, _ = DEVICES[flow.transport]
    end = flow.chance.choice((0, 1))
    call("ip", "addr", "del", f"{addresses[end]}/24", "dev", interfaces[end])
    wait(flow, False)
    call("ip", "addr", "add", f"{addresses[end]}/24", "dev", interfaces[end])
    mend_routes(flow.transport)


def remove(transport, end):
    """The command cannot be ended while it waits: nothing here waits for it longer than it should take."""
    command = subprocess.Popen(["rdma", "link", "delete", f"{DEVICES[transport][0]}{end}"])
    assert command.wait(PATIENCE) == 0


def add(transport, end):
    kind, interfaces, _, _ = DEVICES[transport]
    call("rdma", "link", "add", f"{kind}{end}", "type", kind, "netdev", interfaces[end])


def removal(flow):
    end = flow.chance.choice((0, 1))
    remove(flow.transport, end)
    try:
        flow.await_("the lane's failure", failed)
    finally:
        add(flow.transport, end)


def memory(flow):
    """No memory may be registered any more when another lane is wanted."""
    end, limited = flow.chance.choice((0, 1)), flow.chance.choice((0, 1))
    process = flow.ends[limited]
    before = resource.prlimit(process.pid, resource.RLIMIT_MEMLOCK)
    resource.prlimit(process.pid, resource.RLIMIT_MEMLOCK, (0, before[1]))
    remove(flow.transport, end)
    try:
        flow.await_("the lane's failure", failed)
    finally:
        add(flow.transport, end)
    flow.await_("the reason", lambda seen: seen[limited]["reason"] == "no_resources")
    resource.prlimit(process.pid, resource.RLIMIT_MEMLOCK, before)


def stopped(flow):
    process = flow.chance.choice(flow.ends)
    process.send_signal(signal.SIGSTOP)
    time.sleep(flow.chance.uniform(1, 4))
    process.send_signal(signal.SIGCONT)


FAULTS = {"loss": loss, "late": late, "down": down, "address": address, "removal": removal, "memory": memory, "stopped": stopped}


def run_fault(args, name, seed):
    for _ in range(8):
        with Flow(args, f"{name} {seed}", (name == "memory",) * 2) as flow:
            if not flow.has_lane_at_all():
                continue  # both ends looked for it at different times
            flow.await_lane("the first lane")
            upto = flow.chance.randrange(1, 1 << 21)
            flow.await_("bytes by the lane", lambda seen: sum(c["lane"]["bytes_received"] for c in seen) > upto)
            FAULTS[name](flow)
            after = flow.await_lane("a lane after the fault")
            assert name != "stopped" or not failed(after), f"a stopped process is no fault of a lane's: {after}"
            return f"{flow.finish()} blocks of {BLOCK} bytes, lanes failed and returned: {[c['failures'] for c in after]}"
    raise AssertionError("no lane to begin with")


def run_killed(args, seed):
    """The end is told as an error, and soon."""
    for _ in range(8):
        with Flow(args, f"killed {seed}") as flow:
            if not flow.has_lane_at_all():
                continue
            flow.await_lane("the first lane")
            end = flow.chance.choice((0, 1))
            flow.ends[end].kill()
            told = flow.ends[1 - end].communicate(timeout=PATIENCE)[0].strip()
            assert "ConnectionResetError" in told or "BrokenPipeError" in told, told
            return told
    raise AssertionError("no lane to begin with")


def run_without_memory(args, seed):
    """From the beginning: TCP, and the reason at that end."""
    limited = random.Random(seed).choice((0, 1))
    with Flow(args, f"unregistered {seed}", (limited == 0, limited == 1), 0) as flow:
        flow.await_("the reason", lambda seen: seen[limited]["reason"] == "no_resources" and sum(seen[0]["lane"].values()) == 0)
        return f"{flow.finish()} blocks of {BLOCK} bytes by TCP"


def main():
    if sys.argv[1] == "flow":
        return flow(*sys.argv[2:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True, type=os.path.abspath)
    parser.add_argument("--sdp", required=True, type=os.path.abspath)
    parser.add_argument("--transport", choices=ADDRESSES6, required=True)
    parser.add_argument("--ipv6", action="store_true")
    parser.add_argument("--seed", type=int, default=1, help="the first")
    parser.add_argument("--seeds", type=int, default=1, help="how many: each makes every fault once")
    parser.add_argument("faults", nargs="*", help=f"of {[*FAULTS, 'killed', 'unregistered']}; all")
    args = parser.parse_args()
    special = {"killed": run_killed, "unregistered": run_without_memory}
    for seed in range(args.seed, args.seed + args.seeds):
        for name in args.faults or [*FAULTS, *special]:
            try:
                outcome = special[name](args, seed) if name in special else run_fault(args, name, seed)
            except AssertionError as problem:
                sys.exit(f"{name}, --seed {seed}: {problem}")
            print(f"{name}, seed {seed}: {outcome}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
