"""netperf with netserver, which forks for each test."""
import re

from harness import Failure, need
from . import Case

PROGRAM = ("netperf", "netperf")


def netperf(test, *extra, file_bytes=0):
    def run(r):
        client, server = need("netperf", "netserver")
        port = r.port()
        r.server([server, "-D", r.family, "-p", str(port)], port)
        data = ["-P", f"0,{r.port()}"] if test != "TCP_CRR" else []  # whose data connections each have a port of their own
        file = ["-F", r.random_file("data", r.amount(file_bytes))] if file_bytes else []
        out = r.client([client, r.family, "-H", r.address, "-p", str(port), "-t", test, "-l", str(r.seconds), "-P", "0", *file,
                        "--", *data, *extra]).stdout
        rates = [float(x) for x in re.findall(r"\d+\.\d+", out)]
        if not rates or max(rates) <= 0:
            raise Failure(f"no result in {out!r}")
        return "a result"
    return run


CASES = [
    Case("netperf_tcp_stream", netperf("TCP_STREAM", "-m", "16384"), "TCP_STREAM; netserver forks for each test", payload=1 << 20),
    Case("netperf_tcp_maerts", netperf("TCP_MAERTS"), "TCP_MAERTS", payload=1 << 20, unread=4 << 20),  # its reader ends first: what buffers hold
    Case("netperf_tcp_rr", netperf("TCP_RR", "-r", "1,1"), "TCP_RR", payload=1 << 16),
    Case("netperf_tcp_crr", netperf("TCP_CRR", "-r", "1,1"), "TCP_CRR: over before a lane would pay", share=None),
    Case("netperf_tcp_sendfile", netperf("TCP_SENDFILE", file_bytes=10 << 20), "TCP_SENDFILE", payload=1 << 20),
]
