#!/usr/bin/env python3
"""Two processes of one host that share its network and not much else: each in a mount, pid, user, ipc, uts or cgroup namespace of its own,
without /dev/shm, in a root without /proc, as other users. Each pair carries every byte, by a lane or with a reason why not, hangs nowhere,
and leaves nothing in /dev/shm or among the Unix names.

    containers_test.py --lib LIBRARY --end PROGRAM
"""
import argparse
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile

import ends

SKIPPED = 77
ROOTS = ("host", "mount", "no /dev/shm", "pid", "ipc", "user", "container")  # how one user lives; no lane needs more of the rest
LIVES = {
    "host": [],
    "mount": ["unshare", "--mount"],
    "no /dev/shm": ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/shm && mount -o remount,ro /dev/shm && exec "$@"', "-"],
    "pid": ["unshare", "--pid", "--fork", "--mount-proc"],
    "ipc": ["unshare", "--ipc", "--uts", "--cgroup"],
    "user": ["unshare", "--user", "--map-root-user"],
    "user, overflow": ["unshare", "--user"],
    "container": ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--ipc", "--uts", "--user", "--map-root-user"],
    "nobody": ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"],
    "no /proc": ["unshare", "--mount", "sh", "-c", 'umount -l /proc; exec "$@"', "-"],
}


def names():
    with open("/proc/net/unix", encoding="ascii", errors="replace") as rows:
        abstract = {row.split()[-1] for row in rows if "@" in row}
    return abstract | set(os.listdir("/dev/shm"))


def run(lib, program, folder, lives):
    preload = [shutil.which("env"), f"LD_PRELOAD={lib}", f"SDP_STATS={folder}/ROLE.json", program]

    def start(role, port):
        command = [*LIVES[lives[role]], *(word.replace("ROLE", role) for word in preload), role, port, "none", "start"]
        return ends.start(command, ends.environment())

    server = start("server", "0")
    port = server.stdout.readline().strip()
    assert port.isdigit(), f"the server did not come up: {server.communicate(timeout=10)[1]}"
    ends.finish({"server": server, "client": start("client", port)})
    by = {}
    for role in lives:
        report = json.load(open(os.path.join(folder, f"{role}.json"), encoding="utf-8"))
        lanes, reasons = sum(report["lanes"].values()), report["reasons"]
        assert lanes == 1 or sum(reasons.values()) == 1 and "below_threshold" not in reasons, f"the {role}: {lanes} lanes, {reasons}"
        by[role] = "lane" if lanes else next(iter(reasons))
    return by


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True)
    parser.add_argument("--end", required=True)
    args = parser.parse_args()
    if os.getuid() == 0 and os.environ.get("SDP_TEST_NETNS") != "1":
        os.execvpe("unshare", ["unshare", "--net", sys.executable, *sys.argv], dict(os.environ, SDP_TEST_NETNS="1"))
    unshare = ["unshare", "--mount", "--pid", "--fork", "--user", "true"]
    if os.getuid() != 0 or subprocess.run(unshare, capture_output=True, check=False).returncode != 0:
        print("no namespaces to be had here")
        sys.exit(SKIPPED)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    failed = 0
    for server, client in itertools.product(LIVES, LIVES):
        with tempfile.TemporaryDirectory(prefix="sdpreload-containers-") as folder:
            os.chmod(folder, stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO)
            lib, end = shutil.copy(args.lib, folder), shutil.copy(args.end, folder)
            before = names()
            try:
                by = run(lib, end, folder, {"server": server, "client": client})
                print(f"{server} to {client}: {by}", flush=True)
                assert (by["server"] == "lane") == (by["client"] == "lane"), "a lane at one end"
                if {server, client} <= set(ROOTS) or server == client == "nobody":
                    assert by["server"] == "lane", "no lane"
                left = names() - before
                assert not left, f"left behind: {left}"
            except AssertionError as problem:
                failed += 1
                print(f"{server} to {client}: FAILED {problem}", flush=True)
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
