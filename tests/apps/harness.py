"""What every program's test needs: a private network, processes with or without the library, and the proof of who carried the bytes.

A case is run over plain TCP and over SDP, and the outcomes must be equal. Who carried the bytes is told twice: by the library's own
report (SDP_STATS), and by the kernel, whose counters of the private namespace's `lo` and of TCP segments see every byte that
did not go by a lane. Nothing else runs in that namespace, so a byte more there is a byte of ours.

In the guest of scripts/vm the same cases run over its RDMA devices, on the network that scripts/vm.d/network makes; and between two
hosts (hosts.py), the servers on one and the clients on the other.
"""
import ctypes
import glob
import hashlib
import json
import os
import shutil
import signal
import socket
import struct
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


class Late(Failure):
    """Too much had gone by TCP before the lanes were up: on a machine as busy as this one, the case has to move more."""


def find_program(program):
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


find = [find_program]  # how; where the programs run on other hosts, those look


def need(*programs):
    """The full paths of programs; skips the case if one is not installed."""
    paths = []
    for program in programs:
        path = find[0](program)
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


class OnThisHost:
    """A place whose servers and clients all run here."""

    is_root = os.getuid() == 0
    patience = 1  # of its deadlines

    @staticmethod
    def library(built, folder):
        """Where other users reach it too, wherever the build lies."""
        for module in glob.glob(os.path.join(os.path.dirname(built), "libsdpverbs.so")):
            shutil.copy(module, folder)
        return shutil.copy(built, folder)

    @staticmethod
    def start(argv, user=None, **options):
        return subprocess.Popen(argv, user=user, group=user, extra_groups=[] if user else None, start_new_session=True, **options)

    @staticmethod
    def call(_role, argv, user=None, **options):
        return subprocess.run(argv, user=user, group=user, extra_groups=[] if user else None, start_new_session=True, check=False,
                              capture_output=True, **options)

    @staticmethod
    def signal_group(process, number):
        os.killpg(process.pid, number)

    @staticmethod
    def lives(process):
        """Whether a process of its group is there that has not ended: one that forks may be outlived by its children for a while."""
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return False
        for path in glob.glob("/proc/[0-9]*/stat"):
            try:
                with open(path, encoding="utf-8", errors="replace") as stat:
                    state, _, its_group = stat.read().rsplit(")", 1)[1].split()[:3]
            except OSError:
                continue  # ended meanwhile
            if int(its_group) == process.pid and state != "Z":
                return True
        return False

    @staticmethod
    def listening(port):
        return listening(port)

    def meter(self):
        return Meter(self)

    @staticmethod
    def collect(run):
        """Brings the reports of a run's processes into its folder."""

    @staticmethod
    def clean_up(run):
        """Removes what is left of the run elsewhere."""


class Loopback(OnThisHost):
    """One host: lanes on the software device, both ends at 127.0.0.1."""

    transport, address, settings = "local", "127.0.0.1", {}
    slowness = 1  # of the machine: what a case moves is the less
    runs = {"sdp": {"server", "client"}, "only client": {"client"}, "only server": {"server"}}  # and who is preloaded

    @staticmethod
    def enter():
        enter_private_network()

    @staticmethod
    def share(case):
        return case.share

    @staticmethod
    def is_quick(kind):
        return kind.startswith("only")

    @staticmethod
    def read():
        with open("/proc/net/dev", encoding="ascii") as dev:
            (line,) = (line for line in dev if line.strip().startswith("lo:"))
        return {"lo_bytes": int(line.split(":")[1].split()[8])}


