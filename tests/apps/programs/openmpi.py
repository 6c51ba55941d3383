"""Open MPI over its TCP transport: two ranks on one host, of which either has the role of one end."""
import os

from harness import HERE, PYTHON, need
from . import Case

PROGRAM = ("Open MPI", "openmpi-bin", "python3-mpi4py")


def run(r):
    script = os.path.join(HERE, "clients", "mpi_ring.py")
    ranks = [["-np", "1", *r.under(role), PYTHON, script, str(r.amount(16))] for role in ("server", "client")]
    return r.client([need("mpirun"), "--allow-run-as-root", "--oversubscribe", "--mca", "btl", "tcp,self", "--mca", "pml", "ob1",
                     "--mca", "btl_tcp_if_include", "lo", "--mca", "oob_tcp_if_include", "lo", *ranks[0], ":", *ranks[1]], role="observer").stdout


CASES = [Case("openmpi", run, "btl tcp: Sendrecv of 1 B to 16 MB, collective calls", payload=100 << 20, extra=True)]
