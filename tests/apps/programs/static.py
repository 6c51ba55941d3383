"""Programs into which nothing is preloaded, statically linked: as peers, and as children that are handed a connection."""
import hashlib

from harness import need
from . import Case, nginx, relays

PROGRAM = ("BusyBox, static", "busybox-static", "nginx", "socat")


def peer(r):
    port = nginx.start(r, r.amount(32 << 20))
    got = r.client([need("busybox"), "wget", "-q", "-O", "-", f"http://{r.host}:{port}/data"], text=False).stdout
    return hashlib.sha256(got).hexdigest()


CASES = [
    Case("static_peer", peer, "wget from nginx", share=None, payload=32 << 20),
    Case("static_child", relays.socat("EXEC:busybox cat,nofork"), "cat, to which socat passes its connection", share=None, payload=32 << 20),
]