class Wire(OnThisHost):
    """A wire with an RDMA device at either end. How much TCP carries before a lane is up depends on the machine there; with the policy
    `sdp` it is nothing. Soft-iWARP's own connections are the kernel's TCP too: the program's are told by their ports, and their packets
    are counted where they pass."""

    slowness = 16
    runs = {"sdp": {"server", "client", "observer"}}

    def __init__(self, transport, policy):
        self.transport = transport
        self._strict = policy == "sdp"
        self.settings = {"SDP_TRANSPORT": transport, "SDP_POLICY": policy}
        self.address, self._netdev = {"ib": ("10.77.0.1", "v0"), "rnic": ("10.77.1.1", "v2")}[transport]
        self._packets = 0
        self._tap = None

    def enter(self):
        if not os.path.exists(f"/sys/class/net/{self._netdev}"):
            raise Skip("not in the guest of scripts/vm")
        first, last = Run.PORTS.start, Run.PORTS.stop - 1
        code = [(0x28, 0, 0, 0xFFFFF000), (0x15, 0, 9, 0x0800),               # Ethernet's protocol
                (0x30, 0, 0, 9), (0x15, 0, 7, socket.IPPROTO_TCP),            # IP's
                (0xb1, 0, 0, 0), (0x48, 0, 0, 0),                             # the source port
                (0x35, 0, 1, first), (0x25, 0, 4, last),
                (0x48, 0, 0, 2), (0x35, 0, 1, first), (0x25, 0, 1, last),     # the destination port
                (0x06, 0, 0, 0), (0x06, 0, 0, 1)]
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
        self._tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        self._tap.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HL", len(code), ctypes.addressof(program)))  # SO_ATTACH_FILTER
        self._tap.bind((self._netdev, 3))  # ETH_P_ALL: both ways

    def share(self, _case):
        return 0.9 if self._strict else 0.05

    def is_quick(self, kind):
        return self._strict or kind == "tcp"

    def read(self):
        # What its buffer has no room for counts too; every answer begins anew.
        self._packets += struct.unpack("II", self._tap.getsockopt(263, 6, 8))[0]  # SOL_PACKET, PACKET_STATISTICS
        return {"anchor_packets": self._packets}


class Meter:
    """The kernel's counters of this network namespace since the object was made."""

    def __init__(self, place):
        self._place = place
        self._start = self._read()

    def _read(self):
        counters = self._place.read()
        with open("/proc/net/snmp", encoding="ascii") as snmp:
            rows = [line.split() for line in snmp if line.startswith("Tcp:")]
        tcp = dict(zip(rows[0][1:], rows[1][1:]))
        counters["segments"] = counters["anchor_packets"] if self._place.transport == "rnic" else int(tcp["OutSegs"])
        counters["opens"] = int(tcp["ActiveOpens"])
        return counters

    def delta(self):
        now = self._read()
        return {name: now[name] - self._start[name] for name in now}


def sockets(port, state):
    """How many TCP sockets of that local port in that state this namespace has. Asks no question of the server itself."""
    count = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table, encoding="ascii") as rows:
            for row in list(rows)[1:]:
                fields = row.split()
                count += fields[3] == state and int(fields[1].rsplit(":", 1)[1], 16) == port
    return count


def listening(port):
    return sockets(port, "0A") > 0


def connections(port):
    return sockets(port, "01")


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as numbers:
        return set(numbers.read().split())


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digest(folder):
    """Of the names and the bytes of all files below."""
    every = hashlib.sha256()
    for path in sorted(glob.glob(os.path.join(folder, "**"), recursive=True)):
        every.update(os.path.relpath(path, folder).encode())
        if os.path.isfile(path):
            every.update(file_digest(path).encode())
    return every.hexdigest()


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(f"waited {seconds} s for {what}")
        time.sleep(0.01)


