"""stunnel at both ends of a TLS connection, between curl or wget and nginx: three connections in a row, whose neighbours have two roles."""
import hashlib

import web
from harness import need
from . import Case, nginx

PROGRAM = ("stunnel", "stunnel4", "nginx", "curl", "wget", "openssl")

CONFIG = """
foreground = yes
pid =
socket = l:TCP_NODELAY=1
[{name}]
client = {client}
accept = {accept}
connect = {connect}
cert = {dir}/cert.pem
"""


def tunnel(r, role, client, connect):
    """Starts one; returns the port it takes connections on."""
    port = r.port()
    with open(r.path(f"stunnel-{role}.conf"), "w", encoding="ascii") as config:
        config.write(CONFIG.format(name=role, client=client, accept=f"{r.address}:{port}", connect=f"{r.address}:{connect}", dir=r.dir))
    r.server([need("stunnel4"), r.path(f"stunnel-{role}.conf")], port, role=role)
    return port


def run(r):
    web.certificate(r)
    server = tunnel(r, "server", "no", nginx.start(r, r.amount(32 << 20), role="client"))
    client = tunnel(r, "client", "yes", server)
    r.random_file("www/page", 4096)
    by_stunnel = web.fetch(r, f"http://{r.host}:{client}/data", role="server")
    by_curl = web.fetch(r, f"https://{r.host}:{server}/data", "--insecure")
    by_wget = r.client([need("wget"), "-q", "-O", "-", "--no-check-certificate", f"https://{r.host}:{server}/data"], text=False).stdout
    return by_stunnel, by_curl, hashlib.sha256(by_wget).hexdigest(), web.load(r, f"http://{r.host}:{client}/page", role="server")


CASES = [Case("stunnel", run, "at both ends and as server of curl and wget: three times 32 MB by TLS, wrk", share=0.6, payload=200 << 20)]
