"""What every program's test needs: a private network, processes with or without the library, and the proof of who carried the bytes.

A case is run over plain TCP and over SDP, and the outcomes must be equal. Who carried the bytes is told twice: by the library's own
report (SDP_STATS), and by the kernel, whose counters of the private namespace's `lo` and of TCP segments see every byte that
did not go by a lane. Nothing else runs in that namespace, so a byte more there is a byte of ours.
"""
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

SKIPPED = 77  # ctest's SKIP_RETURN_CODE
PYTHON = "/usr/bin/python3"  # Debian's own, whatever runs this
HERE = os.path.dirname(os.path.abspath(__file__))


class Skip(Exception):
    """The test can't be run here; says why."""


class Failure(Exception):
    """The test failed; says what was wrong."""


def need(*programs):
    """The full paths of programs; skips the case if one is not installed."""
    paths = []
    for program in programs:
        path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if not path:
            raise Skip(f"{program} is not installed")
        paths.append(path)
    return paths[0] if len(paths) == 1 else paths


def enter_private_network():
    """Goes on in a network namespace of its own, with `lo` up; skips if the machine does not let us."""
    if os.environ.get("SDP_TEST_NETNS") != "1":
        for unshare in (["unshare", "-n"], ["unshare", "-rn"]):
            if subprocess.run(unshare + ["true"], capture_output=True, check=False).returncode == 0:
                env = dict(os.environ, SDP_TEST_NETNS="1")
                os.execvpe("unshare", unshare + [sys.executable] + sys.argv, env)
        raise Skip("no private network namespace to be had (unshare -n was refused)")
    subprocess.run([need("ip"), "link", "set", "lo", "up"], check=True)
    # glibc's AI_ADDRCONFIG does not count loopback addresses; netperf then can't even resolve 127.0.0.1.
    subprocess.run([need("ip"), "address", "add", "192.0.2.1/32", "dev", "lo"], check=True)


class Meter:
    """The kernel's counters of this network namespace since the object was made."""

    def __init__(self):
        self._start = self._read()

    @staticmethod
    def _read():
        counters = {}
        with open("/proc/net/dev", encoding="ascii") as dev:
            for line in dev:
                if line.strip().startswith("lo:"):
                    counters["lo_bytes"] = int(line.split(":")[1].split()[8])
        with open("/proc/net/snmp", encoding="ascii") as snmp:
            rows = [line.split() for line in snmp if line.startswith("Tcp:")]
        tcp = dict(zip(rows[0][1:], rows[1][1:]))
        counters["segments"] = int(tcp["OutSegs"])
        counters["opens"] = int(tcp["ActiveOpens"])
        return counters

    def delta(self):
        now = self._read()
        return {name: now[name] - self._start[name] for name in now}


def listening(port):
    """True if something in this namespace listens on the port. Asks no question of the server itself, which may count connections."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table, encoding="ascii") as rows:
            for row in list(rows)[1:]:
                fields = row.split()
                if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                    return True
    return False


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(f"waited {seconds} s for {what}")
        time.sleep(0.01)


class Run:
    """One run of a case: a folder, its processes, and each role ('server', 'client') with or without the library."""

    _port = 20000

    def __init__(self, name, library, preloaded, quick):
        self.name = name
        self.preloaded = preloaded  # set of roles
        self.quick = quick          # mixed pairs: the outcome counts, not the amount
        self.dir = tempfile.mkdtemp(prefix="sdp-app-")
        os.chmod(self.dir, 0o755)
        self.library = library and shutil.copy(library, self.dir)  # where other users reach it too, wherever the build lies
        self.stats_dir = os.path.join(self.dir, "stats")
        os.mkdir(self.stats_dir)
        os.chmod(self.stats_dir, 0o777)  # workers that gave up root write there too
        self._running = []

    def port(self):
        """A port that no run before has used: some servers don't set SO_REUSEADDR."""
        Run._port += 1
        return Run._port

    def path(self, name):
        return os.path.join(self.dir, name)

    def random_file(self, name, size):
        """A file of repeatable bytes: equal in every run."""
        import random
        path = self.path(name)
        generator = random.Random(size)
        with open(path, "wb") as out:
            block = generator.randbytes(1 << 20)
            for start in range(0, size, len(block)):
                out.write(start.to_bytes(8, "big") + block[8:size - start] if size - start > 8 else block[:size - start])
        os.chmod(path, 0o644)
        return path

    def env(self, role, extra=None):
        env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        env.update({"LC_ALL": "C", "HOME": self.dir})
        if role in self.preloaded:
            env["LD_PRELOAD"] = self.library
            env["SDP_STATS"] = os.path.join(self.stats_dir, role + "-%p.json")
        env.update(extra or {})
        return env

    def server(self, argv, port, role="server", stop=signal.SIGTERM, user=None, env=None, ready=None):
        """Starts a server and waits until it listens. Stopped at the end of the run, with the given signal."""
        log = open(self.path(f"{role}-{len(self._running)}.log"), "wb")
        process = subprocess.Popen(argv, env=self.env(role, env), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.dir,
                                   user=user, extra_groups=[] if user else None, start_new_session=True)
        log.close()
        self._running.append((process, stop))

        def up():
            if process.poll() is not None:
                raise Failure(f"{argv[0]} ended at once with status {process.returncode}\n{self.logs()}")
            return ready() if ready else listening(port)
        wait_for(up, 20, f"{os.path.basename(argv[0])} to listen on {port}")
        return process

    def client(self, argv, role="client", timeout=40, check=True, env=None, text=True, stdin=None):
        """Runs a client to its end; the outcome has .stdout and .returncode."""
        try:
            done = subprocess.run(argv, env=self.env(role, env), input=stdin, capture_output=True, text=text, cwd=self.dir,
                                  timeout=timeout, check=False, start_new_session=True)
        except subprocess.TimeoutExpired as expired:
            raise Failure(f"{' '.join(map(str, argv))}: did not end in {timeout} s\n{expired.stdout}\n{self.logs()}") from None
        if check and done.returncode != 0:
            raise Failure(f"{' '.join(map(str, argv))}: status {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}")
        return done

    def python(self, script, *args, **options):
        """Runs a client of tests/apps/programs/clients under Debian's Python."""
        return self.client([PYTHON, "-S", os.path.join(HERE, "clients", script), *map(str, args)], **options)

    def stop(self):
        """Ends every server, last one first, each by its own signal; a server that does not go is a failure."""
        stuck = []
        for process, stop in reversed(self._running):
            if process.poll() is None:
                process.send_signal(stop)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    stuck.append(f"{process.args[0]} did not end within 10 s of {stop.name}")
            try:
                os.killpg(process.pid, signal.SIGKILL)  # its session's leftovers, if any
            except ProcessLookupError:
                pass
            process.wait()
        self._running = []
        if stuck:
            raise Failure("; ".join(stuck))

    def logs(self):
        text = ""
        for path in sorted(glob.glob(self.path("*.log"))):
            with open(path, encoding="utf-8", errors="replace") as log:
                tail = log.read()[-2000:]
            if tail:
                text += f"--- {os.path.basename(path)}\n{tail}\n"
        return text

    def stats(self):
        """The reports of every process of this run, each with its role."""
        reports = []
        for path in sorted(glob.glob(os.path.join(self.stats_dir, "*.json"))):
            try:
                with open(path, encoding="utf-8") as report:
                    reports.append(dict(json.load(report), role=os.path.basename(path).split("-")[0]))
            except ValueError as error:
                raise Failure(f"{os.path.basename(path)} is no JSON: {error}") from None
        return reports

    def cleanup(self):
        shutil.rmtree(self.dir, ignore_errors=True)


