"""Over RDMA devices, in the guest of scripts/vm: kernel TCP on the same path, bare verbs, librspreload, SMC-D, SMC-R, and SDP."""
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from typing import NamedTuple

from lib import figures, smc
from lib.programs import MBIT, RATE, netperf
from lib.runs import Benchmark, Broken, Carrier, Metric, Sdp, run_once

RSPRELOAD = "/usr/lib/x86_64-linux-gnu/rsocket/librspreload.so.1"
SMCFAMILY = os.path.join(figures.ROOT, "build", "perf", "libsmcfamily.so")
ANSWER = "compare-vm: "  # begins the line with a round's results in the guest's output
LOOK_EVERY = 0.1         # seconds; a system call takes some 40 us there

CARRIERS = ["kernel TCP", "bare verbs", "librspreload", "SMC-D", "SMC-R", "SDP"]
# What SDP is compared with, and the ratio to reach where one was set. A round trip may take 1.5 times that of bare verbs.
RIVALS = {"kernel TCP": {}, "bare verbs": {"RR": 1 / 1.5}, "librspreload": {"RR": 1, "STREAM": 1}, "SMC-D": {}, "SMC-R": {}}


class RdmaListener(Carrier):
    """A server that the kernel's RDMA connection manager listens for. Nobody comes to it by TCP: that it listens is the proof."""

    def listening(self, port):
        shown = subprocess.run(["rdma", "resource", "show", "cm_id"], capture_output=True, text=True, check=False).stdout
        return any(" LISTEN " in line and re.search(rf":{port}\b", line) for line in shown.splitlines())

    def carried(self, folder):
        return 1.0, {}


class Rsockets(RdmaListener):
    def server(self, argv):
        return argv + ["-f"]  # netserver without fork, which is not for rsockets

    def env(self, role, folder):
        return {"LD_PRELOAD": RSPRELOAD}


class Smc(Carrier):
    def __init__(self, technique):
        self.technique = technique
        self.before = 0

    def env(self, role, folder):
        return {"LD_PRELOAD": SMCFAMILY}

    def begin(self):
        smc.shut_loopback(self.technique != "SMC-D")
        self.before = smc.connections()[self.technique]

    def carried(self, folder):
        """netperf makes two connections."""
        return min(1.0, (smc.connections()[self.technique] - self.before) / 2), {}


class Device(NamedTuple):
    server: str
    client: str
    transport: str


DEVICES = {"rxe": Device("10.77.0.1", "10.77.0.2", "ib"), "siw": Device("10.77.1.1", "10.77.1.2", "rnic")}


def has_clock_rate():
    with open("/proc/cpuinfo", encoding="ascii") as info:
        return "cpu MHz" in info.read()


def carriers(device, library):
    """Name -> Carrier, of those that are here; name -> why it is not."""
    found = {"kernel TCP": Carrier(), "SDP": Sdp(library, device.transport)}
    lacking = {}
    if not shutil.which("ib_send_lat"):
        lacking["bare verbs"] = "perftest is not installed"
    elif not has_clock_rate():
        lacking["bare verbs"] = "perftest takes its clock's rate from /proc/cpuinfo, where this guest has none, and each end polls on a CPU"
    else:
        found["bare verbs"] = RdmaListener()
    if os.path.exists(RSPRELOAD):
        found["librspreload"] = Rsockets()
    else:
        lacking["librspreload"] = "librdmacm1 has none here"
    try:
        smc.family("SMC_GEN_NETLINK")
        found.update({technique: Smc(technique) for technique in ("SMC-D", "SMC-R")})
    except OSError:
        lacking.update({technique: "this guest's kernel has no SMC" for technique in ("SMC-D", "SMC-R")})
    if device.transport == "rnic":
        found.pop("SMC-R", None)
        lacking["SMC-R"] = "it takes no iWARP device"
    return found, lacking


def perftest(program, options, read):
    return Benchmark(lambda ends, folder: [program, "-R", "-F", *options, "-p", str(ends.port)],
                     lambda ends, seconds: [program, "-R", "-F", *options, "-p", str(ends.port), ends.server], read, [])


