#!/usr/bin/env python3
"""Runs every case on kernel TCP and with the library in each way, and compares the traces.

  run_differential.py --program FILE --lib FILE [--only ways] [CASE...]
  run_differential.py --program FILE --list

Ways: lane and lane-accept (both ends preloaded, the case connects or accepts; the case waits until a lane carries its connection, and
the library's report must agree), lane-ipv6 and lane-mapped (over IPv6, and by IPv4 to an IPv6 listener), near and far (only the case's end, only the peer's end), tcp-policy (the library loaded, switched off).
"""
import argparse
import difflib
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile

# way -> (case preloaded, peer preloaded, lane expected, environment of both, part of it that TCP's own run has too)
WAYS = {
    "lane": (True, True, True, {}, {}),
    "lane-accept": (True, True, True, {}, {"ROLE_ACCEPT": "1"}),
    "lane-ipv6": (True, True, True, {}, {"FAMILY": "6"}),
    "lane-mapped": (True, True, True, {}, {"FAMILY": "mapped", "ROLE_ACCEPT": "1"}),
    "lane-in-place": (True, True, True, {"SDP_ZCOPY_THRESHOLD": "64K"}, {}),
    "near": (True, False, False, {}, {}),
    "far": (False, True, False, {}, {}),
    "tcp-policy": (True, True, False, {"SDP_POLICY": "tcp"}, {}),
}


def run(program, case, lib, near, far, lane, extra):
    folder = tempfile.mkdtemp(prefix="sdp-diff-")
    env = {k: v for k, v in os.environ.items() if not k.startswith("SDP_") and k not in ("LD_PRELOAD", "LANE_EXPECTED", "ROLE_ACCEPT", "FAMILY")}
    env.update({"LC_ALL": "C", "SDP_STATS": os.path.join(folder, "%p.json"), "SDP_UPGRADE_MESSAGES": "1", "DIFF_DIR": folder})
    env.update(extra)
    if near:
        env["LD_PRELOAD"] = lib
    if far:
        env["PEER_PRELOAD"] = lib
    if lane:
        env["LANE_EXPECTED"] = "1"
    process = subprocess.Popen([program, case], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, errors="backslashreplace", start_new_session=True, cwd=folder)
    try:
        out, err = process.communicate(timeout=60)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        status = "did not end in 60 s"
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    lanes = 0
    for path in glob.glob(os.path.join(folder, "*.json")):
        try:
            with open(path, encoding="utf-8") as report:
                report = json.load(report)
            lanes += report["bytes"]["lane"]["sent"] + report["bytes"]["lane"]["received"]
        except (ValueError, KeyError) as error:
            err += f"\n{path}: no report: {error}"
    shutil.rmtree(folder, ignore_errors=True)
    return out + f"[status {status}]\n", err, lanes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True)
    parser.add_argument("--lib")
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--show", action="store_true", help="print TCP's trace of each case")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("cases", nargs="*")
    args = parser.parse_args()
    listed = subprocess.run([args.program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    if args.list:
        print("\n".join(listed))
        return 0
    failures = 0
    for case in args.cases or listed:
        # Names say what a case is about: self_ has both ends in the process, any_ needs no lane to come up, tcp_ must not have one.
        plain = {}  # by the environment
        verdicts = []
        for way in args.only.split(","):
            near, far, lane, extra, shared = WAYS[way]
            if case.startswith("self_") and way in ("lane-accept", "far", "near"):
                continue
            if case.startswith("tcp_") and lane:
                continue
            key = tuple(shared.items())
            if key not in plain:
                plain[key], plain_err, _ = run(args.program, case, args.lib, False, False, False, shared)
                if args.show:
                    print(plain[key])
            expected = plain[key]
            if "[status 0]" not in expected or "FAILED" in expected:
                print(f"{case}, {way}: broken on TCP itself:\n{expected}{plain_err}")
                failures += 1
                continue
            lane = lane and not case.startswith("any_")
            trace, err, carried = run(args.program, case, args.lib, near, far, lane, extra | shared)
            problem = ""
            if trace != expected:
                problem = "".join(difflib.unified_diff(expected.splitlines(True), trace.splitlines(True), "tcp", way, n=1))
            elif lane and not carried:
                problem = "the reports know of no byte on a lane\n"
            elif not lane and carried and not case.startswith("any_"):
                problem = f"{carried} bytes on a lane, where there should be none\n"
            if problem:
                failures += 1
                verdicts.append(f"{way} DIFFERS")
                print(f"--- {case}, {way}:\n{problem}{err[-1500:]}")
            else:
                verdicts.append(way)
        print(f"{case}: {', '.join(verdicts)}", flush=True)
    if failures:
        print(f"{failures} differ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
