"""Redis: redis-benchmark in four shapes, and a replica whose data set must have its master's digest."""
import os
import re

from harness import Failure, need, wait_for
from . import Case

PROGRAM = ("Redis", "redis-server", "redis-tools")


def start(r, *options, role="server", folder=None):
    port = r.port()
    folder = folder or r.path(f"redis-{port}")
    os.makedirs(folder, exist_ok=True)
    r.server([need("redis-server"), "--port", str(port), "--bind", r.address, "--save", "", "--appendonly", "no", "--dir", folder,
              "--enable-debug-command", "yes", "--daemonize", "no", "--protected-mode", "no", *options], port, role=role)
    return port


def ask(r, port, *words):
    """By redis-cli without the library: an observer."""
    return r.client([need("redis-cli"), "-h", r.address, "-p", str(port), *words], role="observer").stdout.strip()


def benchmark(requests, *options):
    def run(r):
        port = start(r)
        count = r.amount(requests // 4 if r.quick else requests)
        out = r.client([need("redis-benchmark"), "-h", r.address, "-p", str(port), "-n", str(count), "-t", "set,get", "--csv", *options]).stdout
        rates = [float(x) for x in re.findall(r'^"[SG]ET","([0-9.]+)"', out, re.M)]
        if len(rates) != 2 or min(rates) <= 0:
            raise Failure(f"no result in {out!r}")
        # It also looks at the server's data: the same keys and values must have arrived.
        return ask(r, port, "DEBUG", "DIGEST")
    return run


def replica(r):
    master = start(r)
    # The replica is the connecting side of its link: with 'only the client preloaded' that link has one end of ours.
    follower = start(r, "--replicaof", r.address, str(master), "--repl-diskless-sync-delay", "0", role="client")
    wait_for(lambda: "master_link_status:up" in ask(r, follower, "INFO", "replication"), 20, "the replica's link")
    r.python("redis_fill.py", r.address, master, (200 if r.quick else 1000) * r.stretch)
    digest = ask(r, master, "DEBUG", "DIGEST")
    wait_for(lambda: ask(r, follower, "DEBUG", "DIGEST") == digest, 10, "the replica to have its master's data")
    return digest


def append_only(r):
    """Transactions and messages while the append-only file is rewritten by a child; another server then reads that file."""
    port = start(r, "--appendonly", "yes", "--appendfsync", "no", folder=r.path("aof"))
    outcome = r.python("redis_more.py", r.address, port, r.amount(400 if r.quick else 1600)).stdout

    def rewritten():
        info = ask(r, port, "INFO", "persistence")
        return "aof_rewrite_in_progress:0" in info and "aof_last_bgrewrite_status:ok" in info and "aof_rewrite_scheduled:0" in info
    wait_for(rewritten, 20, "the rewriting of the append-only file")
    digest = ask(r, port, "DEBUG", "DIGEST")
    r.stop()
    again = start(r, "--appendonly", "yes", folder=r.path("aof"))
    wait_for(lambda: ask(r, again, "DEBUG", "DIGEST") == digest, 10, "another server to have the same data")
    return outcome


CASES = [
    Case("redis_1_client", benchmark(20000, "-c", "1"), "redis-benchmark, one client", payload=1 << 20),
    Case("redis_50_clients", benchmark(50000, "-c", "50"), "50 clients", payload=1 << 20),
    Case("redis_pipeline", benchmark(200000, "-c", "10", "-P", "16"), "10 clients, pipeline 16", payload=1 << 20),
    Case("redis_512k_values", benchmark(800, "-c", "4", "-d", "524288"), "values of 512 KiB", payload=100 << 20),
    Case("redis_replica", replica, "a replica", payload=20 << 20),
    Case("redis_aof", append_only, "MULTI, publish and subscribe while the append-only file is rewritten", payload=4 << 20),
]
