"""PostgreSQL, which forks a backend for each connection: pgbench, COPY, a standby. A fixed seed makes the tables comparable."""
import re
import signal

from harness import Failure, Skip, need, wait_for
from . import Case

PROGRAM = ("PostgreSQL", "postgresql-15", "postgresql-client-15")
READY = "ready to accept"  # connections, or read-only ones


def binaries(r):
    folders = r.place.call("server", ["sh", "-c", "ls -d /usr/lib/postgresql/*/bin"], text=True, cwd="/").stdout.split()
    if not folders:
        raise Skip("PostgreSQL is not installed")
    return folders[-1]


class Server:
    """A primary of its own; `where` are the options by which clients come to it."""

    def __init__(self, r):
        self.r, self.bin = r, binaries(r)
        if not r.place.is_root:
            raise Skip("becoming the user postgres needs root")
        data = self.folder("data")
        r.prepare([self.bin + "/initdb", "-D", data, "-A", "trust", "-N", "-U", "postgres", "--no-locale", "-E", "UTF8"], user="postgres")
        r.prepare(["sh", "-c", f"echo 'host all,replication all samenet trust' >>{data}/pg_hba.conf"])
        self.where = self.start(data, "server")

    def folder(self, name):
        self.r.prepare(["install", "-d", "-m", "700", "-o", "postgres", "-g", "postgres", self.r.path(name)])
        return self.r.path(name)

    def start(self, data, role):
        r, port = self.r, self.r.port()
        servers = r.logs().count(READY)
        r.server([self.bin + "/postgres", "-D", data, "-p", str(port), "-h", r.address, "-k", "", "-c", "fsync=off",
                  "-c", "synchronous_commit=off", "-c", "shared_buffers=32MB"], port, role=role, user="postgres", stop=signal.SIGINT,
                 ready=lambda: r.logs().count(READY) > servers)  # it listens before it is
        return ["-h", r.address, "-p", str(port), "-U", "postgres"]

    def ask(self, where, query):
        """By psql without the library: an observer."""
        return self.r.client([self.bin + "/psql", "-X", "-A", "-t", *where, "-c", query, "postgres"], role="observer").stdout.strip()


SUMS = ("select sum(abalance), (select sum(bbalance) from pgbench_branches), (select sum(tbalance) from pgbench_tellers), "
        "(select sum(delta) from pgbench_history), (select md5(string_agg(aid || ',' || abalance, ';' order by aid)) from "
        "pgbench_accounts) from pgbench_accounts")


def transact(r, server):
    """The same for every run: the tables are compared."""
    pgbench, count = server.bin + "/pgbench", r.amount(320)
    r.client([pgbench, *server.where, "-i", "-q", "-s", "1", "postgres"])
    out = r.client([pgbench, *server.where, "-n", "-c", "1", "-t", str(count), "--random-seed=11", "postgres"]).stdout
    if not re.search(rf"processed: {count}/{count}", out):
        raise Failure(f"pgbench: {out}")


def run(r):
    server = Server(r)
    transact(r, server)
    out = r.client([server.bin + "/pgbench", *server.where, "-n", "-S", "-c", "8", "-j", "2", "-T", str(r.seconds), "postgres"]).stdout
    if not re.search(r"failed transactions: 0 ", out):
        raise Failure(f"pgbench -S: {out}")
    rows = r.client([need("sh"), "-c", f"{server.bin}/psql -X -A -t {' '.join(server.where)} -c 'select * from pgbench_accounts order by 1' "
                     "postgres | sha256sum"]).stdout.split()[0]
    return server.ask(server.where, SUMS), rows


def copy(r):
    """Rows made by the server, to a client, and from there into a table."""
    server, rows = Server(r), r.amount(1 << 20)
    psql = f"{server.bin}/psql -X -q {' '.join(server.where)} postgres -c"
    server.ask(server.where, "create unlogged table bulk (line text)")
    there = r.client([need("sh"), "-c", f"{psql} \"copy (select repeat(md5(i::text), 32) from generate_series(1, {rows}) i) to stdout\" | "
                      f"tee {r.path('rows')} | sha256sum"], timeout=200).stdout
    r.client([need("sh"), "-c", f"{psql} 'copy bulk from stdin' <{r.path('rows')}"], timeout=200)
    return there, server.ask(server.where, "select count(*), sum(hashtext(line)::bigint) from bulk")


def replica(r):
    """A standby made by pg_basebackup, which then has its primary's data by streaming replication."""
    server = Server(r)
    copied = server.folder("standby")
    primary = f"host={r.address} port={server.where[3]} user=postgres"
    r.client([server.bin + "/pg_basebackup", "-d", primary, "-D", copied, "-X", "stream", "-c", "fast", "-R"])
    r.prepare(["chown", "-R", "postgres:postgres", copied])
    # The standby is the connecting side of its link.
    standby = server.start(copied, "client")
    transact(r, server)
    there = server.ask(server.where, "select pg_current_wal_flush_lsn()")
    wait_for(lambda: server.ask(standby, f"select pg_last_wal_replay_lsn() >= '{there}'") == "t", 30, "the standby to have all")
    sums = server.ask(server.where, SUMS)
    if server.ask(standby, SUMS) != sums:
        raise Failure("the standby's data are not its primary's")
    return sums


# The table read by psql comes in one short burst, part of it before its lane is up; so does most of pgbench's first load.
CASES = [
    Case("postgres_pgbench", run, "a backend forked for each connection; pgbench, psql", share=0.6, payload=1 << 20),
    Case("postgres_copy", copy, "COPY of 1 GB to psql and from it", payload=2 << 30, extra=True),
    Case("postgres_replica", replica, "pg_basebackup and streaming replication under pgbench", share=0.6, payload=20 << 20, extra=True),
]
