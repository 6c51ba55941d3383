"""Two hosts as the place of a program's test: what run_app.py, which is on either or on a third, does there goes by ssh.

A run's folder has the same name on all. What is in it here is brought to a host before something is started there; the reports are
brought back. What the network of two hosts carries for others nobody can tell from ours: that lanes carried the bytes is by the
library's own counters at both ends.
"""
import io
import os
import shlex
import signal
import subprocess
import tarfile

import harness

ROOT = os.path.dirname(os.path.dirname(harness.HERE))
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Host:
    """Where `shell`, with a command as its last argument, runs that command; `root` is there what ROOT is here."""

    def __init__(self, shell, root):
        self.shell, self.root = shell, root

    def run(self, command, **options):
        if options.get("input") is None:
            options = {"stdin": subprocess.DEVNULL, **{name: value for name, value in options.items() if name != "input"}}
        return subprocess.run([*self.shell, command], capture_output=True, check=False, **options)

    def here(self, argument):
        """What names a file of the tree names it there."""
        return argument.replace(ROOT, self.root, 1) if argument.startswith(ROOT + "/") else argument

    def command(self, argv, env, cwd, user=None):
        argv = [self.here(str(each)) for each in argv]
        as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        # Of the environment what a test has set, not what the one who runs it has here.
        kept = {name: value for name, value in env.items() if name in ("HOME", "LC_ALL") or os.environ.get(name) != value}
        words = [*as_user, "env", "-i", f"PATH={PATH}", *(f"{name}={value}" for name, value in kept.items() if name != "PATH"), *argv]
        return f"cd {shlex.quote(cwd)} && exec " + shlex.join(words)

    def find(self, program):
        return self.run(f"PATH={PATH}; command -v {shlex.quote(program)}", text=True).stdout.strip() or None

    def put(self, folder, leave_out=()):
        """The folder as it is here, but for what is in those of its folders."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(folder, folder.lstrip("/"), filter=lambda each: None if os.path.dirname("/" + each.name) in leave_out else each)
        done = self.run("tar xf - -C / --no-same-owner", input=packed.getvalue())
        if done.returncode != 0:
            raise harness.Failure(f"the files of a run cannot be brought to another host: {done.stderr}")

    def get(self, folder):
        done = self.run(f"tar cf - -C {shlex.quote(folder)} .")
        if done.returncode != 0:
            return  # nothing was started there
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
            tar.extractall(folder)


class Remote:
    """A server on another host, as subprocess.Popen would have it here. It has a process group of its own there."""

    def __init__(self, host, argv, user, number, env, cwd, **options):
        self.args, self._host = argv, host
        self._group_file = os.path.join(cwd, f"group-{number}")
        inner = f"echo $$ >{shlex.quote(self._group_file)}; " + host.command(argv, env, cwd, user)
        self._shell = subprocess.Popen([*host.shell, "exec setsid --wait sh -c " + shlex.quote(inner)], **options)

    def poll(self):
        return self._shell.poll()

    def wait(self, timeout=None):
        return self._shell.wait(timeout)

    @property
    def returncode(self):
        return self._shell.returncode

    @property
    def pid(self):
        return int(self._host.run(f"cat {shlex.quote(self._group_file)}", text=True).stdout or 0)

    def send_signal(self, number):
        self._host.run(f"kill -{int(number)} $(cat {shlex.quote(self._group_file)})")

    def signal_group(self, number):
        self._host.run(f"kill -{int(number)} -- -$(cat {shlex.quote(self._group_file)})")

    def kill(self):
        self.signal_group(signal.SIGKILL)
        self._shell.kill()

    def lives(self):
        table = "ps -eo pgid=,stat= | awk -v group=\"$(cat %s)\" '$1 == group && $2 !~ /^Z/' | grep -q ."
        return self._host.run(table % shlex.quote(self._group_file)).returncode == 0


class Hosts:
    """The server's host and the client's. `address` is the server's, on the network of an RDMA device of that transport."""

    runs = {"sdp": {"server", "client", "observer"}}
    is_root = True  # on both: what has rights to give away needs them

    def __init__(self, transport, policy, address, hosts, slowness=1):
        self.transport, self.address, self.slowness = transport, address, slowness
        self.patience = 3 if slowness > 1 else 1
        self._strict = policy == "sdp"
        self.settings = {"SDP_TRANSPORT": transport, "SDP_POLICY": policy}
        self._server, self._client = hosts
        self._started = 0

    def enter(self):
        harness.find[0] = lambda program: all(host.find(program) for host in (self._server, self._client)) and self._server.find(program)

    def share(self, _case):
        return 0.9 if self._strict else 0.05

    def is_quick(self, kind):
        return self._strict or kind == "tcp"

    @staticmethod
    def meter():
        return None

    @staticmethod
    def library(built, _folder):
        return built

    def _environment(self, host, env):
        return dict(env, LD_PRELOAD=host.here(env["LD_PRELOAD"])) if "LD_PRELOAD" in env else env

    def _bring(self, host, folder):
        host.put(folder, leave_out=(os.path.join(folder, "stats"),))

    def start(self, argv, user, env, cwd, **options):
        self._bring(self._server, cwd)
        self._started += 1
        return Remote(self._server, argv, user, self._started, self._environment(self._server, env), cwd, **options)

    def call(self, role, argv, user=None, env=None, cwd="/", **options):
        host = self._server if role == "server" else self._client
        if cwd != "/":
            self._bring(host, cwd)
        return host.run(host.command(argv, self._environment(host, env or {}), cwd, user), **options)

    @staticmethod
    def signal_group(process, number):
        process.signal_group(number)

    @staticmethod
    def lives(process):
        return process.lives()

    def listening(self, port):
        table = f"cat /proc/net/tcp /proc/net/tcp6 | grep -q '^ *[0-9]*: [0-9A-F]*:{port:04X} [0-9A-F:]* 0A '"
        return self._server.run(table).returncode == 0

    def collect(self, run):
        for host in (self._server, self._client):
            host.get(run.stats_dir)

    def clean_up(self, run):
        for host in (self._server, self._client):
            host.run(f"rm -rf {shlex.quote(run.dir)}")