class Run:
    """One run of a case: a folder, its processes, and each role ('server', 'client') with or without the library."""

    PORTS = range(20000, 21000)
    _port = PORTS.start

    def __init__(self, name, library, preloaded, quick, place, stretch=1):
        self.name = name
        self.place = place
        self.address = place.address
        self.host = f"[{place.address}]" if ":" in place.address else place.address  # with a port behind it
        self.family = "-6" if ":" in place.address else "-4"
        self.preloaded = preloaded  # set of roles
        self.quick = quick          # the outcome counts, not the amount
        self.stretch = stretch      # times what the case moves, or the time it takes
        self.dir = tempfile.mkdtemp(prefix="sdp-app-")
        os.chmod(self.dir, 0o755)
        self.library = place.library(library, self.dir) if library else None
        self.stats_dir = os.path.join(self.dir, "stats")
        os.mkdir(self.stats_dir)
        os.chmod(self.stats_dir, 0o777)  # workers that gave up root write there too
        self._running = []

    def port(self):
        """A port that no run before has used: some servers don't set SO_REUSEADDR."""
        Run._port += 1
        return Run._port

    def amount(self, count):
        """So much of something as this machine is quick enough for."""
        return count * self.stretch // self.place.slowness

    @property
    def seconds(self):
        """How long a program runs that is told the time, and not the amount."""
        return (1 if self.quick else 2) * self.stretch

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
            env.update(self.place.settings)
        env.update(extra or {})
        return env

    def server(self, argv, port, role="server", stop=signal.SIGTERM, user=None, env=None, ready=None, timeout=20):
        """Starts a server and waits until it listens. Stopped at the end of the run, with the given signal."""
        log = open(self.path(f"{role}-{len(self._running)}.log"), "wb")
        process = self.place.start(argv, user, env=self.env(role, env), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.dir)
        log.close()
        self._running.append((process, stop))

        def up():
            if process.poll() is not None:
                raise Failure(f"{argv[0]} ended at once with status {process.returncode}\n{self.logs()}")
            return ready() if ready else self.place.listening(port)
        wait_for(up, timeout * self.place.patience, f"{os.path.basename(argv[0])} to listen on {port}")
        return process

    def client(self, argv, role="client", timeout=40, check=True, env=None, text=True, stdin=None):
        """Runs a client to its end; the outcome has .stdout and .returncode."""
        try:
            done = self.place.call(role, argv, env=self.env(role, env), input=stdin, text=text, cwd=self.dir,
                                   timeout=timeout * self.place.patience)
        except subprocess.TimeoutExpired as expired:
            raise Failure(f"{' '.join(map(str, argv))}: did not end in {timeout} s\n{expired.stdout}\n{self.logs()}") from None
        if check and done.returncode != 0:
            raise Failure(f"{' '.join(map(str, argv))}: status {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}")
        return done

    def under(self, role):
        """What goes before a command that another program starts, for it to have that role."""
        own = self.env(role)
        names = [name for name in own if name == "LD_PRELOAD" or name.startswith("SDP_")]
        return ["env", "-u", "LD_PRELOAD", *(f"{name}={own[name]}" for name in names)]

    def prepare(self, argv, user=None):
        """Runs a command where the server will be, as that user and without the library."""
        done = self.place.call("server", argv, user, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}, text=True, cwd=self.dir)
        if done.returncode != 0:
            raise Failure(f"{' '.join(argv)}: status {done.returncode}\n{done.stdout}\n{done.stderr}")

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
                    process.wait(10 * self.place.patience)
                except subprocess.TimeoutExpired:
                    stuck.append(f"{process.args[0]} did not end within 10 s of {stop.name}")
                    process.kill()
            process.wait()
            try:
                wait_for(lambda: not self.place.lives(process), 10 * self.place.patience, f"what {process.args[0]} left to end")
            except Failure as failure:
                stuck.append(str(failure))
                self.place.signal_group(process, signal.SIGKILL)
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
        self.place.collect(self)
        reports = []
        for path in sorted(glob.glob(os.path.join(self.stats_dir, "*.json"))):
            try:
                with open(path, encoding="utf-8") as report:
                    reports.append(dict(json.load(report), role=os.path.basename(path).split("-")[0]))
            except ValueError as error:
                raise Failure(f"{os.path.basename(path)} is no JSON: {error}") from None
        return reports

    def cleanup(self):
        self.place.clean_up(self)
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


def prove_lanes(reports, kernel, share, transport="local", unread=0, lanes=2, unseen=0):
    """Lanes, `lanes` ends of them at least, carried `share` of the stream, and the kernel's own counters agree. Returns the figures for
    the record."""
    total = summarise(reports)
    stream = total["lane_sent"] + total["tcp_sent"]
    figures = f"ours {json.dumps(total)}, kernel {json.dumps(kernel) if kernel else 'not asked'}"
    for role in ("server", "client"):
        mine = summarise([r for r in reports if r["role"] == role])
        if mine["lanes"] == 0 or mine["lane_sent"] + mine["lane_received"] == 0:
            raise Late(f"the {role} had no lane: {figures}")
    if any(count for report in reports for kind, count in report["lanes"].items() if kind != transport):
        raise Failure(f"a lane that is not of {transport}: {[report['lanes'] for report in reports]}")
    if total["lanes"] < lanes:
        raise Late(f"{total['lanes']} ends of lanes instead of {lanes}: {figures}")
    if total["lane_sent"] < share * stream:
        raise Late(f"lanes carried less than {share:.0%} of what was sent: {figures}")
    # A reader may end with bytes unread, but nobody reads what was not sent.
    if not 0.9 * total["lane_sent"] - unread <= total["lane_received"] <= total["lane_sent"]:
        raise Failure(f"lane bytes sent and received do not agree: {figures}")
    if not kernel:
        return figures
    # What TCP may have: its own share with headers and acknowledgements, and each connection's set-up and end.
    bytes_allowed = 2 * total["tcp_sent"] + 150 * total["tcp_messages"] + 4000 * (kernel["opens"] + 1) + 0.05 * total["lane_sent"] + 1.1 * unseen
    segments_allowed = 50 * (kernel["opens"] + 1) + 0.1 * total["lane_messages"] + 3 * total["tcp_messages"] + total["tcp_sent"] / 100 + unseen / 100
    if total["tcp_sent"] == 0:
        segments_allowed = 20 * (kernel["opens"] + 1)
    if kernel.get("lo_bytes", 0) > bytes_allowed:
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
