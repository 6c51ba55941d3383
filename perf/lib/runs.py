"""One run: a server, a client, what carries the bytes between them, and the proof that it did."""
import glob
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from typing import NamedTuple


class Broken(Exception):
    """A run without a result; says why."""


class Ends(NamedTuple):
    """The addresses of a connection's ends, and the server's port."""
    server: str
    client: str
    port: int


class Metric:
    """One figure of a benchmark. `goal` is the ratio to reach, if one was set."""

    def __init__(self, name, unit, higher=True, goal=None):
        self.name, self.unit, self.higher, self.goal = name, unit, higher, goal


class Benchmark:
    def __init__(self, server, client, read, metrics, stop=signal.SIGTERM, expect_lanes=True):
        self.server = server    # ends, folder -> argv
        self.client = client    # ends, seconds -> argv
        self.read = read        # output -> list of figures, in the order of metrics
        self.metrics = metrics
        self.stop = stop
        self.expect_lanes = expect_lanes


class Carrier:
    """Kernel TCP; the others are subclasses."""

    def server(self, argv):
        """The server's command line, if it has to be another one."""
        return argv

    def env(self, role, folder):
        """What the server's or the client's environment has besides."""
        return {}

    def listening(self, port):
        for name in ("/proc/net/tcp", "/proc/net/tcp6"):
            with open(name, encoding="ascii") as rows:
                if any(f[3] == "0A" and int(f[1].rsplit(":", 1)[1], 16) == port for f in (row.split() for row in list(rows)[1:])):
                    return True
        return False

    def begin(self):
        """Before the server starts."""

    def carried(self, folder):
        """After the run: which part of the stream went this way (None: there is no other), and why not all of it."""
        return None, {}


class Sdp(Carrier):
    """The library; `transport`: the only devices that it may use."""

    def __init__(self, library, transport=None):
        self.library, self.transport = library, transport

    def env(self, role, folder):
        # Between hosts a lane takes longer to come up than a short run should be on TCP.
        only = {"SDP_TRANSPORT": self.transport, "SDP_POLICY": "sdp"} if self.transport else {}
        return {"LD_PRELOAD": self.library, "SDP_STATS": os.path.join(folder, role + "-%p.json"), **only}

    def carried(self, folder):
        """By the two ends' reports; 0 if either end had no lane."""
        total = {"client": [0, 0, 0], "server": [0, 0, 0]}
        reasons = {}
        for path in glob.glob(os.path.join(folder, "*.json")):
            with open(path, encoding="utf-8") as source:
                report = json.load(source)
            mine = total[os.path.basename(path).split("-")[0]]
            mine[0] += report["lanes"][self.transport] if self.transport else sum(report["lanes"].values())
            mine[1] += report["bytes"]["lane"]["sent"] + report["bytes"]["lane"]["received"]
            mine[2] += report["bytes"]["tcp"]["sent"] + report["bytes"]["tcp"]["received"]
            for reason, count in report["reasons"].items():
                reasons[reason] = reasons.get(reason, 0) + count
        share = min(lane / (lane + tcp) if lanes and lane else 0.0 for lanes, lane, tcp in total.values())
        return share, reasons


def free_port(address):
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def cpu_seconds(usage):
    return usage.ru_utime + usage.ru_stime


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class FamilyTime:
    """CPU seconds of a process and its descendants, looked at now and then: netserver's children are waited for by nobody, so that
    their time is in no rusage."""

    def __init__(self, pid):
        self.pid = pid
        self.ticks = {}

    def look(self):
        pids = [self.pid]
        for pid in pids:
            try:
                with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
                    fields = stat.read().rsplit(")", 1)[1].split()
                self.ticks[pid] = int(fields[11]) + int(fields[12])
                with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as children:
                    pids += map(int, children.read().split())
            except OSError:
                pass  # it has just ended

    def seconds(self):
        return sum(self.ticks.values()) / os.sysconf("SC_CLK_TCK")

    def await_end(self, seconds):
        """netserver's children end by themselves, and write their reports then."""
        deadline = time.monotonic() + seconds
        while any(map(is_running, self.ticks)) and time.monotonic() < deadline:
            time.sleep(0.02)


def has_ended(process):
    """Without taking its status, which wait4() is to find."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def stop_server(server, how):
    """Ends the server by its pid; returns the CPU seconds that it took, with those of the children that it waited for."""
    if not has_ended(server):
        os.kill(server.pid, how)
    deadline = time.monotonic() + 5
    while True:
        pid, status, usage = os.wait4(server.pid, os.WNOHANG)
        if pid:
            server.returncode = os.waitstatus_to_exitcode(status)
            return cpu_seconds(usage)
        if time.monotonic() > deadline:
            os.kill(server.pid, signal.SIGKILL)
            deadline += 5
        time.sleep(0.01)


def wait_client(client, seconds, server_time, look_every):
    deadline = time.monotonic() + seconds
    killed = False
    while True:
        server_time.look()
        pid, status, usage = os.wait4(client.pid, os.WNOHANG)
        if pid:
            client.returncode = os.waitstatus_to_exitcode(status)
            if killed:
                raise Broken(f"{client.args[0]} did not end in {seconds:.0f} s")
            return cpu_seconds(usage)
        if time.monotonic() > deadline and not killed:
            client.kill()
            killed = True
        time.sleep(look_every)


def await_listener(server, carrier, port, log):
    deadline = time.monotonic() + 10
    while not carrier.listening(port):
        if has_ended(server) or time.monotonic() > deadline:
            log.seek(0)
            raise Broken(f"the server did not start: {log.read()[-500:]!r}")
        time.sleep(0.01)


def run_once(benchmark, carrier, seconds, server="127.0.0.1", client="127.0.0.1", look_every=0.02):
    """One run; returns figures, CPU seconds of client and server, and the carrier's share."""
    ends = Ends(server, client, free_port(server))
    with tempfile.TemporaryDirectory(prefix="sdp-compare-") as folder:
        def start(role, argv, out, err):
            env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
            env.update(carrier.env(role, folder), LC_ALL="C")
            return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=folder)
        carrier.begin()
        with open(os.path.join(folder, "server.log"), "w+b") as log:
            server = start("server", carrier.server(benchmark.server(ends, folder)), log, log)
            server_cpu = None
            try:
                await_listener(server, carrier, ends.port, log)
                with open(os.path.join(folder, "out"), "w+b") as out, open(os.path.join(folder, "err"), "w+b") as err:
                    client = start("client", benchmark.client(ends, seconds), out, err)
                    family = FamilyTime(server.pid)
                    client_cpu = wait_client(client, seconds * 10 + 30, family, look_every)
                    out.seek(0)
                    err.seek(0)
                    text = out.read().decode(errors="replace")
                    if client.returncode != 0:
                        raise Broken(f"{client.args[0]}: status {client.returncode}: {err.read()[-500:]!r} {text[-500:]!r}")
                server_cpu = max(stop_server(server, benchmark.stop), family.seconds())
                family.await_end(10)
            finally:
                if server_cpu is None:
                    stop_server(server, signal.SIGKILL)
        share, reasons = carrier.carried(folder)
        return {"figures": benchmark.read(text), "client_cpu_s": client_cpu, "server_cpu_s": server_cpu, "lane_share": share,
                "reasons": reasons}
