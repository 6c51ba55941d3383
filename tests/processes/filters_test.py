#!/usr/bin/env python3
"""Both ends run under a filter (seccomp) that answers EPERM or ENOSYS to one of the system calls that the library makes and the program
does not, as containers and services have them. Every byte comes, nobody hangs, and each end has a lane or says why not. With the policy
sdp, where there can be no lane, the connection is refused.

    filters_test.py --lib LIBRARY --end PROGRAM --filtered PROGRAM
"""
import argparse
import errno
import itertools
import json
import os
import sys
import tempfile

import ends

SKIPPED = 77
# x86-64's numbers of what the library calls between two processes of one host. Not there: futex, without which libc ends the program, getpid
# (the name of the report), and what libc itself needs before main.
CALLS = {"poll": 7, "rt_sigaction": 13, "rt_sigprocmask": 14, "ioctl": 16, "sched_yield": 24, "madvise": 28, "sendmsg": 46,
         "recvmsg": 47, "getpeername": 52, "socketpair": 53, "clone": 56, "fcntl": 72, "ftruncate": 77, "fchmod": 91, "geteuid": 107, "sigaltstack": 131, "fstatfs": 138,
         "getpriority": 140, "gettid": 186, "sched_getaffinity": 204, "clock_gettime": 228, "epoll_ctl": 233, "tgkill": 234, "readlinkat": 267,
         "epoll_pwait": 281, "accept4": 288, "eventfd2": 290, "epoll_create1": 291, "process_vm_readv": 310, "process_vm_writev": 311,
         "sched_setattr": 314, "getrandom": 318, "memfd_create": 319, "membarrier": 324, "clone3": 435, "faccessat2": 439}
# Without it the library has no memory that a fork wipes, and knows no connection at all: it says that.
UNTRACKED = {"madvise"}
OF_THE_PROGRAM_TOO = {"shutdown": 48}  # at its end: only what is refused before can be looked at


def run(args, folder, number, error, policy="both"):
    """Both ends' reports and what they said, by role."""
    env = ends.environment(LD_PRELOAD=os.path.abspath(args.lib), SDP_STATS=os.path.join(folder, "%p.json"), SDP_POLICY=policy)

    def start(role, port):
        command = [args.filtered, str(number), str(error), args.end, role, port, "none", "start"]
        return ends.start(command, env)

    server = start("server", "0")
    port = server.stdout.readline().strip()
    if not port and server.wait(10) == SKIPPED:
        return None
    both = {"server": server, "client": start("client", port)}
    said = ends.finish(both, 0 if policy == "both" else 1)
    return {role: (json.load(open(os.path.join(folder, f"{end.pid}.json"), encoding="utf-8")), said[role]) for role, end in both.items()}


def check(outcome, name):
    by_lane = True
    for role, (report, said) in outcome.items():
        lanes, reasons = sum(report["lanes"].values()), report["reasons"]
        by_lane = by_lane and lanes == 1
        if name in UNTRACKED and report["sockets"] == 0:
            assert "stay on TCP" in said, f"the {role} says nothing"
            continue
        assert lanes == 1 or sum(reasons.values()) == 1, f"the {role}: {report}"
        assert "below_threshold" not in reasons and "pursued" not in reasons, f"the {role} says {reasons}"
    return "a lane" if by_lane else "TCP"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True)
    parser.add_argument("--end", required=True)
    parser.add_argument("--filtered", required=True)
    args = parser.parse_args()
    failed = 0
    cases = [(*case, "both") for case in itertools.product(CALLS, (errno.EPERM, errno.ENOSYS))]
    cases += [(name, errno.EPERM, "sdp") for name in ("socketpair", "shutdown", "eventfd2", "epoll_ctl", "epoll_pwait", "memfd_create", "clone3")]
    for name, error, policy in cases:
        label = f"{name} is {errno.errorcode[error]}, policy {policy}"
        with tempfile.TemporaryDirectory(prefix="sdpreload-filters-") as folder:
            try:
                outcome = run(args, folder, (CALLS | OF_THE_PROGRAM_TOO)[name], error, policy)
                if outcome is None:
                    sys.exit(SKIPPED)
                print(f"{label}: {f'every byte, by {check(outcome, name)}' if policy == 'both' else 'refused'}", flush=True)
            except AssertionError as problem:
                failed += 1
                print(f"{label}: {problem}", flush=True)
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
