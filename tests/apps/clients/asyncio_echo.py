"""asyncio_echo.py serve PORT | talk PORT MIB: eight connections at once, each writing and reading at the same time."""
import asyncio
import random
import signal
import sys


async def echo(reader, writer):
    while data := await reader.read(50_000):
        writer.write(data)
        await writer.drain()
    writer.close()


async def serve(port):
    server = await asyncio.start_server(echo, "127.0.0.1", port)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    server.close()


async def talk_once(port, who, size):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
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


async def talk(port, mib):
    await asyncio.wait_for(asyncio.gather(*(talk_once(port, who, mib << 20) for who in range(8))), 30)
    print("every connection got its own bytes back")


if sys.argv[1] == "serve":
    asyncio.run(serve(int(sys.argv[2])))
else:
    asyncio.run(talk(int(sys.argv[2]), int(sys.argv[3])))
