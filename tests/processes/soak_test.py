#!/usr/bin/env python3
"""Pairs of programs at random, for as long as is asked for: see soak_end.py for what they do. No byte is lost, changed or doubled, nobody
hangs, and when all are gone nothing is left of them: no process, no name, and in a process that has served them no memory and no descriptor.

    soak_test.py --lib LIBRARY [--seconds N] [--seed N] [--pairs N]

A failure prints what replays the pair: --seed N --pairs 1.
"""
import argparse
import concurrent.futures
import glob
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

import ends

END = os.path.join(os.path.dirname(os.path.abspath(__file__)), "soak_end.py")
ADDRESS = "127.0.0.1"
AT_ONCE = 3
PATIENCE = 120    # seconds for one pair
SLACK_KIB = 4096  # what a process that serves may grow by, over hundreds of connections


def names():
    with open("/proc/net/unix", encoding="ascii", errors="replace") as rows:
        abstract = {row.split()[-1] for row in rows if "@" in row}
    return abstract | set(os.listdir("/dev/shm"))


class Soak:
    def __init__(self, args):
        self.args = args

    def environment(self, folder, chance):
        env = ends.environment(LD_PRELOAD=self.args.lib, SOAK_PRELOAD=self.args.lib, SDP_STATS=f"{folder}/%p.json",
                               SDP_UPGRADE_MESSAGES=str(chance.choice((1, 8, 100))))
        if chance.random() < 0.3:
            env.update(SDP_RECV_BUFFER_MAX="2048", SDP_RECV_BUFFERS="8")
        return env

    def start(self, env, *command):
        return subprocess.Popen([sys.executable, END, *command], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                start_new_session=True)

    def pair(self, seed):
        """What lanes and TCP have carried."""
        chance = random.Random(f"pair {seed}")
        kind = chance.choice(("both",) * 7 + ("plain server", "plain client", "killed"))
        with tempfile.TemporaryDirectory(prefix="sdpreload-soak-") as folder:
            def env(role):
                return ends.environment() if kind == f"plain {role}" else self.environment(folder, chance)
            two = {"server": self.start(env("server"), "serve", ADDRESS, str(seed))}
            try:
                port = two["server"].stdout.readline().strip()
                two["client"] = self.start(env("client"), "connect", f"{ADDRESS}:{port}", str(seed))
                if kind == "killed":
                    time.sleep(chance.uniform(0.1, 1.5))
                    killed = chance.choice(list(two))
                    os.killpg(two[killed].pid, signal.SIGKILL)
                said = {}
                for role, end in two.items():
                    said[role] = end.communicate(timeout=PATIENCE)[0].strip()
                words = {role: text.split() for role, text in said.items()}
                if kind == "killed":
                    fine = all(w[:1] in (["ok"], ["reset"]) or role == killed or "the end after" in said[role] or "the last byte" in said[role]
                               for role, w in words.items())
                else:
                    fine = all(w[:1] == ["ok"] for w in words.values()) and words["server"][1:] == words["client"][:0:-1]
                assert fine, f"{kind}: {said}"
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{kind}: somebody hangs: {self.stacks(two)}") from None
            finally:
                for end in two.values():
                    try:
                        os.killpg(end.pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                    end.wait()
            carried = [0, 0]
            for report in glob.glob(f"{folder}/*.json"):
                with open(report, encoding="utf-8") as file:
                    told = json.load(file)
                carried[0] += told["bytes"]["lane"]["received"]
                carried[1] += told["bytes"]["tcp"]["received"]
            return carried

    @staticmethod
    def stacks(two):
        """Where everybody of the pair's is, as the kernel says."""
        told = []
        for entry in glob.glob("/proc/[0-9]*/stat"):
            try:
                with open(entry, encoding="ascii", errors="replace") as stat:
                    fields = stat.read().rsplit(")", 1)[1].split()
                if int(fields[3]) in [end.pid for end in two.values()]:
                    pid = entry.split("/")[2]
                    with open(f"/proc/{pid}/wchan", encoding="ascii") as wchan:
                        told.append(f"{pid} {fields[0]} {wchan.read()}")
            except OSError:
                pass
        return told

    def pool(self):
        """A process that has served hundreds holds what it held after the first of them."""
        chance = random.Random(f"pool {self.args.seed}")
        client = """if True:
            import socket, struct, sys, os
            for n in range(40):
                s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
                for _ in range(12):
                    s.sendall(b'x' * 3000)
                    left = 3000
                    while left: left -= len(s.recv(left))
                if n % 4 == 1: s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                if n % 4 == 2: s.shutdown(socket.SHUT_WR)
                if n % 4 == 3: s.send(b'unread')
                s.close()
            os.kill(os.getpid(), 9) if sys.argv[3] == 'killed' else None
        """
        with tempfile.TemporaryDirectory(prefix="sdpreload-soak-") as folder:
            server = self.start(self.environment(folder, chance), "pool", ADDRESS)
            try:
                port = server.stdout.readline().strip()
                held = []
                for turn in range(10):
                    subprocess.run([sys.executable, "-c", client, ADDRESS, port, "killed" if turn % 3 == 2 else ""],
                                   env=self.environment(folder, chance), timeout=PATIENCE, check=False)
                    deadline = time.monotonic() + 20
                    while True:  # what its peers have left may take a moment
                        server.stdin.write("\n")
                        server.stdin.flush()
                        held.append([int(word) for word in server.stdout.readline().split()])
                        if len(held) == 1 or held[-1][0] <= held[0][0] or time.monotonic() > deadline:
                            break
                        time.sleep(0.1)
                    del held[1:-1]
                assert held[-1][0] <= held[0][0], f"descriptors: {held[0][0]} after 40 connections, {held[-1][0]} after 400"
                assert held[-1][1] <= held[0][1] + SLACK_KIB, f"KiB: {held[0][1]} after 40 connections, {held[-1][1]} after 400"
                return f"descriptors {held[0][0]} and {held[-1][0]}, KiB {held[0][1]} and {held[-1][1]}, after 40 and 400 connections"
            finally:
                server.kill()
                server.wait()

    def run(self):
        before, end = names(), time.monotonic() + self.args.seconds
        seeds = iter(range(self.args.seed, self.args.seed + self.args.pairs)) if self.args.pairs else iter(range(self.args.seed, 1 << 40))
        lane = tcp = ran = 0
        failures = []
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as crew:
            under_way = {}
            for seed in seeds:
                under_way[crew.submit(self.pair, seed)] = seed
                if len(under_way) == AT_ONCE:
                    done, _ = concurrent.futures.wait(under_way, return_when=concurrent.futures.FIRST_COMPLETED)
                else:
                    done = ()
                for each in done:
                    ran += 1
                    failures += self.outcome(each, under_way.pop(each))
                    lane, tcp = (a + b for a, b in zip((lane, tcp), each.result() if not each.exception() else (0, 0)))
                if failures or (not self.args.pairs and time.monotonic() > end):
                    break
            for each, seed in under_way.items():
                ran += 1
                failures += self.outcome(each, seed)
                lane, tcp = (a + b for a, b in zip((lane, tcp), each.result() if not each.exception() else (0, 0)))
        if not failures:
            print(f"one server of many: {self.pool()}")
        print(f"{ran} pairs; {lane} bytes by lanes, {tcp} by TCP")
        assert not failures, "\n".join(failures)
        assert ran < 20 or lane > tcp / 20, "lanes have carried next to nothing"
        deadline = time.monotonic() + 10
        while (left := names() - before) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"left behind: {left}"

    @staticmethod
    def outcome(done, seed):
        return [f"--seed {seed} --pairs 1: {done.exception()}"] if done.exception() else []


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lib", required=True, type=os.path.abspath)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=0, help="so many, however long they take")
    args = parser.parse_args()
    try:
        Soak(args).run()
    except AssertionError as problem:
        sys.exit(f"soak: {problem}")


if __name__ == "__main__":
    main()
