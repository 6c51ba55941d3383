"""Apache with each of its three ways to serve: processes (prefork), threads (worker), and threads with one that waits (event)."""
import os
import signal

import web
from harness import children, need, wait_for
from . import Case

PROGRAM = ("Apache httpd", "apache2-bin", "curl", "wrk")

CONFIG = """
LoadModule mpm_{mpm}_module /usr/lib/apache2/modules/mod_mpm_{mpm}.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
ServerName test
ServerRoot {dir}
DefaultRuntimeDir {dir}
PidFile {dir}/apache.pid
ErrorLog {dir}/apache-error.log
Listen {host}:{port}
DocumentRoot {dir}/www
{user}
StartServers {processes}
KeepAlive On
MaxKeepAliveRequests 0
KeepAliveTimeout 20
EnableSendfile {sendfile}
EnableMMAP Off
<Directory {dir}/www>
  Require all granted
</Directory>
"""


def start(r, mpm, sendfile, size):
    port = r.port()
    os.mkdir(r.path("www"))
    r.random_file("www/data", size)
    # A prefork process has one connection for as long as that is kept alive, and Apache makes more only a second later, and another.
    processes = 25 if mpm == "prefork" else 2
    with open(r.path("apache.conf"), "w", encoding="ascii") as config:
        config.write(CONFIG.format(dir=r.dir, host=r.host, port=port, mpm=mpm, sendfile=sendfile, processes=processes,
                                   user="User www-data\nGroup www-data" if r.place.is_root else ""))
    # Not by SIGTERM: its threads' sockets are then closed by the first thread, which may take one in hand that has just been freed.
    return r.server([need("apache2"), "-DFOREGROUND", "-f", r.path("apache.conf")], port, stop=signal.SIGWINCH), port


def serve(mpm, sendfile="On"):
    """A large file, and then a smaller one by many connections while all processes are exchanged for new ones."""
    def run(r):
        apache, port = start(r, mpm, sendfile, r.amount(32 << 20))
        old = children(apache.pid)
        r.random_file("www/page", 8192)
        digest = web.fetch(r, f"http://{r.host}:{port}/data")
        answers = web.fetch_during(r, port, "/page", r.amount(200), lambda: r.prepare(
            [need("apache2"), "-f", r.path("apache.conf"), "-k", "graceful"]))
        # One of them may still accept, and close its connection once it hears that it is to go: wrk would call that an error.
        wait_for(lambda: not old & children(apache.pid), 20, "the old processes to end")
        return digest, answers, web.load(r, f"http://{r.host}:{port}/page")
    return run


CASES = [
    Case("apache_prefork", serve("prefork"), "prefork: 32 MB by sendfile, graceful restart under load, wrk", share=0.6, payload=48 << 20),
    Case("apache_worker", serve("worker", "Off"), "worker: the same by write", share=0.6, payload=48 << 20,
         extra=True),
    Case("apache_event", serve("event"), "event: the same by sendfile", share=0.6, payload=48 << 20),
]
