"""rsync's daemon, which forks for each connection: a tree there, changed, and back again."""
import os

from harness import need, tree_digest
from . import Case

PROGRAM = ("rsync", "rsync")

CONFIG = """
use chroot = no
pid file = {dir}/rsyncd.pid
lock file = {dir}/rsyncd.lock
{user}
[files]
  path = {dir}/there
  read only = no
"""


def run(r):
    rsync, port = need("rsync"), r.port()
    for folder in ("here/deep/deeper", "there"):
        os.makedirs(r.path(folder))
    with open(r.path("rsyncd.conf"), "w", encoding="ascii") as config:
        config.write(CONFIG.format(dir=r.dir, user="uid = root\ngid = root" if r.place.is_root else ""))
    for number in range(100):
        r.random_file(f"here/deep/{number}", 1000 + 997 * number)
    large = r.random_file("here/deep/deeper/large", r.amount(32 << 20))
    r.server([rsync, "--daemon", "--no-detach", "--config", r.path("rsyncd.conf"), "--address", r.address, "--port", str(port)], port)
    there = f"rsync://{r.host}:{port}/files/"
    r.client([rsync, "-a", r.path("here") + "/", there])
    with open(large, "r+b") as file:  # of which it then sends the difference
        file.seek(r.amount(16 << 20))
        file.write(b"changed" * 100_000)
    r.client([rsync, "-a", "--checksum", "--compress", r.path("here") + "/", there])
    r.client([rsync, "-a", there, r.path("back")])
    return tree_digest(r.path("here")), tree_digest(r.path("there")), tree_digest(r.path("back"))


# Two processes at either end, of which one reads and the other writes.
CASES = [Case("rsync_daemon", run, "the daemon: a tree of 40 MB there, its changes (compressed), and back", share=None, payload=70 << 20)]
