#!/usr/bin/env python3
"""netperf over an RDMA device, on the network that scripts/vm.d/network makes: a server that forks for each connection, unmodified.
With --delayed every packet is some milliseconds under way: what the sender had for sent, it may use again before it has arrived.

With --hosts on two machines instead, by scripts/vm pair: the server on the second, which waits to be ended with it.

Each test must have had a lane of that transport at both ends, which carried the same bytes at both: what TCP carried alone fails. Of two
machines the first sees its own end only; two that are emulated on one are slow, and a lane may come too late for a test of some seconds.
"""
import argparse
import glob
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time

ADDRESSES = {"ib": ("10.77.0.1", "10.77.0.2"), "rnic": ("10.77.1.1", "10.77.1.2")}
PORT = "12865"


def reports(folder, program):
    for path in glob.glob(os.path.join(folder, "*.json")):
        with open(path, encoding="utf-8") as f:
            report = json.load(f)
        if report["program"] == program:
            yield report


def start_server(env, address):
    server = subprocess.Popen(["netserver", "-D", "-4", "-L", address, "-p", PORT], env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    listening = f"{int.from_bytes(socket.inet_aton(address), sys.byteorder):08X}:{int(PORT):04X} 00000000:0000 0A"
    while listening not in open("/proc/net/tcp", encoding="ascii").read():
        assert server.poll() is None and time.monotonic() < deadline, "netserver does not listen"
        time.sleep(0.05)
    return server


def has(transport):
    return bool(glob.glob("/sys/class/infiniband/" + {"ib": "rxe*", "rnic": "siw*"}[transport]))


def environment(library, transport, folder):
    return dict(os.environ, LD_PRELOAD=library, SDP_TRANSPORT=transport, SDP_STATS=os.path.join(folder, "%p.json"))


def run_client(env, own, server, test, seconds):
    command = ["netperf", "-4", "-L", own, "-H", server, "-p", PORT, "-l", seconds, "-t", test]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{test}: {done.returncode}: {done.stdout}{done.stderr}"
    return done


def serve_for_ever(library):
    with tempfile.TemporaryDirectory(prefix="sdpreload-netperf-") as folder:
        servers = [start_server(environment(library, transport, folder), far) for transport, (_, far) in ADDRESSES.items()]
        for server in servers:
            server.wait()


def run_between_hosts(library, transport, test):
    near, far = ADDRESSES[transport]
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection((far, int(PORT)), timeout=5).close()
            break
        except OSError:
            assert time.monotonic() < deadline, "the other machine does not answer"
            time.sleep(0.1)
    for _ in range(5):
        with tempfile.TemporaryDirectory(prefix="sdpreload-netperf-") as folder:
            run_client(environment(library, transport, folder), near, far, test, "4")
            (report,) = reports(folder, "netperf")
        lane = report["bytes"]["lane"]
        print(f"{transport} {test}: {report['lanes'][transport]} lanes: {lane}, else {report['reasons']}", flush=True)
        if report["lanes"][transport] > 0 and lane["sent"] + lane["received"] > 100:
            return
    assert False, f"{transport} {test}: no lane carried anything"


def run(library, transport, test):
    for seconds in (2, 4, 8):  # the lane may come late on a busy machine
        if run_here(library, transport, test, seconds):
            return
    assert False, f"{test}: no lane carried anything"


def run_here(library, transport, test, seconds):
    """False: the lane came too late for a test that is so short."""
    near, far = ADDRESSES[transport]
    with tempfile.TemporaryDirectory(prefix="sdpreload-netperf-") as folder:
        env = environment(library, transport, folder)
        server = start_server(env, near)
        try:
            done = run_client(env, far, near, test, str(seconds))
        finally:
            server.terminate()
            server.wait(30)
        deadline = time.monotonic() + 20
        while True:  # the server's child says what it has done when its end of the lane is over
            ends = [r for name in ("netperf", "netserver") for r in reports(folder, name) if r["lanes"][transport] > 0]
            if len(ends) == 2 or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    if not ends:
        print(f"{test}: no lane: {done.stderr}", flush=True)
        return False
    assert len(ends) == 2, f"{test}: lanes at {len(ends)} ends: {done.stderr}"
    lane = [end["bytes"]["lane"] for end in ends]
    if lane[0]["sent"] + lane[0]["received"] <= 100:
        print(f"{test}: the lane carried nothing: {lane}", flush=True)
        return False
    if test != "TCP_MAERTS":  # whose client stops reading when the time is over
        assert lane[0]["sent"] == lane[1]["received"], f"{test}: {lane}"
    if test != "TCP_STREAM":
        assert lane[1]["sent"] >= lane[0]["received"], f"{test}: {lane}"
    print(f"{test}: {lane[0]}", flush=True)
    return True


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--transport", choices=ADDRESSES)
    what.add_argument("--hosts", action="store_true")
    parser.add_argument("--delayed", action="store_true")
    args = parser.parse_args()
    library = os.path.abspath(args.lib)
    if shutil.which("netperf") is None:
        print("netperf is not installed")
        return 77
    if args.hosts and os.environ["SDPVM_HOST"] == "2":
        serve_for_ever(library)
    links = {"ib": ("v0", "v1"), "rnic": ("v2", "v3")}[args.transport] if args.delayed else ()
    for link in links:
        subprocess.run(["tc", "qdisc", "add", "dev", link, "root", "netem", "delay", "5ms"], check=True)
    try:
        for transport in filter(has, ADDRESSES) if args.hosts else [args.transport]:
            for test in ("TCP_STREAM", "TCP_MAERTS", "TCP_RR"):
                (run_between_hosts if args.hosts else run)(library, transport, test)
    finally:
        for link in links:
            subprocess.run(["tc", "qdisc", "delete", "dev", link, "root"], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
