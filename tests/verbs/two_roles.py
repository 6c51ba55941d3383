"""What the guest's tests share that run themselves again as two programs, a server and its client, both with the library."""
import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "apps"))
from harness import listening, wait_for  # noqa: E402

NETWORKS = {"ib": ("10.77.0.1", "10.77.0.2"), "rnic": ("10.77.1.1", "10.77.1.2")}


def serve_echo(address, port):
    """Sends back what comes, on any number of connections. Does not return."""
    listener = socket.create_server((address, port), backlog=1024)
    ready = selectors.DefaultSelector()
    ready.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in ready.select():
            if key.fileobj is listener:
                ready.register(listener.accept()[0], selectors.EVENT_READ)
            elif data := key.fileobj.recv(4096):
                key.fileobj.sendall(data)
            else:
                ready.unregister(key.fileobj)
                key.fileobj.close()


class TwoRoles:
    """The running programs: `server` and `client`. Each writes the library's report into a folder that goes with them."""

    def __init__(self, folder, processes):
        self._folder = folder
        self.server, self.client = processes

    def report_of(self, process):
        """Of one that has ended by itself."""
        with open(os.path.join(self._folder, f"{process.pid}.json"), encoding="utf-8") as file:
            return json.load(file)


@contextlib.contextmanager
def two_roles(lib, port, transport, *arguments, roles=("serve", "ask"), settings=None, **options):
    """Starts this test's own program by `--role` twice, the second when the first one listens. Ends both."""
    processes = []
    with tempfile.TemporaryDirectory(prefix="sdpreload-roles-") as folder:
        env = dict(os.environ, LD_PRELOAD=os.path.abspath(lib), SDP_TRANSPORT=transport, SDP_POLICY="sdp",
                   SDP_STATS=os.path.join(folder, "%p.json"))
        env.update(settings or {})
        try:
            for role in roles:
                command = [sys.executable, sys.argv[0], "--transport", transport, *map(str, arguments), "--role", role]
                processes.append(subprocess.Popen(command, env=env, **options))
                if len(processes) == 1:
                    wait_for(lambda: listening(port) or processes[0].poll() is not None, 60, "the server")
            yield TwoRoles(folder, processes)
        finally:
            for each in processes:
                each.kill()
                each.wait()
