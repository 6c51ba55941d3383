#!/usr/bin/env python3
"""kill -9 of one side at hundreds of seeded moments, also in the middle of a switch between TCP and a lane.

The survivor must see what TCP would show (the end of the stream, or ECONNRESET or EPIPE) within a second; bytes that the victim's send()
took must arrive, and be the right ones; and nothing may stay behind: no descriptor, no memfd, no abstract socket.

  kill_test.py --lib FILE | --plain  [--kills N] [--seed S] [--first N]     a failure names its seed; replay: --seed S --kills 1
"""
import argparse
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time

import harness
from harness import Failure, Skip

PEER = os.path.join(harness.HERE, "clients", "kill_peer.py")
WITHIN_S = 15.0  # a hang, not a figure: that is printed
BATCH = 25  # kills that one survivor lives through; survivors that listen and that connect take turns


def plan(seed):
    """What happens in the kill with this seed."""
    r = random.Random(seed)
    shape = r.choice(("victim", "survivor", "both"))
    # Half of the victims kill themselves, after few calls: that is where connections change from TCP to a lane.
    die_after = int(2 ** r.uniform(0, 9)) if r.random() < 0.5 else 0
    return {"seed": seed, "shape": shape, "die_after": die_after, "delay_ms": r.uniform(0, 40), "poll": r.random() < 0.5,
            "slow": r.random() < 0.3, "upgrade": r.choice((1, 2, 8, 8, 30))}


def read_line(process, seconds, what):
    """A line from a child, or a failure: a hung child must not hang the test."""
    deadline = time.monotonic() + seconds
    line = b""
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            raise Failure(f"{what}: nothing said in {seconds} s")
        byte = os.read(process.stdout.fileno(), 65536)
        if not byte:
            raise Failure(f"{what}: ended with status {process.wait()}")
        line += byte
    return line.decode()


