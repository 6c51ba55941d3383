"""memcached_client.py ADDRESS PORT ROUNDS: several connections at once, one thread each; prints what was compared."""
import random
import socket
import sys
import threading

address, port, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
block = random.Random(3).randbytes(500_000)
wrong = []


def talk(who):
    try:
        with socket.create_connection((address, port)) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            replies = link.makefile("rb")
            for i in range(100 * rounds):
                key = b"%d-%d" % (who, i % 50)
                value = block[i * 37:i * 37 + 1 + (i * 7919 + who * 104729) % 90_000]
                link.sendall(b"set %s 0 0 %d\r\n%s\r\n" % (key, len(value), value))
                assert replies.readline() == b"STORED\r\n"
                link.sendall(b"get %s\r\n" % key)
                assert replies.readline() == b"VALUE %s 0 %d\r\n" % (key, len(value))
                assert replies.read(len(value) + 7) == value + b"\r\nEND\r\n"
    except Exception as error:  # reported by the main thread
        wrong.append(f"connection {who}: {error!r}")


threads = [threading.Thread(target=talk, args=(who,)) for who in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
if wrong:
    sys.exit("\n".join(wrong))
print("every value came back as it was stored")
