"""PostgreSQL, which forks a backend for each connection, with pgbench. A fixed seed makes the tables comparable."""
import glob
import os
import pwd
import re
import signal
import subprocess

from harness import Failure, Skip, need
from . import Case


def binaries():
    folders = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
    if not folders:
        raise Skip("PostgreSQL is not installed")
    return os.path.dirname(folders[-1])


def run(r):
    bin_dir = binaries()
    if os.getuid() != 0:
        raise Skip("becoming the user postgres needs root")
    user = pwd.getpwnam("postgres")
    data, port = r.path("data"), r.port()
    os.mkdir(data)
    os.chown(data, user.pw_uid, user.pw_gid)
    made = subprocess.run([bin_dir + "/initdb", "-D", data, "-A", "trust", "-N", "-U", "postgres", "--no-locale", "-E", "UTF8"],
                          user="postgres", group="postgres", extra_groups=[], env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"}, cwd="/",
                          capture_output=True, text=True, check=False)
    if made.returncode:
        raise Failure(f"initdb: {made.stderr}")
    with open(data + "/pg_hba.conf", "a", encoding="ascii") as access:
        access.write("host all all samenet trust\n")
    r.server([bin_dir + "/postgres", "-D", data, "-p", str(port), "-h", r.address, "-k", "", "-c", "fsync=off",
              "-c", "synchronous_commit=off", "-c", "shared_buffers=32MB"], port, user="postgres", stop=signal.SIGINT,
             ready=lambda: "ready to accept connections" in r.logs())  # it listens before it is
    where = ["-h", r.address, "-p", str(port), "-U", "postgres"]
    pgbench = bin_dir + "/pgbench"
    r.client([pgbench, *where, "-i", "-q", "-s", "1", "postgres"])
    transactions = r.amount(320)  # the same for every run: the tables are compared
    out = r.client([pgbench, *where, "-n", "-c", "1", "-t", str(transactions), "--random-seed=11", "postgres"]).stdout
    if not re.search(rf"processed: {transactions}/{transactions}", out):
        raise Failure(f"pgbench: {out}")
    out = r.client([pgbench, *where, "-n", "-S", "-c", "8", "-j", "2", "-T", "1" if r.quick else "2", "postgres"]).stdout
    if not re.search(r"failed transactions: 0 ", out):
        raise Failure(f"pgbench -S: {out}")
    query = ("select sum(abalance), (select sum(bbalance) from pgbench_branches), (select sum(tbalance) from pgbench_tellers), "
             "(select sum(delta) from pgbench_history), (select md5(string_agg(aid || ',' || abalance, ';' order by aid)) from "
             "pgbench_accounts) from pgbench_accounts")
    sums = r.client([bin_dir + "/psql", "-X", "-A", "-t", *where, "-c", query, "postgres"], role="observer").stdout.strip()
    rows = r.client([need("sh"), "-c", f"{bin_dir}/psql -X -A -t {' '.join(where)} -c 'select * from pgbench_accounts order by 1' "
                     "postgres | sha256sum"]).stdout.split()[0]
    return sums, rows


# The table read by psql comes in one short burst, part of it before its lane is up.
CASES = [Case("postgres_pgbench", run, share=0.6, payload=1 << 20)]
