#!/usr/bin/env python3
"""A whole netperf run under SDP_PCAP, judged by stock tshark: does what was captured keep SDP's rules?

    pcap_test.py --lib LIBRARY

The rules are those of ../verbs/wire_check.py, for every message. And every byte that the lanes carried is there, in a message or, small
sends of a burst, in an RDMA READ Response.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter

from harness import enter_private_network, listening, need, wait_for

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "verbs"))
from wire_check import (ANSWERER, DATA, DIALLER, DISCONN, HELLO, HELLO_ACK, HELLO_FIELDS, SDP_FIELDS, Lane,  # noqa: E402
                        check_lane, message, number)

FIELDS = ["frame.number", "infiniband.bth.destqp", "infiniband.bth.padcnt", "udp.length", *SDP_FIELDS, *HELLO_FIELDS]
HEADERS = 8 + 12 + 4  # UDP, BTH, ICRC
LONGEST = 65000       # more does not go into the datagram that is made up for a message


def lanes_of(rows):
    """The control connection and the data connection may both have had a lane: a pair of QPs each, apart from the first Hello on."""
    lanes, directions = [], {}
    for row in rows:
        mid = number(row[SDP_FIELDS[0]])
        if mid == HELLO:
            lanes.append(Lane([]))
        if mid in (HELLO, HELLO_ACK):
            directions[row["infiniband.bth.destqp"]] = (lanes[-1], DIALLER if mid == HELLO else ANSWERER)
        lane, side = directions[row["infiniband.bth.destqp"]]
        made = message(row, number(row["frame.number"]), side)
        whole = made.length + HEADERS <= LONGEST
        made.on_wire = number(row["udp.length"]) - HEADERS - number(row["infiniband.bth.padcnt"]) if whole else made.length
        lane.messages.append(made)
    return lanes


def tshark(capture, env, which, fields):
    words = [word for field in fields for word in ("-e", field)]
    out = subprocess.run([need("tshark"), "-2", "-r", capture, "-Y", which, "-T", "fields", *words], env=env, capture_output=True, text=True, check=True)
    return [dict(zip(fields, line.split("\t"))) for line in out.stdout.splitlines()]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True)
    library = os.path.abspath(parser.parse_args().lib)
    enter_private_network()
    directory = tempfile.mkdtemp(prefix="sdpreload-pcap-")
    capture, stats = os.path.join(directory, "lane.pcapng"), os.path.join(directory, "stats.json")
    base = {k: v for k, v in os.environ.items() if not k.startswith("SDP_")}
    env = dict(base, LD_PRELOAD=library)
    server = subprocess.Popen(["netserver", "-D", "-4", "-p", "12865"], env=env, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: listening(12865), 20, "netserver")
        # -l with a minus: so many transactions, or bytes.
        for test, length, options in (("TCP_RR", "-20000", ["-r", "100,3000"]), ("TCP_STREAM", "-100000000", ["-m", "32000"]),
                                      ("TCP_STREAM", "-100000000", ["-m", "4000"])):
            subprocess.run(["netperf", "-P", "0", "-4", "-H", "127.0.0.1", "-p", "12865", "-l", length, "-t", test, "--", *options],
                           env=dict(env, SDP_PCAP=capture, SDP_STATS=stats), check=True, stdout=subprocess.DEVNULL)
            rows = tshark(capture, base, "infiniband_sdp && infiniband.bth.opcode in {0,4}", FIELDS)
            lanes = [check_lane(lane) for lane in lanes_of(rows)]
            counts = [sum(lane.mids, Counter()) for lane in lanes]
            # Headers of UDP, BTH and AETH, and the ICRC, are no payload.
            responses = tshark(capture, base, "infiniband.bth.opcode == 16", ["udp.length", "infiniband.bth.padcnt"])
            reads = [number(r["udp.length"]) - HEADERS - 4 - number(r["infiniband.bth.padcnt"]) for r in responses]
            # Which of the two carries large sends depends on how far behind the reader is; a burst is fetched, a request is a message.
            data = max(c.get(DATA, 0) for c in counts)
            assert {"100,3000": data, "32000": data + len(reads), "4000": len(reads)}[options[1]] > 1000, (counts, len(reads))
            assert test != "TCP_RR" or any(DISCONN in c for c in counts), counts  # said where no byte is left to be fetched
            messages = sum(sum(lane.payload) for lane in lanes)
            report = json.load(open(stats, encoding="utf-8"))["bytes"]["lane"]
            carried = report["sent"] + report["received"]
            assert messages + sum(reads) == carried, f"{messages} bytes in messages and {sum(reads)} in reads of {carried}"
            print(f"{test}: {len(rows)} messages keep the rules: {counts}; with {len(reads)} reads they hold all {carried} bytes")
            os.unlink(capture)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
