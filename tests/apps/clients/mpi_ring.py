"""mpi_ring.py MIB: between the ranks of an MPI program messages of many sizes, both ways at once, and collective calls."""
import hashlib
import sys

from mpi4py import MPI

world = MPI.COMM_WORLD
rank, ranks = world.Get_rank(), world.Get_size()
pattern = bytes(i * 31 >> 4 & 255 for i in range(1 << 16)) * (16 * int(sys.argv[1]))
for size in [1, 8, 1000, 4096, 65536, 100_000, len(pattern)]:
    for _ in range(200 if size < 1 << 16 else 4):
        got = bytearray(size)
        world.Sendrecv(pattern[:size], (rank + 1) % ranks, recvbuf=got, source=(rank - 1) % ranks)
        assert got == pattern[:size], f"{size} bytes from rank {(rank - 1) % ranks} are not what it sent"
assert world.allreduce(rank) == ranks * (ranks - 1) // 2
assert world.alltoall([f"{rank} to {other}" for other in range(ranks)]) == [f"{other} to {rank}" for other in range(ranks)]
digests = world.allgather(hashlib.sha256(world.bcast(pattern if rank == 0 else None)).hexdigest())
if rank == 0:
    print(len(set(digests)), "digest,", ranks, "ranks")
