"""Node.js: streams of its http module, served by one process or by a cluster."""
import os

from harness import HERE, need
from . import Case

PROGRAM = ("Node.js", "nodejs")


def http(how):
    def run(r):
        node, port, script = need("node"), r.port(), os.path.join(HERE, "clients", "node_http.js")
        r.server([node, script, "serve", r.address, str(port), how], port)
        return r.client([node, script, "talk", r.address, str(port), str(r.amount(4))]).stdout
    return run


CASES = [
    Case("node_http", http("one"), "http: 8 streams of 4 MB there and back, requests one by one", share=0.6, payload=64 << 20, extra=True),
    Case("node_cluster", http("accept"), "cluster of 2 workers that accept themselves", share=0.6, payload=64 << 20, extra=True),
    # The primary passes each connection to a worker.
    Case("node_cluster_passed", http("passed"), "cluster, connections passed to 2 workers", share=None, payload=64 << 20, extra=True),
]
