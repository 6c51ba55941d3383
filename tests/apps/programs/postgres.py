"""PostgreSQL, which forks a backend for each connection, with pgbench. A fixed seed makes the tables comparable."""
import re
import signal

from harness import Failure, Skip, need
from . import Case

PROGRAM = ("PostgreSQL", "postgresql-15", "postgresql-client-15")


def binaries(r):
    folders = r.place.call("server", ["sh", "-c", "ls -d /usr/lib/postgresql/*/bin"], text=True, cwd="/").stdout.split()
    if not folders:
        raise Skip("PostgreSQL is not installed")
    return folders[-1]


def run(r):
    bin_dir = binaries(r)
    if not r.place.is_root:
        raise Skip("becoming the user postgres needs root")
    data, port = r.path("data"), r.port()
    r.prepare(["install", "-d", "-o", "postgres", "-g", "postgres", data])
    r.prepare([bin_dir + "/initdb", "-D", data, "-A", "trust", "-N", "-U", "postgres", "--no-locale", "-E", "UTF8"], user="postgres")
    r.prepare(["sh", "-c", f"echo host all all samenet trust >>{data}/pg_hba.conf"])
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
CASES = [Case("postgres_pgbench", run, "a backend forked for each connection; pgbench, psql", share=0.6, payload=1 << 20)]
