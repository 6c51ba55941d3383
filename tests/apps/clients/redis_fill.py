"""Fills a Redis server with repeatable data: redis_fill.py ADDRESS PORT KEYS. Reads every eighth value back and compares it."""
import random
import socket
import sys

address, port, keys = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
generator = random.Random(7)
block = generator.randbytes(200_000)
with socket.create_connection((address, port)) as link:
    replies = link.makefile("rb")
    # A fixed number of keys is a fixed data set only if runs of any size write the same ones: later rounds write the same again.
    for i in range(keys):
        n = i % 200
        value = block[n * 100:n * 100 + 1 + (n * 7919) % 100_000]
        link.sendall(b"*3\r\n$3\r\nSET\r\n$%d\r\nk%d\r\n$%d\r\n%s\r\n" % (len(str(n)) + 1, n, len(value), value))
        assert replies.readline() == b"+OK\r\n"
        if i % 8 == 0:
            link.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\nk%d\r\n" % (len(str(n)) + 1, n))
            assert replies.readline() == b"$%d\r\n" % len(value)
            assert replies.read(len(value) + 2) == value + b"\r\n"
