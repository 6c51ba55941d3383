#!/usr/bin/env python3
"""stress-ng's stressors of sockets and of calls that take sockets, under the library: each verifies what it gets.

    stress_test.py --lib LIBRARY

sockabuse uses sockets as nobody should; sock, which sends and receives as programs do, must have had lanes. Its processes end
without a report, so that only the library's log tells.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile

from harness import Skip, enter_private_network, need

STRESSORS = ("sock", "sockmany", "sockfd", "sockabuse", "sockpair", "epoll", "poll", "sendfile", "splice")
SECONDS = 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lib", required=True)
    library = os.path.abspath(parser.parse_args().lib)
    try:
        enter_private_network()
        program = need("stress-ng")
    except Skip as reason:
        print(f"skipped: {reason}")
        return 77
    failed = []
    for stressor in STRESSORS:
        with tempfile.TemporaryDirectory(prefix="sdp-stress-") as folder:
            env = {k: v for k, v in os.environ.items() if not k.startswith("SDP_")}
            env.update(LD_PRELOAD=library, SDP_UPGRADE_MESSAGES="1", SDP_LOG="info")
            done = subprocess.run([program, f"--{stressor}", "2", "-t", str(SECONDS), "--verify", "--metrics-brief", "--temp-path", folder],
                                  env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  timeout=100, check=False)
        lanes = done.stdout.count(": lane up")
        turns = re.search(rf"metrc: \[\d+\] {stressor} +(\d+) ", done.stdout)
        good = done.returncode == 0 and turns and int(turns[1]) > 0 and (stressor != "sock" or lanes != 0)
        print(f"{stressor}: {turns[1] if turns else 'no'} turns, {lanes} lanes{'' if good else '  WRONG'}", flush=True)
        if not good:
            print(done.stdout, flush=True)
            failed.append(stressor)
    return 1 if failed else 0


sys.exit(main())
