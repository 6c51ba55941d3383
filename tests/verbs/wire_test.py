#!/usr/bin/env python3
"""What lanes say on the wire, seen from outside: netperf over an RDMA device, captured by tcpdump, decoded by stock tshark.

    wire_test.py --lib LIBRARY --transport ib|rnic

Wireshark decodes Hello, Data, credits and DisConn; they keep SDP's rules (wire_check.py); and the messages hold every byte that the
library says its lanes have carried, TCP's connections none of them. The same capture with a message left out must not pass.
"""
import argparse
import glob
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter

import wire_check
from wire_check import ANSWERER, DATA, DIALLER, DISCONN, Violation

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "apps"))
from harness import SKIPPED, Skip, listening, need, wait_for  # noqa: E402

NETWORKS = {"ib": ("v0", "10.77.0.1", "10.77.0.2"), "rnic": ("v2", "10.77.1.1", "10.77.1.2")}
PORT = 12865
BUFFERS = 64  # SDP_RECV_BUFFERS
LAST_WORDS = b"the capture ends here"
SHIM = os.path.join(HERE, "..", "..", "scripts", "wireshark", "sdp_over_iwarp.lua")
# Policy sdp: the first byte waits for the lane, and TCP carries nothing at all. -l with a minus: so many transactions, or bytes.
SECONDS = object()  # as many as the lane needs to come, on a busy machine
RUNS = [("both", ["-t", "TCP_RR", "-l", "-2000"]),
        ("both", ["-t", "TCP_STREAM", "-l", SECONDS, "--", "-m", "2048"]),
        ("sdp", ["-t", "TCP_STREAM", "-l", "-4000000"]),
        ("sdp", ["-t", "TCP_RR", "-l", "-200", "--", "-r", "100,3000"])]


class Capture:
    """tcpdump on an interface. It is ended when it has written a datagram that was sent after everything else."""

    def __init__(self, interface, path, far):
        self.path, self.far = path, far
        self.log = path + ".log"
        with open(self.log, "wb") as log:
            command = [need("tcpdump"), "-i", interface, "-U", "-Z", "root", "-s", "0", "-B", "131072", "-w", path]
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            wait_for(lambda: "listening on" in self.said(), 30, "tcpdump")
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def said(self):
        with open(self.log, encoding="utf-8") as log:
            return log.read()

    def holds_last_words(self):
        with open(self.path, "rb") as file:
            file.seek(max(0, os.path.getsize(self.path) - 4096))
            return LAST_WORDS in file.read()

    def finish(self, complete):
        try:
            if complete:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
                    out.sendto(LAST_WORDS, (self.far, 9))
                wait_for(self.holds_last_words, 60, "the end of the capture")
        finally:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)
        assert not complete or "\n0 packets dropped by kernel" in self.said(), self.said()


def run_netperf(library, transport, policy, options, folder):
    """The reports of both ends; none if the lane was not there before the run was over."""
    _, near, far = NETWORKS[transport]
    os.mkdir(folder)
    stats = os.path.join(folder, "%p.json")
    env = dict(os.environ, LD_PRELOAD=library, SDP_TRANSPORT=transport, SDP_POLICY=policy, SDP_STATS=stats)
    server = subprocess.Popen(["netserver", "-D", "-4", "-L", near, "-p", str(PORT)], env=env, stdout=subprocess.DEVNULL)
    ends = []

    def reported():
        ends.clear()
        for path in glob.glob(os.path.join(folder, "*.json")):
            with open(path, encoding="utf-8") as file:
                ends.append(json.load(file))
        return len(ends) == 2
    try:
        wait_for(lambda: listening(PORT), 20, "netserver")
        command = ["netperf", "-P", "0", "-4", "-L", far, "-H", near, "-p", str(PORT), *options]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.returncode}: {done.stdout}{done.stderr}"
        wait_for(reported, 20, f"the reports of two ends, after {command}")
    finally:
        server.terminate()
        server.wait(30)
    lanes = {end["program"]: end["lanes"][transport] for end in ends}
    assert lanes["netperf"] == lanes["netserver"], f"lanes at one end only, after {command}: {ends}"
    return ends if lanes["netperf"] > 0 else []


