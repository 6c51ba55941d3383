"""nginx with a master and two workers: curl checks a large file's bytes, wrk keeps many connections busy."""
import os
import signal

import web
from harness import need
from . import Case

PROGRAM = ("nginx", "nginx", "curl", "wrk")

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


def start(r, size, keepalive=65, sendfile="on", role="server"):
    """Serves /data, of that many bytes; returns the port."""
    port = r.port()
    os.mkdir(r.path("www"))
    r.random_file("www/data", size)
    with open(r.path("nginx.conf"), "w", encoding="ascii") as config:
        config.write(CONFIG.format(dir=r.dir, host=r.host, port=port, keepalive=keepalive, sendfile=sendfile,
                                   user="user www-data;" if r.place.is_root else ""))
    r.server([need("nginx"), "-c", r.path("nginx.conf"), "-p", r.dir, "-e", r.path("error.log")], port, stop=signal.SIGQUIT, role=role)
    return port


def download(sendfile):
    def run(r):
        port = start(r, r.amount(100 << 20), sendfile=sendfile)
        return web.fetch(r, f"http://{r.host}:{port}/data")
    return run


def requests(keepalive, *options):
    def run(r):
        port = start(r, 4096, keepalive)
        return web.load(r, f"http://{r.host}:{port}/data", *options, keepalive=keepalive)
    return run


# A download is over in a tenth of a second: what TCP carries until the lane is up is a part of it that shows.
CASES = [
    Case("nginx_100mb_sendfile", download("on"), "a master and 2 workers; 100 MB by sendfile", share=0.6, payload=100 << 20),
    Case("nginx_100mb_write", download("off"), "100 MB by write", share=0.6, payload=100 << 20),
    Case("nginx_wrk_keepalive", requests(65), "wrk, 20 connections", payload=1 << 20),
    Case("nginx_wrk_close", requests(0, "-H", "Connection: close"), "wrk, a connection for each request", share=None),
]
