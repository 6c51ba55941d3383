#!/usr/bin/env python3
"""Memory, address space and descriptors that run out, at the beginning, while a lane's buffers grow, or when another lane is wanted:
no byte is lost, the program lives on, and `sdp stat` says why there is no lane.

    limits_test.py --lib LIBRARY --sdp SDP --transport ib|rnic [CASE...]
"""
import argparse
import os
import resource
import subprocess
import sys

import fault_test
from fault_test import PATIENCE, Flow, add, address_space, remove

KIB, MIB = 1 << 10, 1 << 20
# From what is too little for a lane to what is enough: (how much, is it enough?). None: it depends, but nothing may break.
SWEEPS = {
    "memlock": ((0, False), (16 * KIB, False), (64 * KIB, False), (512 * KIB, None), (MIB, True), (2 * MIB, True), (64 * MIB, True)),
    "nofile": ((0, False), (1, False), (2, False), (3, False), (5, False), (8, False), (12, None), (16, None), (20, None), (64, True)),
    "as": ((0, False), (64 * KIB, False), (MIB, False), (4 * MIB, False), (16 * MIB, False), (48 * MIB, None), (1024 * MIB, True))}


def carried(seen):
    return sum(c[by]["bytes_received"] for c in seen for by in ("lane", "tcp"))


def sweep(args, kind):
    """So much from the beginning, at one end or the other."""
    for value, is_enough in SWEEPS[kind]:
        for end in (0, 1):
            confined = [(), ()]
            confined[end] = (f"{kind}={value}",)
            for attempt in range(4):  # both ends may look at different times
                seed = f"{kind} {value} {end} {attempt}"
                with Flow(args, seed, tuple(kind == "memlock" and each == end for each in (0, 1)), confined=confined) as flow:
                    has_lane = flow.has_lane_at_all()
                    if not has_lane:
                        flow.await_("the reason", lambda seen: seen[end]["reason"] == "no_resources" or is_enough is not False)
                    first = carried(flow.look())
                    seen = flow.await_("more bytes", lambda seen: carried(seen) > first + 8 * MIB)
                    blocks = flow.finish()
                if has_lane or not is_enough:
                    break
            assert is_enough is None or has_lane == is_enough, f"{kind}, {value} at end {end}: {seen}"
            by_lane = [c["lane"]["bytes_received"] // KIB for c in seen]
            print(f"{kind}, {value} at end {end}: {[c['reason'] for c in seen]}, {blocks} blocks, {by_lane} KiB by lanes", flush=True)


def limit_now(kind, pid):
    """From here on the process gets no more. Returns what ends that."""
    first_free = next(number for number in range(1 << 16) if not os.path.lexists(f"/proc/{pid}/fd/{number}"))
    which, used = {"memlock": (resource.RLIMIT_MEMLOCK, 0), "as": (resource.RLIMIT_AS, address_space(pid)),
                   "nofile": (resource.RLIMIT_NOFILE, first_free)}[kind]
    before = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (used, before[1]))
    return lambda: resource.prlimit(pid, which, before)


def middle(args, kind):
    """When a lane has failed and another is wanted: TCP, and the reason, until there is enough again."""
    for seed in range(8):
        with Flow(args, f"middle {kind} {seed}", (kind == "memlock",) * 2) as flow:
            if not flow.has_lane_at_all():
                continue
            flow.await_lane("the first lane")
            limited = flow.chance.choice((0, 1))
            remove(args.transport, limited)
            try:
                flow.await_("the lane's failure", fault_test.failed)
                end_limit = limit_now(kind, flow.ends[limited].pid)
            finally:
                add(args.transport, limited)
            flow.await_("the reason", lambda seen: seen[limited]["reason"] == "no_resources")
            end_limit()
            after = flow.await_lane("a lane after the limit")
            print(f"{kind} in the middle: {flow.finish()} blocks, {[c['failures'] for c in after]}", flush=True)
            return
    raise AssertionError("no lane to begin with")


def strict(args, _kind):
    """The policy sdp where no lane can be made: an error and no wait for ever, at the end that has too little."""
    env = dict(os.environ, LD_PRELOAD=args.lib, SDP_TRANSPORT=args.transport, SDP_POLICY="sdp")
    near = fault_test.DEVICES[args.transport][2][0]
    program = ("import errno, resource, socket, sys; listener = socket.create_server((sys.argv[1], 0)); "
               "mine = socket.create_connection(listener.getsockname()); other = listener.accept()[0]; "
               "resource.setrlimit(resource.RLIMIT_NOFILE, (other.fileno() + 1 + int(sys.argv[2]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
               "try: mine.sendall(b'x')\nexcept ConnectionRefusedError: print('refused')")
    for more in (0, 1, 2, 3):
        done = subprocess.run(["/usr/bin/python3", "-c", program, near, str(more)], env=env, text=True, stdout=subprocess.PIPE,
                              timeout=PATIENCE, check=True)
        assert done.stdout == "refused\n", f"with {more} descriptors: {done.stdout!r}"
    print("strict: refused", flush=True)


CASES = {**{kind: sweep for kind in SWEEPS}, "middle_memlock": middle, "middle_as": middle, "middle_nofile": middle, "strict": strict}
LOCAL = ("nofile", "strict")  # what also is to hold without an RDMA device


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True, type=os.path.abspath)
    parser.add_argument("--sdp", required=True, type=os.path.abspath)
    parser.add_argument("--transport", choices=fault_test.DEVICES, required=True)
    parser.add_argument("cases", nargs="*", help=f"of {[*CASES]}; all")
    args = parser.parse_args()
    args.ipv6 = False
    for name in args.cases or (LOCAL if args.transport == "local" else CASES):
        CASES[name](args, name.removeprefix("middle_"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
