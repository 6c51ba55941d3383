#!/usr/bin/env python3
"""Runs Debian's programs over plain TCP and over SDP and compares the outcome; says and proves who carried the bytes.

  run_app.py --lib FILE CASE...    each case four times: TCP, SDP, only the client preloaded, only the server preloaded
  run_app.py --plain CASE...       TCP only: checks the test itself
  run_app.py --list                names of the cases that are run with every test, one a line; --list-all: of those that are not, too
  run_app.py --transport ib ...    in the guest of scripts/vm, over its RDMA devices: TCP, and SDP from the first byte
      --policy both                SDP when the lane is up
"""
import argparse
import importlib
import json
import os
import sys
import time
import traceback

import harness
from harness import Failure, Late, Run, Skip

STRETCHES = (1, 4, 16)  # of what a case moves, until enough of it goes by lanes
MODULES = ("netperf", "iperf3", "sockperf", "redis_app", "nginx", "memcached", "postgres", "python_apps", "haproxy", "apache",
           "openssh", "rsync", "relays", "stunnel", "vsftpd", "static", "go", "node",
           "mariadb", "java", "rabbitmq", "openmpi")


def module(name):
    return importlib.import_module("programs." + name)


def cases():
    return {case.name: case for name in MODULES for case in module(name).CASES}


def report(path, name, result, share=None):
    """One line for table.py."""
    program, case = next((module(each).PROGRAM, case) for each in MODULES for case in module(each).CASES if case.name == name)
    with open(path, "a", encoding="utf-8") as out:
        out.write(json.dumps({"program": program, "what": case.what, "share": share, "result": result}) + "\n")


def one_run(case, kind, preloaded, args, stretch):
    """The outcome, and the part of all bytes that went by lanes."""
    run = Run(case.name, args.lib, preloaded, args.place.is_quick(kind), args.place, stretch)
    meter = args.place.meter()
    start = time.monotonic()
    try:
        outcome = case.run(run)
        run.stop()
        kernel = meter.delta() if meter else None
        reports = run.stats()
        proof = f"kernel {kernel}"
        if kernel and kind == "tcp" and case.payload:
            seen = kernel.get("lo_bytes", kernel["segments"] << 16)
            if seen < run.amount(case.payload):
                raise Failure(f"the meter saw {seen} bytes of at least {run.amount(case.payload)}")
        share = args.place.share(case)
        if kind == "sdp" and share is not None:
            proof = harness.prove_lanes(reports, kernel, share, args.place.transport, case.unread, case.lanes, case.unseen)
        elif kind == "sdp":
            proof = f"ours {harness.summarise(reports)}, {proof}"
            if not reports:
                raise Failure("no report was written: was the library loaded at all?")
        elif preloaded:
            proof = harness.prove_no_lanes(reports)
        print(f"{case.name}: {kind}: {time.monotonic() - start:.1f} s: {outcome}; {proof}", flush=True)
        total = harness.summarise(reports)
        return outcome, total["lane_sent"] / max(total["lane_sent"] + total["tcp_sent"], 1)
    except Failure as failure:
        raise type(failure)(f"{kind}: {failure}\n{run.logs()}") from None
    finally:
        try:
            run.stop()
        finally:
            run.cleanup()


def run_case(case, args, stretches=STRETCHES):
    """The part of the bytes that went by lanes, where all could; None: over TCP only."""
    plain, _ = one_run(case, "tcp", set(), args, stretches[0])
    shares = {}
    for kind, preloaded in args.place.runs.items() if not args.plain else ():
        try:
            outcome, shares[kind] = one_run(case, kind, preloaded, args, stretches[0])
        except Late as late:
            if len(stretches) == 1:
                raise
            print(f"{case.name}: {str(late).splitlines()[0]}\n{case.name}: with {stretches[1]} times as much", flush=True)
            return run_case(case, args, stretches[1:])
        if outcome != plain:
            raise Failure(f"{kind}: the outcome is {outcome}, over TCP it was {plain}")
    return shares.get("sdp")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lib", help="libsdpreload.so")
    parser.add_argument("--plain", action="store_true", help="over TCP only")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--list-all", action="store_true")
    parser.add_argument("--transport", choices=("local", "ib", "rnic"), default="local")
    parser.add_argument("--report", metavar="FILE", help="appends each case's result, for table.py")
    parser.add_argument("--policy", choices=("sdp", "both"), default="sdp", help="over RDMA devices")
    parser.add_argument("cases", nargs="*")
    args = parser.parse_args()
    known = cases()
    if args.list or args.list_all:
        print("\n".join(name for name, case in known.items() if args.list_all or not case.extra))
        return 0
    if not args.plain:
        if not args.lib or not os.path.exists(args.lib):
            parser.error("--lib FILE or --plain is needed")
        args.lib = os.path.abspath(args.lib)
    args.place = harness.Loopback() if args.transport == "local" else harness.Wire(args.transport, args.policy)
    try:
        args.place.enter()
    except Skip as skip:
        print(f"skipped: {skip}")
        return harness.SKIPPED
    status = 0
    skipped = 0
    for name in args.cases or known:
        if name not in known:
            parser.error(f"no case {name}; see --list")
        share = None
        try:
            share = run_case(known[name], args)
            result = "as on TCP"
            print(f"{name}: passed", flush=True)
        except Skip as skip:
            result = "not run"
            print(f"{name}: skipped: {skip}", flush=True)
            skipped += 1
        except Failure as failure:
            result = "FAILED"
            print(f"{name}: FAILED: {failure}", flush=True)
            status = 1
        except Exception:  # a mistake of the test itself: show where, and go on with the next case
            result = "FAILED"
            traceback.print_exc()
            print(f"{name}: FAILED", flush=True)
            status = 1
        if args.report:
            report(args.report, name, result, share)
    return status or (harness.SKIPPED if skipped == len(args.cases or known) else 0)


if __name__ == "__main__":
    sys.exit(main())
