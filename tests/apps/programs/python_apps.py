"""Debian's Python: http.server with urllib, and asyncio streams, which are level-triggered epoll."""
import os
import signal

from harness import HERE, PYTHON
from . import Case

PROGRAM = ("Python", "python3.11")


def http_server(r):
    port = r.port()
    os.mkdir(r.path("www"))
    r.random_file("www/data", r.amount(150 << 20))
    r.server([PYTHON, "-m", "http.server", "--bind", r.address, "--directory", r.path("www"), str(port)], port, stop=signal.SIGINT)
    return r.python("http_get.py", f"http://{r.host}:{port}/data").stdout


def asyncio_echo(r):
    port = r.port()
    script = os.path.join(HERE, "clients", "asyncio_echo.py")
    r.server([PYTHON, script, "serve", r.address, str(port)], port)
    return r.python("asyncio_echo.py", "talk", r.address, port, r.amount(4096 if r.quick else 16384)).stdout


CASES = [
    Case("python_http_server", http_server, "http.server and urllib, 150 MB", share=0.6, payload=150 << 20),
    # Eight connections get their lanes while one busy loop moves their first megabytes by TCP: a share, not all.
    Case("python_asyncio", asyncio_echo, "asyncio streams, 8 connections, both ways at once", share=0.3, payload=8 << 20),
]
