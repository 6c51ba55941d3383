"""sockperf: latency of single messages, and a stream of them. It counts what was dropped, doubled and out of order."""
import re
import signal

from harness import Failure, need
from . import Case

PROGRAM = ("sockperf", "sockperf")


def sockperf(mode, *options):
    def run(r):
        program = need("sockperf")
        port = r.port()
        r.server([program, "server", "--tcp", "-i", r.address, "-p", str(port)], port, stop=signal.SIGINT)
        out = r.client([program, mode, "--tcp", "-i", r.address, "-p", str(port), "-t", str(r.seconds), *options]).stdout
        out = re.sub(r"\x1b\[[0-9;]*m", "", out)
        if mode == "throughput":
            if not re.search(r"Summary: Message Rate is [1-9]", out):
                raise Failure(f"no result in {out!r}")
            return "a result"
        counts = {name: int(n) for name, n in re.findall(r"# (dropped|duplicated|out-of-order) messages = (\d+)", out)}
        if len(counts) != 3 or not re.search(r"percentile 50", out):
            raise Failure(f"no result in {out!r}")
        return counts
    return run


CASES = [
    # Unpaced it expects at most 600,000 messages a second, and gives up when there are more.
    Case("sockperf_ping_pong", sockperf("ping-pong", "-m", "14", "--mps", "500000"), "ping-pong", payload=1 << 16),
    Case("sockperf_throughput", sockperf("throughput", "-m", "1024"), "throughput", payload=1 << 20),
]