def summarise(reports):
    """Sums over processes: lanes, bytes and messages by lane and TCP, and the reasons for having no lane."""
    total = {"lanes": 0, "lane_sent": 0, "lane_received": 0, "tcp_sent": 0, "tcp_received": 0, "lane_messages": 0, "tcp_messages": 0,
             "reasons": {}}
    for report in reports:
        total["lanes"] += sum(report["lanes"].values())
        for way in ("sent", "received"):
            total[f"lane_{way}"] += report["bytes"]["lane"][way]
            total[f"tcp_{way}"] += report["bytes"]["tcp"][way]
        total["lane_messages"] += report["messages"]["lane"]["sent"]
        total["tcp_messages"] += report["messages"]["tcp"]["sent"]
        for reason, count in report["reasons"].items():
            total["reasons"][reason] = total["reasons"].get(reason, 0) + count
    return total


def prove_lanes(reports, kernel, share):
    """Lanes carried at least `share` of the stream, and the kernel's own counters agree. Returns the figures for the record."""
    total = summarise(reports)
    stream = total["lane_sent"] + total["tcp_sent"]
    figures = f"ours {json.dumps(total)}, kernel {json.dumps(kernel)}"
    for role in ("server", "client"):
        mine = summarise([r for r in reports if r["role"] == role])
        if mine["lanes"] == 0 or mine["lane_sent"] + mine["lane_received"] == 0:
            raise Failure(f"the {role} had no lane: {figures}")
    if total["lane_sent"] < share * stream:
        raise Failure(f"lanes carried less than {share:.0%} of what was sent: {figures}")
    # A reader may end with bytes unread, but nobody reads what was not sent.
    if not 0.9 * total["lane_sent"] <= total["lane_received"] <= total["lane_sent"]:
        raise Failure(f"lane bytes sent and received do not agree: {figures}")
    # What TCP may have: its own share with headers and acknowledgements, and each connection's set-up and end.
    bytes_allowed = 2 * total["tcp_sent"] + 150 * total["tcp_messages"] + 4000 * (kernel["opens"] + 1) + 0.05 * total["lane_sent"]
    segments_allowed = 50 * (kernel["opens"] + 1) + 0.1 * total["lane_messages"] + 3 * total["tcp_messages"] + total["tcp_sent"] / 100
    if kernel["lo_bytes"] > bytes_allowed:
        raise Failure(f"lo carried {kernel['lo_bytes']} bytes, more than {bytes_allowed:.0f}: {figures}")
    if kernel["segments"] > segments_allowed:
        raise Failure(f"TCP sent {kernel['segments']} segments, more than {segments_allowed:.0f}: {figures}")
    return figures


def prove_no_lanes(reports):
    """With the library at one end only, nothing may have a lane, and every connection's reason is known."""
    total = summarise(reports)
    if total["lanes"] or total["lane_sent"] or total["lane_received"]:
        raise Failure(f"a lane, with the library at one end only: {json.dumps(total)}")
    return f"ours {json.dumps(total)}"
