"""socat and ncat: relays that fork, exec and hand a connection to the program that they run."""
import hashlib

from harness import file_digest, need
from . import Case

PROGRAM = ("socat, ncat", "socat", "ncat")


def socat(how):
    """Sends a file to an echo and compares what comes back."""
    def run(r):
        program, port = need("socat"), r.port()
        data = r.random_file("data", r.amount(16 << 20))
        r.server([program, f"TCP-LISTEN:{port},bind={r.address},fork,reuseaddr", how], port)
        with open(data, "rb") as stdin:
            sent = stdin.read()
        got = r.client([program, "-t", "20", "-", f"TCP:{r.host}:{port}"], text=False, stdin=sent).stdout
        return len(got), hashlib.sha256(got).hexdigest()
    return run


def ncat(r):
    """A file from a program that the server runs, and one to it."""
    program, port = need("ncat"), r.port()
    data = r.random_file("data", r.amount(16 << 20))
    r.server([program, "-l", r.address, str(port), "-k", "-e", f"/bin/cat {data}"], port)
    got = r.client([program, "--recv-only", r.address, str(port)], text=False).stdout
    sink = r.port()
    server = r.server([program, "-l", r.address, str(sink), "--recv-only", "-o", r.path("log")], sink)
    with open(data, "rb") as stdin:
        r.client([program, "--send-only", r.address, str(sink)], text=False, stdin=stdin.read())
    server.wait(20)
    return hashlib.sha256(got).hexdigest(), file_digest(r.path("log"))


CASES = [
    Case("socat_exec", socat("EXEC:/bin/cat"), "socat: fork, EXEC; an echo of 16 MB", share=0.6, payload=32 << 20),
    Case("socat_nofork", socat("EXEC:/bin/cat,nofork"), "socat: fork, EXEC with the connection itself", share=None, payload=32 << 20),
    Case("ncat", ncat, "ncat: -k -e, 16 MB from it and 16 MB there", share=0.4, payload=32 << 20),
]
