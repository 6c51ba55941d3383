#!/usr/bin/env python3
"""A whole netperf run under SDP_PCAP, judged by stock tshark: does what was captured keep SDP's rules?

    pcap_test.py --lib LIBRARY

Checked on every message that starts a packet: Hello and HelloAck come first, with fields that make sense; MSeq grows by one in each
direction; MSeqAck never exceeds what the other side has sent; Len is the length of the message; and no side sends with credits that it
does not have: Data with payload only with three or more before it. And every byte that the lanes carried is there, in a message or, small sends of a
burst, in an RDMA READ Response.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile

from harness import enter_private_network, listening, need, wait_for

FIELDS = ["infiniband_sdp.bsdh.mid", "infiniband_sdp.bsdh.flags", "infiniband_sdp.bsdh.bufs", "infiniband_sdp.bsdh.len",
          "infiniband_sdp.bsdh.mseq", "infiniband_sdp.bsdh.mseqack", "infiniband.bth.destqp", "udp.length",
          "infiniband_sdp.hh.majv", "infiniband_sdp.hh.ipv", "infiniband_sdp.hh.maxadverts", "infiniband_sdp.hh.localrcvsz"]
HELLO, HELLO_ACK, DISCONN, DATA = 0, 1, 2, 0xFF


def number(text):
    return int(text, 0) if text else None


def check(rows):
    """`rows` in the order of the capture. Each direction is known by the queue pair it goes to."""
    first, ack = rows[0], rows[1]
    assert first[0] == HELLO and first[3] == 68 and first[4] == first[5] == 0, f"no Hello: {first}"
    assert (first[8], first[9]) == (2, 4) and first[10] >= 1 and first[11] >= 256, f"odd Hello: {first}"
    assert ack[0] == HELLO_ACK and ack[3] == 24 and ack[4] == ack[5] == 0, f"no HelloAck: {ack}"
    active, passive = first[6], ack[6]
    assert active != passive
    sent = {active: 0, passive: 0}                       # MSeq of the last message to that QP
    limit = {active: ack[2], passive: first[2]}          # the highest MSeq that may go to that QP
    seen = {}
    for mid, _, bufs, length, mseq, mseqack, to, udp, *_ in rows[2:]:
        other = passive if to == active else active
        seen[mid] = seen.get(mid, 0) + 1
        credits = limit[to] - sent[to]
        payload = mid == DATA and length > 16
        assert credits >= (3 if payload else 1), f"message {mseq} with {credits} credits"
        assert mseq == sent[to] + 1, f"MSeq {mseq} after {sent[to]}"
        assert mseqack <= sent[other], f"MSeqAck {mseqack} of {sent[other]}"
        if length + 8 + 12 + 4 <= 65000:
            assert udp == 8 + 12 + length + (-length % 4) + 4, f"Len {length} in a UDP datagram of {udp}"
        sent[to] = mseq
        assert mseqack + bufs >= limit[other], "credits were taken back"
        limit[other] = mseqack + bufs
    return seen


def tshark(capture, env, which, fields):
    words = [word for field in fields for word in ("-e", field)]
    out = subprocess.run([need("tshark"), "-2", "-r", capture, "-Y", which, "-T", "fields", *words], env=env, capture_output=True, text=True, check=True)
    return [[number(v) for v in line.split("\t")] for line in out.stdout.splitlines()]


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
            lanes = {}
            rows = tshark(capture, base, "infiniband_sdp && infiniband.bth.opcode in {0,4}", FIELDS)
            # The control connection and the data connection may both have had a lane: a pair of QPs each, apart from the first Hello on.
            for row in rows:
                if row[0] == HELLO:
                    lanes[row[6]] = [row]
                elif row[0] == HELLO_ACK:
                    last = list(lanes)[-1]
                    lanes[last].append(row)
                    lanes[row[6]] = lanes[last]
                else:
                    lanes[row[6]].append(row)
            counts = [check(lane) for lane in {id(v): v for v in lanes.values()}.values()]
            # Headers of UDP, BTH and AETH, and the ICRC, are no payload.
            reads = [udp - 8 - 12 - 4 - 4 - pad for udp, pad in tshark(capture, base, "infiniband.bth.opcode == 16", ["udp.length", "infiniband.bth.padcnt"])]
            # Which of the two carries large sends depends on how far behind the reader is; a burst is fetched, a request is a message.
            data = max(c.get(DATA, 0) for c in counts)
            assert {"100,3000": data, "32000": data + len(reads), "4000": len(reads)}[options[1]] > 1000, (counts, len(reads))
            assert test != "TCP_RR" or any(DISCONN in c for c in counts), counts  # said where no byte is left to be fetched
            messages = sum(row[3] - 16 for row in rows if row[0] == DATA)
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
