#!/usr/bin/env python3
"""What the settings do to a connection: policy sdp, rule files, and mistakes in both.

    policy_test.py --lib LIBRARY

Each case is a netperf run in a network namespace of its own, judged by SDP_STATS and by what is said on standard error.
"""
import argparse
import glob
import json
import os
import subprocess
import sys
import tempfile

from harness import enter_private_network, listening, need, wait_for

PORT = 12865
BOTH_SEND_FIRST = """
import socket, threading
listener = socket.create_server(("127.0.0.1", 0))
ends = [socket.create_connection(listener.getsockname())]
ends.append(listener.accept()[0])

def talk(end):
    end.sendall(b"x" * 100_000)
    left = 100_000
    while left:
        left -= len(end.recv(left))

threads = [threading.Thread(target=talk, args=(end,)) for end in ends]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def no_process_left(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


class Case:
    def __init__(self, library, folder):
        self.library, self.folder = library, folder

    def run(self, server, client, test="TCP_RR", ok=True):
        """`server`, `client`: settings, or None for a side without the library."""
        for old in glob.glob(os.path.join(self.folder, "*.json")):
            os.unlink(old)
        base = {k: v for k, v in os.environ.items() if not k.startswith("SDP_")}

        def env(settings):
            if settings is None:
                return base
            return dict(base, LD_PRELOAD=self.library, SDP_STATS=os.path.join(self.folder, "%p.json"), SDP_UPGRADE_MESSAGES="2", **settings)
        daemon = subprocess.Popen([need("netserver"), "-D", "-4", "-p", str(PORT)], env=env(server), stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            wait_for(lambda: listening(PORT), 20, "netserver")
            done = subprocess.run([need("netperf"), "-P", "0", "-4", "-H", "127.0.0.1", "-p", str(PORT), "-l", "1", "-t", test],
                                  env=env(client), capture_output=True, text=True, timeout=60, check=False)
        finally:
            daemon.terminate()
            daemon.wait()
        wait_for(lambda: no_process_left(daemon.pid), 20, "netserver's children, which write their reports as they end")
        assert (done.returncode == 0) == ok, f"netperf ended with {done.returncode}: {done.stdout}{done.stderr}"
        total = {"lane": 0, "tcp": 0, "reasons": {}, "said": done.stderr}
        for path in glob.glob(os.path.join(self.folder, "*.json")):
            with open(path, encoding="utf-8") as f:
                report = json.load(f)
            total["lane"] += sum(report["bytes"]["lane"].values())
            total["tcp"] += sum(report["bytes"]["tcp"].values())
            for reason, n in report["reasons"].items():
                total["reasons"][reason] = total["reasons"].get(reason, 0) + n
        return total

    def rules(self, text):
        path = os.path.join(self.folder, "rules.conf")
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
        return path


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True)
    library = os.path.abspath(parser.parse_args().lib)
    enter_private_network()
    with tempfile.TemporaryDirectory(prefix="sdpreload-policy-") as folder:
        case = Case(library, folder)
        for test in ("TCP_RR", "TCP_STREAM"):
            got = case.run({"SDP_POLICY": "sdp"}, {"SDP_POLICY": "sdp"}, test)
            assert got["lane"] > 1000 and got["tcp"] == 0, f"policy sdp let bytes go by TCP: {got}"
        got = case.run(None, {"SDP_POLICY": "sdp"}, ok=False)
        assert "policy sdp" in got["said"] and "no_peer" in got["said"], got
        assert got["tcp"] == 0, got
        env = dict(os.environ, LD_PRELOAD=library, SDP_POLICY="sdp")
        subprocess.run([sys.executable, "-c", BOTH_SEND_FIRST], env=env, timeout=30, check=True)

        got = case.run({"SDP_POLICY": "tcp"}, {})
        assert got["lane"] == 0 and got["tcp"] > 1000, got

        rules = case.rules(f"use tcp client * *:{PORT}\nuse both client * *:*\nuse both server * *:*\n")
        got = case.run({}, {"SDP_CONFIG": rules})
        assert got["reasons"].get("policy_tcp", 0) == 1 and got["lane"] > 1000, f"the control connection alone was to stay on TCP: {got}"
        rules = case.rules("use tcp server netserver *:*\n")
        got = case.run({"SDP_CONFIG": rules}, {})
        assert got["lane"] == 0 and got["reasons"].get("policy_tcp", 0) >= 1, got

        rules = case.rules("use both client * *:*\nuse maybe server * *:*\n")
        got = case.run({}, {"SDP_CONFIG": rules})
        assert f"{rules}:2:" in got["said"] and got["lane"] == 0, f"a mistake in a rule: {got}"
        got = case.run({}, {"SDP_POLICY": "perhaps"})
        assert "SDP_POLICY" in got["said"] and got["lane"] == 0 and got["tcp"] > 1000, got
        got = case.run({}, {"SDP_SPIN_US": "soon"})
        assert "SDP_SPIN_US" in got["said"], got
    print("every setting did what it says")


if __name__ == "__main__":
    sys.exit(main())