class Killer:
    def __init__(self, args, folder):
        self.args, self.folder = args, folder
        self.port = 30000
        self.ends = {}
        self.slowest = 0.0

    def env(self, upgrade, note=None):
        env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        env["PYTHONUNBUFFERED"] = "1"
        if self.args.lib:
            env.update(LD_PRELOAD=self.args.lib, SDP_UPGRADE_MESSAGES=str(upgrade))
            if note:
                env["SDP_STATS"] = note
        return env

    def start(self, *words, upgrade=8, stats=None):
        return subprocess.Popen([harness.PYTHON, "-S", PEER, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=self.log, env=self.env(upgrade, stats), start_new_session=True)

    def batch(self, how, seeds):
        """One survivor and its victims. Returns how many of the survivor's connections had a lane."""
        self.port += 1
        stats = os.path.join(self.folder, f"survivor-{self.port}.json")
        survivor = self.start("survive", how, self.port, stats=stats)
        memfds = []
        fds = []
        try:
            read_line(survivor, 20, "survivor")
            for seed in seeds:
                try:
                    answer = self.kill_one(survivor, how, plan(seed))
                except Failure as failure:
                    raise Failure(f"seed {seed} (survivor does {how}): {plan(seed)}: {failure}") from None
                memfds.append(answer["memfds"])
                fds.append(answer["fds"])
        finally:
            survivor.stdin.close()
            try:
                status = survivor.wait(10)
            except subprocess.TimeoutExpired:
                survivor.kill()
                status = survivor.wait()
        if status != 0:
            raise Failure(f"the survivor of seeds {seeds[0]}..{seeds[-1]} ended with status {status}")
        # What belongs to a killed peer goes a moment later, so single answers are high: it piles up only if the lowest ones grow,
        # by two memfds and more for each of the six or so that had a lane.
        early, late = slice(2, 10), slice(-8, None)  # the first ones also make what a process keeps for good
        if len(fds) >= 16 and (min(fds[late]) > min(fds[early]) + 3 or min(memfds[late]) > min(memfds[early]) + 4):
            raise Failure(f"descriptors or memfds pile up in the survivor of seeds {seeds[0]}..: descriptors {fds}, memfds {memfds}")
        self.nothing_left()
        if not self.args.lib:
            return 0
        with open(stats, encoding="utf-8") as report:
            return sum(json.load(report)["lanes"].values())

    def kill_one(self, survivor, how, order):
        note = os.path.join(self.folder, "note")
        with open(note, "wb") as file:
            file.write(bytes(16))
        words = ["victim", "connect", self.port] if how == "listen" else ["victim", "listen", self.next_port(order)]
        victim = self.start(*words, json.dumps(order), note, upgrade=order["upgrade"])
        try:
            read_line(victim, 20, "victim")
            survivor.stdin.write((json.dumps(order) + "\n").encode())
            survivor.stdin.flush()
            if order["die_after"]:
                # A victim that waits for its survivor may not get to so many calls: both are fine, it is killed in the end.
                try:
                    victim.wait(3)
                except subprocess.TimeoutExpired:
                    pass
            else:
                harness.wait_for(lambda: any(self.noted(note)), 10, "the first byte")
                time.sleep(order["delay_ms"] / 1000)
            if victim.poll() is None:
                victim.send_signal(signal.SIGKILL)
                victim.wait()
            died = time.monotonic()
            taken, _ = self.noted(note)
            try:
                answer = json.loads(read_line(survivor, 2 * WITHIN_S, "survivor"))
            except Failure as failure:
                raise Failure(f"{failure}; {self.look_at(survivor.pid)}") from None
        finally:
            if victim.poll() is None:
                victim.kill()
            victim.wait()
            victim.stdin.close()
            victim.stdout.close()
        took = answer["ended"] - died
        self.slowest = max(self.slowest, took)
        self.ends[answer["end"]] = self.ends.get(answer["end"], 0) + 1
        if answer["end"] not in ("EOF", "ECONNRESET", "EPIPE"):
            raise Failure(f"the survivor's connection ended with {answer['end']}")
        if order["shape"] == "survivor" and answer["end"] == "EOF":
            raise Failure("a sender saw the end of a stream that it does not read")
        if took > WITHIN_S:
            raise Failure(f"the survivor noticed after {took:.2f} s")
        if answer["wrong"]:
            raise Failure(answer["wrong"])
        # A victim that leaves bytes unread resets the connection, and TCP then drops what is on its way: only without is all owed.
        if order["shape"] == "victim" and answer["received"] < taken:
            raise Failure(f"send() took {taken} bytes, {answer['received']} arrived; the end was {answer['end']}")
        return answer

    @staticmethod
    def look_at(pid):
        """Where a process that says nothing is, and what its sockets look like to the kernel."""
        state = []
        for name in ("wchan", "syscall", "stat"):
            try:
                with open(f"/proc/{pid}/{name}", encoding="utf-8") as file:
                    state.append(f"{name}: {file.read().strip()}")
            except OSError as error:
                state.append(f"{name}: {error}")
        sockets = subprocess.run([harness.need("ss"), "-tanoi"], capture_output=True, text=True, check=False).stdout
        return "\n".join(state + [sockets])

    def next_port(self, order):
        self.port += 1
        order["port"] = self.port
        return self.port

    @staticmethod
    def noted(path):
        with open(path, "rb") as file:
            return struct.unpack("=QQ", file.read(16))

    @staticmethod
    def nothing_left():
        """This namespace is ours alone: with every process gone no Unix socket may be left in it."""
        def names():
            with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
                return [line.split()[7] for line in list(table)[1:] if len(line.split()) > 7]
        try:
            harness.wait_for(lambda: not names(), 2, "abstract sockets to go")
        except Failure:
            raise Failure(f"left behind: Unix sockets {names()}") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lib")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="of the first kill; the others follow it")
    parser.add_argument("--how", choices=("listen", "connect"), help="what the survivor does; both in turns, without it")
    args = parser.parse_args()
    if not args.plain and not args.lib:
        parser.error("--lib FILE or --plain is needed")
    args.lib = None if args.plain else os.path.abspath(args.lib)
    try:
        harness.enter_private_network()
    except Skip as skip:
        print(f"skipped: {skip}")
        return harness.SKIPPED
    start = time.monotonic()
    failures = lanes = 0
    with tempfile.TemporaryDirectory(prefix="sdp-kill-") as folder, open(os.path.join(folder, "log"), "w+b") as log:
        killer = Killer(args, folder)
        killer.log = log
        done = number = 0
        # On a busy machine most die before their lane is up: more are killed until enough had one, up to four times as many.
        while done < args.kills or (args.lib and lanes < args.kills / 6 and done < 4 * args.kills):
            seeds = range(args.seed + done, args.seed + min(done + BATCH, args.kills if done < args.kills else done + BATCH))
            how = args.how or ("listen", "connect")[number % 2]
            done += len(seeds)
            number += 1
            try:
                lanes += killer.batch(how, list(seeds))
            except Failure as failure:
                failures += 1
                print(f"FAILED: {failure}\n(replay with --kills 1 --seed SEED --how listen|connect as it says)", flush=True)
                if failures == 5:
                    break
        if args.lib and not failures and lanes < args.kills / 6:
            failures += 1
            print(f"FAILED: only {lanes} connections of {done} had a lane: that tests TCP")
        log.seek(0)
        said = log.read().decode(errors="replace")
        if failures and said:
            print("--- said by the processes\n" + said[-3000:])
    print(f"{done} kills from seed {args.seed}, {lanes} with a lane at the survivor, ends {killer.ends}, slowest "
          f"{killer.slowest:.2f} s, {time.monotonic() - start:.0f} s in all: {'FAILED' if failures else 'passed'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
