"""The programs that are run, and how their output is read."""
import csv
import json
import re
import shutil
import signal

from lib.runs import Benchmark, Broken, Metric

RATE, MBIT = "/s", "Mb/s"


def read_netperf(out):
    figures = re.findall(r"^\d+(?:\.\d+)?", out, re.M)
    if not figures:
        raise Broken(f"netperf said {out!r}")
    return [float(figures[-1])]


def netperf(test, options, metric, expect_lanes=True):
    return Benchmark(lambda ends, folder: ["netserver", "-D", "-4", "-L", ends.server, "-p", str(ends.port)],
                     lambda ends, seconds: ["netperf", "-4", "-H", ends.server, "-L", ends.client, "-p", str(ends.port), "-t", test,
                                            "-l", str(seconds), "-P", "0", *(["-f", "m"] if metric.unit == MBIT else []), "--", *options,
                                            "-o", "THROUGHPUT"],
                     read_netperf, [metric], expect_lanes=expect_lanes)


def iperf3(size, metric):
    return Benchmark(lambda ends, folder: ["iperf3", "-s", "-1", "-B", ends.server, "-p", str(ends.port)],
                     lambda ends, seconds: ["iperf3", "-c", ends.server, "-p", str(ends.port), "-t", str(seconds), "-l", size, "-J"],
                     lambda out: [json.loads(out)["end"]["sum_received"]["bits_per_second"] / 1e6], [metric])


def sockperf(metrics):
    def read(out):
        found = dict(re.findall(r"percentile (50|99)\.0+ *= *([0-9.]+)", re.sub(r"\x1b\[[0-9;]*m", "", out)))
        if len(found) != 2:
            raise Broken(f"sockperf said {out[-500:]!r}")
        # sockperf prints half a round trip.
        return [2 * float(found["50"]), 2 * float(found["99"])]
    return Benchmark(lambda ends, folder: ["sockperf", "server", "--tcp", "-i", ends.server, "-p", str(ends.port)],
                     lambda ends, seconds: ["sockperf", "ping-pong", "--tcp", "-i", ends.server, "-p", str(ends.port), "-t", str(seconds),
                                            # Unpaced it expects at most 600,000 a second, and gives up when there are more.
                                            "-m", "14", "--mps", "500000"],
                     read, metrics, stop=signal.SIGINT)


def redis(clients, requests, metrics):
    def read(out):
        rows = {row["test"]: float(row["rps"]) for row in csv.DictReader(out.splitlines())}
        return [rows["SET"], rows["GET"]]
    return Benchmark(lambda ends, folder: ["redis-server", "--port", str(ends.port), "--bind", ends.server, "--save", "", "--appendonly",
                                           "no", "--dir", folder, "--daemonize", "no"],
                     lambda ends, seconds: ["redis-benchmark", "-h", ends.server, "-p", str(ends.port), "-c", str(clients),
                                            "-n", str(int(requests * seconds)), "-t", "set,get", "--csv"],
                     read, metrics)


def on_loopback():
    """Name -> Benchmark, of those whose programs are installed; and the names of the missing programs."""
    table = {}
    if shutil.which("netperf") and shutil.which("netserver"):
        table["TCP_RR 1 B"] = netperf("TCP_RR", ["-r", "1,1"], Metric("", RATE, goal=30))
        table["TCP_STREAM 64 B"] = netperf("TCP_STREAM", ["-m", "64"], Metric("", MBIT, goal=15))
        table["TCP_STREAM 16 KiB"] = netperf("TCP_STREAM", ["-m", "16384"], Metric("", MBIT, goal=4))
        table["TCP_STREAM 1 MiB"] = netperf("TCP_STREAM", ["-m", "1048576"], Metric("", MBIT, goal=4))
        table["TCP_MAERTS"] = netperf("TCP_MAERTS", [], Metric("", MBIT))
        table["TCP_CRR 1 B"] = netperf("TCP_CRR", ["-r", "1,1"], Metric("", RATE, goal=0.95), expect_lanes=False)
    elif shutil.which("iperf3"):
        table["iperf3 64 B"] = iperf3("64", Metric("", MBIT))
        table["iperf3 16 KiB"] = iperf3("16K", Metric("", MBIT))
        table["iperf3 1 MiB"] = iperf3("1M", Metric("", MBIT))
    if shutil.which("sockperf"):
        table["sockperf ping-pong"] = sockperf([Metric("p50", "us", higher=False), Metric("p99", "us", higher=False)])
    if shutil.which("redis-server") and shutil.which("redis-benchmark"):
        table["redis 1 client"] = redis(1, 30000, [Metric("SET", RATE, goal=3), Metric("GET", RATE, goal=3)])
        table["redis 50 clients"] = redis(50, 80000, [Metric("SET", RATE, goal=1.5), Metric("GET", RATE, goal=1.5)])
    wanted = ("netperf", "netserver", "iperf3", "sockperf", "redis-server", "redis-benchmark")
    return table, [program for program in wanted if not shutil.which(program)]
