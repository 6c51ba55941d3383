"""Programs in Go, whose system calls do not go through libc: Caddy before nginx, and hey before Caddy."""
import web
from harness import need
from . import Case, nginx

PROGRAM = ("Caddy, in Go", "caddy", "nginx", "curl")

CONFIG = """
{{
  admin off
  auto_https off
}}
http://{host}:{port} {{
  reverse_proxy {host}:{backend}
}}
"""


def run(r):
    backend, port = nginx.start(r, r.amount(32 << 20), role="client"), r.port()
    with open(r.path("Caddyfile"), "w", encoding="ascii") as config:
        config.write(CONFIG.format(host=r.host, port=port, backend=backend))
    r.server([need("caddy"), "run", "--config", r.path("Caddyfile"), "--adapter", "caddyfile"], port)
    return web.fetch(r, f"http://{r.host}:{port}/data"), web.load(r, f"http://{r.host}:{port}/data", "-H", "Range: bytes=0-4095")


CASES = [Case("go_proxy", run, "a proxy between curl or wrk and nginx", share=None, payload=64 << 20, extra=True)]
