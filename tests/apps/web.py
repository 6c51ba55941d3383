"""HTTP clients for the tests of servers and proxies: curl for the bytes, wrk for many connections."""
import concurrent.futures
import hashlib
import re

from harness import Failure, connections, need, wait_for


def fetch(r, url, *options, **others):
    """The digest of what curl gets there."""
    return hashlib.sha256(r.client([need("curl"), "-sS", "--fail", *options, url], text=False, **others).stdout).hexdigest()


def load(r, url, *options, keepalive=True, **others):
    """The errors that wrk sees with twenty connections."""
    out = r.client([need("wrk"), "-t", "2", "-c", "20", "-d", f"{r.seconds}s", *options, url], **others).stdout
    requests = re.search(r"(\d+) requests in", out)
    if not requests or int(requests.group(1)) < 100:
        raise Failure(f"no result in {out!r}")
    errors = re.findall(r"Non-2xx.*|connect [1-9]\d*|write [1-9]\d*|timeout [1-9]\d*", out)
    # It has no keep-alive switch: over a server that closes each connection it counts the ends it sees as read errors.
    return errors + (re.findall(r"read [1-9]\d*", out) if keepalive else [])


def fetch_during(r, port, path, requests, event):
    """The answers of so many requests on each of eight connections, when `event` is called in the middle of them."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answers = pool.submit(r.python, "http_many.py", r.address, port, path, 8, requests)
        wait_for(lambda: connections(port) or answers.done(), 10, f"connections to {port}")
        event()
        return answers.result().stdout


def certificate(r):
    """A key and a certificate of its own: cert.pem."""
    r.prepare([need("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-batch", "-days", "2",
               "-subj", "/CN=test", "-keyout", r.path("key.pem"), "-out", r.path("cert.crt")])
    r.prepare(["sh", "-c", "cat key.pem cert.crt >cert.pem"])
