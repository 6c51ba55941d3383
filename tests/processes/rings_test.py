#!/usr/bin/env python3
"""Connections that go through libc for a while and then through an io_uring, made by liburing, by libc's syscall(), or by an instruction
that nobody sees, or through sends by such instructions; before there is a connection, after, or when a lane carries it; at either end or
both. Every byte must come, in its place, nobody may hang, and the end with the ring says why it has no lane. A ring of liburing's that
serves files only leaves the lane where it is, until the socket is handed to it.

    rings_test.py --lib LIBRARY --end PROGRAM
"""
import argparse
import itertools
import json
import os
import sys
import tempfile

import ends

SKIPPED = 77
DOORS = ("liburing", "number", "instruction")
WHENS = ("start", "connected", "laned")
SIDES = (("server",), ("client",), ("server", "client"))


def run(program, folder, door, when, sides, lib, settings):
    """Both ends' reports, by role."""
    ours = {"LD_PRELOAD": lib, "SDP_STATS": os.path.join(folder, "%p.json"), **settings} if lib else {}

    def start(role, port):
        mine = door if role in sides else "none"
        return ends.start([program, role, port, mine, when], ends.environment(**ours))

    server = start("server", "0")
    port = server.stdout.readline().strip()
    if not port:
        server.wait(10)
        return None
    both = {"server": server, "client": start("client", port)}
    ends.finish(both, excused=SKIPPED)
    if any(end.returncode == SKIPPED for end in both.values()):
        return None
    if not lib:
        return {}
    return {role: json.load(open(os.path.join(folder, f"{end.pid}.json"), encoding="utf-8")) for role, end in both.items()}


def check(reports, door, when, sides, settings):
    ignored = settings.get("SDP_IO_URING") == "ignore"
    for role, report in reports.items():
        lanes, reasons = sum(report["lanes"].values()), report["reasons"]
        files_only = when == "files" and door == "liburing"
        if when in ("laned", "unread", "turned") or files_only or ignored:
            assert lanes == 1, f"the {role} had no lane: {report}"
        else:
            assert lanes == 0, f"the {role} had a lane beside a ring: {report}"
        # What goes past us may end the lane before the library has looked why, and at the other end it is the peer that ends it.
        expected = {"io_uring"} if role in sides and door != "past" and not files_only else set()
        if when in ("laned", "turned") and (not expected or door == "instruction"):
            expected |= {"foreign_use", "refused"}
        if expected and not ignored:
            assert sum(reasons.get(reason, 0) for reason in expected) == 1, f"the {role} says {reasons}"
        if ignored:
            assert "io_uring" not in reasons, f"the {role} says {reasons}"
        if files_only:
            assert set(reasons) <= {"peer_gone", "closed"}, f"the {role} says {reasons}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib")
    parser.add_argument("--end", required=True)
    args = parser.parse_args()
    lib = os.path.abspath(args.lib) if args.lib else None
    # A ring of liburing's matters only as it is handed the socket.
    cases = [(*case, {}) for case in itertools.product(DOORS, WHENS, SIDES) if case[0] != "liburing" or case[1] == "laned"]
    cases += [("past", "laned", sides, {}) for sides in SIDES]
    cases += [("table", "laned", sides, {}) for sides in SIDES]
    cases += [("liburing", "files", sides, {}) for sides in SIDES]
    cases += [(door, "turned", sides, {}) for door in ("liburing", "table") for sides in SIDES]
    cases += [("number", "files", ("server", "client"), {})]
    if lib:
        cases += [(door, "unread", ("server", "client"), {}) for door in ("liburing", "number")]
        cases += [(door, "idle", ("server", "client"), {"SDP_IO_URING": "ignore"}) for door in DOORS]
    done = failed = 0
    for door, when, sides, settings in cases:
        with tempfile.TemporaryDirectory(prefix="sdpreload-rings-") as folder:
            case = f"{door}, {when}, at {' and '.join(sides)}{', ignored' if settings else ''}"
            try:
                reports = run(args.end, folder, door, when, sides, lib, settings)
                if reports is not None:
                    check(reports, door, when, sides, settings)
                    done += 1
                print(f"{case}: {'no such ring here' if reports is None else 'every byte'}", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"{case}: {error}", flush=True)
    sys.exit(1 if failed else 0 if done else SKIPPED)


if __name__ == "__main__":
    main()
