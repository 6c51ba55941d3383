"""memcached with four threads; the client stores repeatable values, reads them back and compares."""
from harness import need
from . import Case

PROGRAM = ("memcached", "memcached")


def run(r):
    port = r.port()
    user = ["-u", "nobody"] if r.place.is_root else []
    r.server([need("memcached"), "-l", r.address, "-p", str(port), "-U", "0", "-t", "4", "-m", "256", "-c", "100", *user], port)
    return r.python("memcached_client.py", r.address, port, (1 if r.quick else 4) * r.stretch).stdout


CASES = [Case("memcached", run, "4 threads, 4 clients", share=0.6, payload=20 << 20, lanes=8)]
