#!/usr/bin/env python3
"""RDMA devices that go and come under programs that use them: `rdma link delete` waits until the last process has closed the device.

Two unmodified programs, one of which answers the other, on the network that scripts/vm.d/network makes. A lane counts if both ends
have it, and if their counters say that it carried the bytes.
"""
import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time

DEVICES = {"ib": ("rxe", ("v0", "v1"), ("10.77.0.1", "10.77.0.2")), "rnic": ("siw", ("v2", "v3"), ("10.77.1.1", "10.77.1.2"))}
PATIENCE = 30  # seconds: a guest's clock runs much faster than its programs


def answer(connection):
    with connection:
        try:
            while data := connection.recv(65536):
                connection.sendall(data)
        except OSError:
            pass


def serve(address):
    listener = socket.create_server((address, 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


def pour(connection):
    try:
        while True:
            connection.sendall(b"y" * 65536)
    except OSError:
        pass


def drink(connection):
    try:
        while connection.recv(65536):
            pass
    except OSError:
        pass


def ask(near, far, port):
    """Does what it reads: `connect`; `talk`, which sends something and waits for it; `pour`, which sends and reads without an end;
    `fork`, whose child lives as long as this does."""
    connection, (wait, alive) = None, os.pipe()
    for line in sys.stdin:
        try:
            if line.strip() == "connect":
                connection = socket.create_connection((far, port), source_address=(near, 0))
                connection.settimeout(PATIENCE)
            elif line.strip() == "pour":
                for action in (pour, drink):
                    threading.Thread(target=action, args=(connection,), daemon=True).start()
            elif line.strip() == "fork":
                if os.fork() == 0:
                    os.close(alive)
                    os.read(wait, 1)
                    os._exit(0)
            else:
                for _ in range(20):
                    connection.sendall(b"x" * 1000)
                    left = 1000
                    while left:
                        data = connection.recv(left)
                        if not data:
                            raise ConnectionError("the end came too early")
                        left -= len(data)
            print("ok", flush=True)
        except OSError as error:
            print(repr(error), flush=True)


class Pair:
    def __init__(self, tools, transport):
        self.stat = [tools.sdp, "stat", "--json"]
        self.transport = transport
        _, _, (near, far) = DEVICES[transport]
        env = dict(os.environ, LD_PRELOAD=tools.lib, SDP_TRANSPORT=transport)

        def start(*args):
            return subprocess.Popen(["/usr/bin/python3", __file__, *args], env=env, text=True, stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE)
        self.server = start("serve", far)
        self.client = start("ask", near, far, self.server.stdout.readline().strip())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in (self.client, self.server):
            process.kill()
            process.wait()

    def does(self, what):
        self.client.stdin.write(what + "\n")
        self.client.stdin.flush()
        outcome = self.client.stdout.readline().strip()
        assert outcome, "the client has died"
        assert self.server.poll() is None, "the server has died"
        return outcome

    def lane_bytes(self):
        """What the newest connection's lane brought to each end; None if one has no lane."""
        shown = json.loads(subprocess.run(self.stat, capture_output=True, check=True).stdout)["processes"]
        found = []
        for process in (self.client, self.server):
            connections = [c for p in shown if p["pid"] == process.pid for c in p["connections"]
                           if c["transport"] == self.transport]
            found.append(connections)
        if not all(found):
            return None
        return [max(c["lane"]["bytes_received"] for c in connections) for connections in found]

    def get_lane(self):
        """A new connection that has a lane; those that looked for one too early stay with TCP."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert self.does("connect") == "ok"
            before = None
            for _ in range(10):
                assert self.does("talk") == "ok"
                after = self.lane_bytes()
                if before and after and all(b - a >= 20000 for a, b in zip(before, after)):
                    return
                before = after
        assert False, f"no lane: {subprocess.run(self.stat[:-1], capture_output=True, text=True, check=True).stdout}"


def delete(device):
    """The command cannot be ended while it waits: nothing here waits for it longer than it should take."""
    begun = time.monotonic()
    command = subprocess.Popen(["rdma", "link", "delete", device])
    try:
        assert command.wait(PATIENCE) == 0
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{device}: somebody still has it open") from None
    print(f"{device} is gone after {time.monotonic() - begun:.1f} s", flush=True)


def add(transport):
    kind, links, _ = DEVICES[transport]
    for number, link in enumerate(links):
        subprocess.run(["rdma", "link", "add", f"{kind}{number}", "type", kind, "netdev", link], check=True)


def has(transport):
    return os.path.exists(f"/sys/class/infiniband/{DEVICES[transport][0]}0")


def a_device_goes_and_comes_back(tools, transport):
    kind = DEVICES[transport][0]
    with Pair(tools, transport) as pair:
        pair.get_lane()
        for number in (1, 0):
            delete(f"{kind}{number}")
        print(f"the connection: {pair.does('talk')}", flush=True)
        assert not pair.lane_bytes(), "a lane without a device"
        assert pair.does("connect") == "ok" and pair.does("talk") == "ok"  # by TCP
        add(transport)
        pair.get_lane()


def a_device_goes_under_a_flow(tools, transport):
    with Pair(tools, transport) as pair:
        pair.get_lane()
        assert pair.does("pour") == "ok"
        before = pair.lane_bytes()
        deadline = time.monotonic() + PATIENCE
        while any(b - a < 100000 for a, b in zip(before, pair.lane_bytes())):
            assert time.monotonic() < deadline, "nothing flows"
        for number in (0, 1):
            delete(f"{DEVICES[transport][0]}{number}")
        add(transport)
        pair.get_lane()


def a_device_goes_that_a_child_has_inherited(tools, transport):
    with Pair(tools, transport) as pair:
        pair.get_lane()
        assert pair.does("fork") == "ok"
        for number in (1, 0):
            delete(f"{DEVICES[transport][0]}{number}")
        add(transport)


def the_first_device_comes_after_the_program(tools, transport):
    kinds = [t for t in DEVICES if has(t)]
    for kind in kinds:
        for number in (0, 1):
            delete(f"{DEVICES[kind][0]}{number}")
    with Pair(tools, transport) as pair:
        assert pair.does("connect") == "ok"
        for _ in range(3):
            assert pair.does("talk") == "ok"
        assert not pair.lane_bytes()
        for kind in kinds:
            add(kind)
        pair.get_lane()


CASES = (a_device_goes_and_comes_back, a_device_goes_under_a_flow, a_device_goes_that_a_child_has_inherited,
         the_first_device_comes_after_the_program)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True)
    parser.add_argument("--sdp", required=True)
    parser.add_argument("--transport", choices=DEVICES, required=True)
    tools = parser.parse_args()
    if not has(tools.transport):
        print(f"no {DEVICES[tools.transport][0]} device here")
        sys.exit(77)
    for case in CASES:
        print(case.__name__, flush=True)
        case(tools, tools.transport)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    elif sys.argv[1] == "ask":
        ask(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