def decode(capture, transport):
    fields = wire_check.ROCE_FIELDS if transport == "ib" else wire_check.IWARP_FIELDS
    command = [need("tshark"), "-2", "-r", capture, "-T", "fields", "-Y", "tcp or infiniband.bth.opcode != 17"]
    if transport == "rnic":
        command += ["-X", f"lua_script:{SHIM}", "--disable-heuristic", "rpcrdma_iwarp", "--disable-heuristic", "smb_direct_iwarp"]
    for field in fields:
        command += ["-e", field]
    env = dict(os.environ, HOME="/nonexistent")  # no settings of whoever runs this
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=200)
    return [dict(zip(fields, line.split("\t"))) for line in done.stdout.splitlines()]


def read_lanes(rows, transport):
    return wire_check.roce_lanes(rows) if transport == "ib" else (wire_check.iwarp_lanes(rows), None)


def address_of(text):
    host, port = text.rsplit(":", 1)
    return host, int(port)


def check(rows, transport, ends):
    lanes, offered = read_lanes(rows, transport)
    tcp = wire_check.anchors(rows)
    said = [(end, c) for end in ends for c in end["connections"] if c["transport"] == transport]
    carried, claimed = Counter(), Counter()
    for lane in lanes:
        summary = wire_check.check_lane(lane)
        address, port = summary.source
        assert (address, summary.destination) == NETWORKS[transport][1:], f"the accepted end dials: {summary}"
        assert DATA in summary.mids[DIALLER] + summary.mids[ANSWERER], f"a lane without Data: {summary}"
        if transport == "ib":
            wire_check.demand(port + (wire_check.SERVICE_PORTS if port < 1024 else 0) in offered, lane.messages[0].frame,
                              f"no offer was made to port {port}: {offered}")
        for side in (DIALLER, ANSWERER):
            carried[address, port, side] += summary.payload[side]
        own = [both for both in tcp if (address, port) in both]
        assert own, f"no TCP connection of {address}:{port}"
        if len(own) == 1:  # each run has a control connection to the same port
            wire_check.check_anchor(tcp[own[0]], lane, (address, port), BUFFERS)
        print(f"lane of {address}:{port}: {summary.mids[DIALLER] + summary.mids[ANSWERER]}, payload {summary.payload}")
    for end, c in said:
        here, there = address_of(c["local"]), address_of(c["remote"])
        dials = end["program"] == "netserver"  # who accepted the connection
        for side, direction in zip((DIALLER, ANSWERER) if dials else (ANSWERER, DIALLER), ("sent", "received")):
            claimed[(end["program"], *(here if dials else there), side)] += c["lane"][f"bytes_{direction}"]
        on_wire = tcp[frozenset((here, there))].bytes
        assert (on_wire[here], on_wire[there]) == (c["tcp"]["bytes_sent"], c["tcp"]["bytes_received"]), (on_wire, c)
    for program in ("netperf", "netserver"):
        mine = {key[1:]: count for key, count in claimed.items() if key[0] == program}
        assert mine == dict(carried), f"{program} says {mine}, the messages hold {dict(carried)}"
    mids = sum((sum(wire_check.check_lane(lane).mids, Counter()) for lane in lanes), Counter())
    assert mids[DISCONN] == 2 * len(lanes) and sum(carried.values()) > 1000000, (mids, carried)
    return lanes


def must_not_pass(messages, what):
    try:
        wire_check.check_lane(wire_check.Lane(messages))
    except Violation:
        return
    raise AssertionError(f"a capture passes {what}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True)
    parser.add_argument("--transport", choices=NETWORKS, required=True)
    args = parser.parse_args()
    need("tshark", "netperf", "netserver")
    interface, _, far = NETWORKS[args.transport]
    with tempfile.TemporaryDirectory(prefix="sdpreload-wire-") as folder:
        capture = Capture(interface, os.path.join(folder, "wire.pcap"), far)
        complete = False
        try:
            ends = []
            for at, (policy, options) in enumerate(RUNS):
                for seconds in (1, 2, 4, 8):
                    stats = os.path.join(folder, f"run{at}.{seconds}")
                    command = [str(seconds) if each is SECONDS else each for each in options]
                    both = run_netperf(os.path.abspath(args.lib), args.transport, policy, command, stats)
                    if both:
                        break
                assert both, f"four runs without a lane: {command}"
                ends += both
            complete = True
        finally:
            capture.finish(complete)
        rows = decode(capture.path, args.transport)
        for lane in check(rows, args.transport, ends):
            middle = len(lane.messages) // 2
            must_not_pass(lane.messages[:middle] + lane.messages[middle + 1:], f"without message {middle} of a lane")


if __name__ == "__main__":
    try:
        main()
    except Skip as why:
        print(f"skipped: {why}")
        sys.exit(SKIPPED)
