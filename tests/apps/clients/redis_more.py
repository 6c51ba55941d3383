"""redis_more.py ADDRESS PORT ROUNDS: transactions of several clients at once, and messages that a subscriber must get, each once and in order.
The append-only file is rewritten in the middle of them."""
import socket
import sys
import threading

address, port, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
wrong = []


class Link:
    def __init__(self):
        self.sock = socket.create_connection((address, port), timeout=20)
        self.replies = self.sock.makefile("rb")

    def send(self, *words):
        words = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        self.sock.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words))

    def reply(self):
        line = self.replies.readline()
        kind, rest = line[:1], line[1:-2]
        if kind == b"*":
            return [self.reply() for _ in range(int(rest))]
        if kind == b"$":
            return self.replies.read(int(rest) + 2)[:-2] if int(rest) >= 0 else None
        assert kind in b"+:" and kind, line
        return int(rest) if kind == b":" else rest

    def ask(self, *words):
        self.send(*words)
        return self.reply()


def guarded(work):
    def run(*args):
        try:
            work(*args)
        except Exception as error:  # reported by the main thread
            wrong.append(f"{work.__name__}{args}: {error!r}")
    return run


@guarded
def transact(who):
    link, payload = Link(), bytes([65 + who]) * 3000
    for number in range(rounds):
        assert link.ask("MULTI") == b"OK"
        assert link.ask("INCR", "all") == b"QUEUED"
        assert link.ask("SET", f"{who}-{number % 50}", payload + b"%d" % number) == b"QUEUED"
        assert link.ask("RPUSH", f"list-{who}", number) == b"QUEUED"
        count, done, length = link.ask("EXEC")
        assert done == b"OK" and length == number + 1 and count >= length, (count, done, length)


@guarded
def publish():
    link = Link()
    for number in range(rounds):
        assert link.ask("PUBLISH", "news", b"%d " % number + b"n" * (number % 2000)) == 1
        if number == rounds // 4:
            assert b"started" in link.ask("BGREWRITEAOF")


@guarded
def listen(link):
    for number in range(rounds):
        kind, channel, text = link.reply()
        assert (kind, channel, text) == (b"message", b"news", b"%d " % number + b"n" * (number % 2000)), (number, text[:20])


subscriber = Link()
assert subscriber.ask("SUBSCRIBE", "news") == [b"subscribe", b"news", 1]
threads = [threading.Thread(target=transact, args=(who,)) for who in range(4)]
threads += [threading.Thread(target=publish), threading.Thread(target=listen, args=(subscriber,))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
if wrong:
    sys.exit("\n".join(wrong))
link = Link()
assert link.ask("GET", "all") == b"%d" % (4 * rounds)
print("every transaction counted, and every message came once")
