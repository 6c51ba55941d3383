"""iperf3: one and four streams, reverse, both ways at once."""
import json

from harness import Failure, need
from . import Case

PROGRAM = ("iperf3", "iperf3")


def iperf3(*options):
    def run(r):
        program = need("iperf3")
        port = r.port()
        server = r.server([program, "-s", "-1", "-p", str(port)], port)
        done = r.client([program, "-c", r.address, "-p", str(port), "-t", str(r.seconds), "-J", *options])
        server.wait(20)  # -1: it ends by itself, and writes its report then
        result = json.loads(done.stdout)
        if "error" in result:
            raise Failure(result["error"])
        end = result["end"]
        names = ["sum"] + (["sum_bidir_reverse"] if "--bidir" in options else [])
        for name in names:
            sent = end[name.replace("sum", "sum_sent", 1)]["bytes"]
            received = end[name.replace("sum", "sum_received", 1)]["bytes"]
            if sent < 1 << 20 or received < 1 << 20:
                raise Failure(f"{name}: {sent} bytes sent, {received} received")
        return {"streams": len(end["streams"])}
    return run


CASES = [
    Case("iperf3_1", iperf3(), "one stream", payload=1 << 20, unread=16 << 20),
    Case("iperf3_4", iperf3("-P", "4"), "4 streams", payload=1 << 20, unread=16 << 20),
    Case("iperf3_reverse", iperf3("-R"), "reverse", payload=1 << 20, unread=16 << 20),
    Case("iperf3_bidir", iperf3("--bidir"), "both ways at once", payload=1 << 20, unread=16 << 20),
]
