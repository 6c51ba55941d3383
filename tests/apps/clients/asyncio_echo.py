"""asyncio_echo.py serve ADDRESS PORT | talk ADDRESS PORT KIB: eight connections at once, each writing and reading at the same time."""
import asyncio
import random
import signal
import sys


async def echo(reader, writer):
    while data := await reader.read(50_000):
        writer.write(data)
        await writer.drain()
    writer.close()


async def serve(address, port):
    server = await asyncio.start_server(echo, address, port)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    server.close()


async def talk_once(address, port, who, size):
    reader, writer = await asyncio.open_connection(address, port)
    sent = random.Random(who).randbytes(size)

    async def write():
        for start in range(0, size, 30_011):
            writer.write(sent[start:start + 30_011])
            await writer.drain()
        writer.write_eof()
    writing = asyncio.create_task(write())
    got = await reader.read()
    await writing
    writer.close()
    assert got == sent, f"connection {who}: {len(got)} bytes of {size}, or not the same"


async def talk(address, port, kib):
    await asyncio.wait_for(asyncio.gather(*(talk_once(address, port, who, kib << 10) for who in range(8))), 30)
    print("every connection got its own bytes back")


if sys.argv[1] == "serve":
    asyncio.run(serve(sys.argv[2], int(sys.argv[3])))
else:
    asyncio.run(talk(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
