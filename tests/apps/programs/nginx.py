"""nginx with a master and two workers: curl checks a large file's bytes, wrk keeps many connections busy."""
import hashlib
import os
import re
import signal

from harness import Failure, need
from . import Case

CONFIG = """
daemon off;
worker_processes 2;
pid {dir}/nginx.pid;
error_log {dir}/error.log warn;
{user}
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3; uwsgi_temp_path {dir}/t4; scgi_temp_path {dir}/t5;
  sendfile {sendfile};
  server {{ listen {host}:{port}; root {dir}/www; keepalive_timeout {keepalive}; keepalive_requests 1000000; }}
}}
"""


def start(r, size, keepalive, sendfile="on"):
    port = r.port()
    os.mkdir(r.path("www"))
    r.random_file("www/data", size)
    with open(r.path("nginx.conf"), "w", encoding="ascii") as config:
        config.write(CONFIG.format(dir=r.dir, host=r.host, port=port, keepalive=keepalive, sendfile=sendfile,
                                   user="user www-data;" if r.place.is_root else ""))
    r.server([need("nginx"), "-c", r.path("nginx.conf"), "-p", r.dir, "-e", r.path("error.log")], port, stop=signal.SIGQUIT)
    return f"http://{r.host}:{port}/data"


def download(sendfile):
    def run(r):
        url = start(r, r.amount(100 << 20), 65, sendfile)
        body = r.client([need("curl"), "-sS", "--fail", url], text=False).stdout
        return hashlib.sha256(body).hexdigest()
    return run


def wrk(keepalive, *options):
    def run(r):
        url = start(r, 4096, keepalive)
        out = r.client([need("wrk"), "-t", "2", "-c", "20", "-d", "1s" if r.quick else "2s", *options, url]).stdout
        requests = re.search(r"(\d+) requests in", out)
        if not requests or int(requests.group(1)) < 100:
            raise Failure(f"no result in {out!r}")
        # wrk has no keep-alive switch: over a server that closes each connection it counts the ends it sees as read errors.
        errors = re.findall(r"Non-2xx.*|connect [1-9]\d*|write [1-9]\d*|timeout [1-9]\d*", out)
        if keepalive:
            errors += re.findall(r"read [1-9]\d*", out)
        return {"errors": errors}
    return run


# A download is over in a tenth of a second: what TCP carries until the lane is up is a part of it that shows.
CASES = [
    Case("nginx_100mb_sendfile", download("on"), share=0.6, payload=100 << 20),
    Case("nginx_100mb_write", download("off"), share=0.6, payload=100 << 20),
    Case("nginx_wrk_keepalive", wrk(65), payload=1 << 20),
    Case("nginx_wrk_close", wrk(0, "-H", "Connection: close"), share=None),
]
