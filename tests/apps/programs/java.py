"""Java: blocking sockets, a Selector, HttpServer and HttpClient."""
import os

from harness import HERE, need
from . import Case

PROGRAM = ("OpenJDK", "openjdk-17-jdk-headless")


def run(r):
    java, source = need("java"), os.path.join(HERE, "clients", "Net.java")
    port, _, last = r.port(), r.port(), r.port()
    r.server([java, source, "serve", r.address, str(port)], last)
    return r.client([java, source, "talk", r.address, str(port), str(r.amount(8))]).stdout


# How much of it goes by lanes varies from run to run, and why is not known yet.
CASES = [Case("java", run, "blocking Socket, Selector, HttpServer and HttpClient", share=0.3, payload=128 << 20, extra=True)]