def last_row(out, columns):
    """The figures of perftest's one row of results."""
    rows = [line.split() for line in out.splitlines() if re.match(r"\s*\d+\s+\d+\s+\d", line)]
    if len(rows) != 1 or len(rows[0]) < columns:
        raise Broken(f"perftest said {out[-800:]!r}")
    return [float(each) for each in rows[0]]


def read_latency(out):
    """Round trips a second: it prints the average of half of one, in microseconds, in the sixth column."""
    return [1e6 / (2 * last_row(out, 6)[5])]


def read_bandwidth(out):
    """Mb/s: the average in the fourth column is in 2^20 bytes a second."""
    return [last_row(out, 4)[3] * 8 * (1 << 20) / 1e6]


class Test(NamedTuple):
    kind: str
    unit: str
    by_sockets: Benchmark
    by_verbs: Benchmark


def tests():
    sizes = {"1 B": 1, "64 B": 64, "4 KiB": 4096, "16 KiB": 16384, "1 MiB": 1 << 20}
    table = {}
    for name in ("64 B", "16 KiB", "1 MiB"):
        size = sizes[name]
        count = max(20, min(20000, (32 << 20) // size))  # of messages: a second or two
        table[f"TCP_STREAM {name}"] = Test("STREAM", MBIT, netperf("TCP_STREAM", ["-m", str(size)], Metric("", MBIT)),
                                           perftest("ib_send_bw", ["-s", str(size), "-n", str(count)], read_bandwidth))
    for name in ("1 B", "64 B", "4 KiB"):
        size = sizes[name]
        table[f"TCP_RR {name}"] = Test("RR", RATE, netperf("TCP_RR", ["-r", f"{size},{size}"], Metric("", RATE)),
                                       perftest("ib_send_lat", ["-s", str(size), "-n", "1000"], read_latency))
    return table


# ---- in the guest

def run_round(args):
    """In the guest: one round of everything, told on the standard output."""
    results, broken, lacking = {}, [], {}
    try:
        smc.set_up()
    except OSError:
        pass  # carriers() says so
    for device_name, device in DEVICES.items():
        found, lacking[device_name] = carriers(device, args.lib)
        order = [name for name in CARRIERS if name in found and re.search(args.carriers, name)]
        turn = args.round % len(order)
        for test_name, test in tests().items():
            name = f"{device_name} {test_name}"
            if not re.search(args.only, name):
                continue
            results[name] = {}
            for carrier in order[turn:] + order[:turn]:
                benchmark = test.by_verbs if carrier == "bare verbs" else test.by_sockets
                try:
                    run = run_once(benchmark, found[carrier], args.seconds, device.server, device.client, LOOK_EVERY)
                    if run["lane_share"] == 0.0:
                        raise Broken(f"it was not what carried the bytes: {run['reasons']}")
                    results[name][carrier] = run
                except Broken as error:
                    broken.append(f"{name}, {carrier}: {error}")
    print(ANSWER + json.dumps({"kernel": os.uname().release, "results": results, "broken": broken, "lacking": lacking}), flush=True)
    return 0


# ---- outside

def guest_round(args, number):
    command = [os.path.join(figures.ROOT, "scripts", "vm"), f"--{args.guest}", "run", os.path.join(figures.ROOT, "perf", "compare"),
               "--vm", "--round", str(number), "--seconds", str(args.seconds), "--lib", os.path.abspath(args.lib), "--only", args.only,
               "--carriers", args.carriers]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False,
                          env={"SDP_VM_TIMEOUT": "1800", **os.environ})  # seconds
    answers = [line[len(ANSWER):] for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if len(answers) != 1:
        sys.exit(f"round {number + 1}: the guest said {done.stdout[-2000:]!r}")
    return json.loads(answers[0])


def summarise(name, test, rounds):
    """A row: figures by carrier, and SDP's ratio to each of the others, taken in the rounds that have both."""
    runs = {carrier: [r[carrier]["figures"][0] for r in rounds if carrier in r] for carrier in CARRIERS}
    row = {"benchmark": name, "unit": test.unit, "figures": {carrier: each for carrier, each in runs.items() if each}, "ratios": {},
           "lane_share": min((r["SDP"]["lane_share"] for r in rounds if "SDP" in r), default=0.0)}
    for rival, goals in RIVALS.items():
        ratios = [r["SDP"]["figures"][0] / r[rival]["figures"][0] for r in rounds if "SDP" in r and rival in r]
        if ratios:
            row["ratios"][rival] = {"of_rounds": ratios, "median": statistics.median(ratios), "goal": goals.get(test.kind)}
    return row


HEADINGS = ["benchmark", "unit", *CARRIERS, *(f"SDP : {rival}" for rival in RIVALS), "on lanes"]


def cells(row):
    def ratio(rival):
        found = row["ratios"].get(rival)
        if not found:
            return ""
        goal = "" if found["goal"] is None else " met" if found["median"] >= found["goal"] else " -"
        return figures.ratio_spread(found["of_rounds"]) + goal
    return [row["benchmark"], row["unit"], *(figures.spread(row["figures"][c]) if c in row["figures"] else "" for c in CARRIERS),
            *(ratio(rival) for rival in RIVALS), f"{row['lane_share']:.0%}"]


def machine_lines(machine, lacking):
    lines = [figures.machine_line(machine),
             f"The guest: {machine['guest']}. Medians (least..most) of {machine['rounds']} interleaved rounds of about "
             f"{machine['seconds']} s; ratios are taken within a round, above 1 is better. To reach: above 1 against librspreload, above "
             "0.67 against the round trip of bare ib_send_lat (1.5 times its latency).",
             "**These devices are software**: each message goes through the kernel's network stack below a layer more, so that all of "
             "them are slower than TCP on the same path. On RDMA hardware it is the other way round. What can be compared here is who "
             "gets how much out of one device."]
    reasons = {}
    for device, each in lacking.items():
        for carrier, why in each.items():
            reasons.setdefault((carrier, why), []).append(device)
    lines += [f"No {carrier} on {' and '.join(on)}: {why}." for (carrier, why), on in reasons.items()]
    return lines


def markdown(rows, lines):
    return figures.markdown_table([HEADINGS] + [cells(row) for row in rows], 2) + "\n\n" + "  \n".join(lines)


def compare(args):
    if args.round is not None:
        return run_round(args)
    if not os.path.exists(SMCFAMILY):
        sys.exit(f"{SMCFAMILY} is not there: build first (scripts/build)")
    machine = figures.describe_machine(args, {"netperf": ["netperf", "-V"], "perftest": ["ib_send_lat", "--version"]})
    rounds = []
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        rounds.append(guest_round(args, number))
    machine["guest"] = {"uml": "User-Mode Linux, 1 CPU", "qemu": "QEMU without KVM, 2 CPUs"}[args.guest] + f", Linux {rounds[0]['kernel']}"
    lacking = rounds[0]["lacking"]
    rows = []
    for device in DEVICES:
        for name, test in tests().items():
            of_it = [r["results"].get(f"{device} {name}", {}) for r in rounds]
            if any("SDP" in each for each in of_it):
                rows.append(summarise(f"{device} {name}", test, of_it))
    broken = [f"round {number + 1}, {error}" for number, r in enumerate(rounds) for error in r["broken"]]
    lines = machine_lines(machine, lacking)
    print(markdown(rows, lines) if args.markdown else "\n".join(
        [figures.text_table([HEADINGS] + [cells(row) for row in rows], 2), "", *lines]))
    for error in broken:
        print(f"! {error}")
    path = figures.write_json(args.results, f"compare-vm-{args.guest}.json",
                              {"machine": machine, "rows": rows, "rounds": rounds, "broken": broken, "lacking": lacking})
    print("\nwritten: " + os.path.relpath(path))
    if args.readme:
        figures.fill("perf/README.md", "compare-vm", markdown(rows, lines))
    return 1 if broken or not rows else 0
