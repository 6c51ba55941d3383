"""HAProxy between curl or wrk and nginx: as TCP relay and as HTTP proxy, with and without splicing, and reloaded under load.

The proxy has the role 'server', both its neighbours 'client': so one end only is preloaded where that is the case.
"""
import signal
import socket

import web
from harness import children, need, wait_for
from . import Case, nginx

PROGRAM = ("HAProxy", "haproxy", "nginx", "curl", "wrk")

CONFIG = """
global
  maxconn 400
  nbthread 2
  stats socket {dir}/haproxy.sock mode 600 level admin expose-fd listeners
defaults
  mode {mode}
  timeout connect 5s
  timeout client 20s
  timeout server 20s
  {option}
frontend in
  bind {host}:{port}
  default_backend out
backend out
  server nginx {host}:{backend}
"""


def start(r, mode, option, size):
    """Behind a master process; returns it, its port, and the address of what nginx serves through the proxy."""
    backend = nginx.start(r, size, role="client")
    port = r.port()
    with open(r.path("haproxy.cfg"), "w", encoding="ascii") as config:
        config.write(CONFIG.format(dir=r.dir, host=r.host, port=port, mode=mode, option=option, backend=backend))
    master = r.server([need("haproxy"), "-W", "-S", r.path("master.sock"), "-f", r.path("haproxy.cfg")], port, stop=signal.SIGUSR1)
    return master, port, f"http://{r.host}:{port}/data"


def download(mode, option=""):
    def run(r):
        _, _, url = start(r, mode, option, r.amount(64 << 20))
        return web.fetch(r, url)
    return run


def requests(mode, option=""):
    def run(r):
        _, _, url = start(r, mode, option, 4096)
        return web.load(r, url)
    return run


def reload(r):
    """New workers take the listeners over by SCM_RIGHTS (expose-fd), and the old ones finish: each request has its answer."""
    master, port, _ = start(r, "http", "", 4096)

    def order():
        """By the master's socket: of SIGUSR2 it takes no notice while it starts."""
        try:
            with socket.socket(socket.AF_UNIX) as master_socket:
                master_socket.connect(r.path("master.sock"))
                master_socket.sendall(b"reload\n")
        except ConnectionRefusedError:
            return False  # it starts anew itself at each reload
        return True

    def again():
        old = children(master.pid)
        wait_for(order, 10, "the master's socket")
        wait_for(lambda: children(master.pid) - old, 10, "a new worker")
    answers = [web.fetch_during(r, port, "/data", r.amount(400), again) for _ in range(2)]
    wait_for(lambda: len(children(master.pid)) == 1, 20, "the old workers to end")
    return answers


CASES = [
    Case("haproxy_tcp", download("tcp"), "TCP mode", share=0.6, payload=128 << 20),
    Case("haproxy_tcp_splice", download("tcp", "option splice-response"), "TCP mode, `option splice-response`", share=None, payload=128 << 20),
    Case("haproxy_http", requests("http"), "HTTP mode, wrk", share=0.7, payload=1 << 20),
    Case("haproxy_http_splice", download("http", "option splice-response"), "HTTP mode, `option splice-response`", share=None, payload=128 << 20),
    Case("haproxy_reload", reload, "two seamless reloads (`expose-fd listeners`) under load", share=0.5, payload=1 << 20),
]
