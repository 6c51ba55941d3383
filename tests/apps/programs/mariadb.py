"""MariaDB: a thread for each connection or a pool of threads; mariadb-slap, a bulk load, and a dump whose bytes are compared."""
import hashlib
import re

from harness import Failure, need
from . import Case

PROGRAM = ("MariaDB", "mariadb-server", "mariadb-client")


def database(handling):
    def run(r):
        server, install, client, slap, dump = need("mariadbd", "mariadb-install-db", "mariadb", "mariadb-slap", "mariadb-dump")
        data, port = r.path("data"), r.port()
        user = "mysql" if r.place.is_root else None
        r.prepare(["install", "-d", *(["-o", "mysql", "-g", "mysql"] if user else []), data])
        r.prepare([install, "--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=normal", "--skip-test-db",
                   "--innodb-log-file-size=16M"], user=user)
        r.server([server, "--no-defaults", f"--datadir={data}", f"--bind-address={r.address}", f"--port={port}", f"--socket={data}/socket",
                  f"--pid-file={data}/pid", "--innodb-log-file-size=16M", "--skip-name-resolve",
                  "--innodb-flush-log-at-trx-commit=0", f"--thread-handling={handling}"], port, user=user,
                 ready=lambda: "ready for connections" in r.logs())
        where = ["--no-defaults", f"--host={r.address}", f"--port={port}", "--user=root", "--protocol=tcp"]
        rows = r.amount(20000)
        with open(r.path("rows"), "w", encoding="ascii") as out:
            for row in range(rows):
                out.write(f"{row}\t{hashlib.sha256(str(row).encode()).hexdigest() * (1 + row % 20)}\n")
        r.client([client, *where, "--local-infile=1", "-e", "create database test; create table test.bulk (id int primary key, text text); "
                  f"load data local infile '{r.path('rows')}' into table test.bulk"])
        out = r.client([slap, *where, "--concurrency=8", f"--number-of-queries={r.amount(4000)}", "--auto-generate-sql",
                        "--auto-generate-sql-load-type=mixed"]).stdout
        if not re.search(r"Number of clients running queries: 8", out):
            raise Failure(f"no result in {out!r}")
        dumped = r.client([dump, *where, "--skip-comments", "--order-by-primary", "test", "bulk"], text=False).stdout
        large = r.client([client, *where, "--batch", "--raw", "--skip-column-names", "--max-allowed-packet=64M", "-e",
                          "select repeat('0123456789abcdef', 524288)"], text=False).stdout
        return hashlib.sha256(dumped).hexdigest(), hashlib.sha256(large).hexdigest()
    return run


CASES = [
    Case("mariadb_threads", database("one-thread-per-connection"), "LOAD DATA, mariadb-slap with 8 clients, mariadb-dump, an 8 MB value",
         share=0.5, payload=24 << 20, extra=True),
    Case("mariadb_pool", database("pool-of-threads"), "the same with a pool of threads", share=0.5, payload=24 << 20, extra=True),
]
