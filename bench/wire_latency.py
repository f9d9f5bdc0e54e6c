"""What a larger message costs on a link: an echo over our gRPC beside one over plain TCP, by congestion control.

    python bench/wire_latency.py
    python bench/wire_latency.py --rtt 50 --rate 20 --messages 50

A message goes up, 16 bytes come back; between two network namespaces with the kernel's own TCP (Linux, root, TUN).  A
row of a model of width 4096 has 4 to 8 KiB.  Where gRPC and TCP cost the same, the cost is not gRPC's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from line import say, show
from nearfar.arguments import real, whole
from nearfar.chaos import netns
from nearfar.chaos.profiles import Profile
from nearfar.wire import rpc

SIZES = (16, 8 << 10, 16 << 10, 64 << 10)
GRPC_PORT, TCP_PORT = 7000, 7001
REPLY = bytes(16)
CONTROLS = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt", type=real(0, 10_000), default=20.0, metavar="MS")
    parser.add_argument("--rate", type=real(0.1, 10_000), default=1000.0, metavar="MBIT/S")
    parser.add_argument("--pause", type=real(0, 10_000), default=0.0, metavar="MS", help="before every message")
    parser.add_argument("--messages", type=whole(1, 10_000), default=30, metavar="N", help="of each size")
    parser.add_argument("--end", choices=("device", "upper"), help=argparse.SUPPRESS)  # a process in a namespace
    args = parser.parse_args()
    if args.end == "upper":
        asyncio.run(serve())
    elif args.end == "device":
        asyncio.run(dial(args.messages, args.pause / 1e3))
    elif reason := netns.why_not():
        say(f"skipped: {reason}")
    else:
        for control in CONTROLS.read_text().split():
            measure(control, args)


def measure(control: str, args: argparse.Namespace) -> None:
    """One row for each transport."""
    me = [sys.executable, __file__, "--messages", str(args.messages), "--pause", str(args.pause), "--end"]
    with netns.joined(Profile("exact", 1e6 * args.rate, args.rtt)) as link:
        for end in (link.device, link.upper):
            end.call(lambda: CONTROL.write_text(control))
        upper = link.upper.start([*me, "upper"], stdout=subprocess.PIPE)
        try:
            assert upper.stdout is not None
            upper.stdout.readline()  # it listens
            said, _ = link.device.start([*me, "device"], stdout=subprocess.PIPE).communicate()
        finally:
            upper.kill()
            upper.wait()
    for transport, times in json.loads(said).items():
        sizes = ", ".join(f"{int(size):,} B" for size in times)
        cells = ", ".join(f"{1e3 * statistics.median(of_size):.1f}" for of_size in times.values())
        show(f"{control}, {args.rtt:g} ms, {args.rate:g} Mbit/s, {transport}: p50 of {sizes}", f"{cells} ms")


# ------------------------------------------------------------ in the namespaces


async def serve() -> None:
    async def echo(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for _ in requests:
            yield REPLY

    async def echo_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                (n,) = struct.unpack("<I", await reader.readexactly(4))
                await reader.readexactly(n)
                writer.write(REPLY)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
    handler = {"Session": grpc.stream_stream_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("nearfar.v1.Collab", handler),))
    server.add_insecure_port(f"{netns.UPPER}:{GRPC_PORT}")
    await server.start()
    await asyncio.start_server(echo_tcp, netns.UPPER, TCP_PORT)
    print("ready", flush=True)
    await asyncio.Event().wait()


async def dial(n: int, pause_s: float) -> None:
    """Prints seconds by transport and size."""
    found = {}
    async with grpc.aio.insecure_channel(f"{netns.UPPER}:{GRPC_PORT}", rpc.CHANNEL_OPTIONS) as channel:
        call = channel.stream_stream(rpc.SESSION)()

        async def over_grpc(message: bytes) -> None:
            await call.write(message)
            await call.read()

        found["gRPC"] = await times(over_grpc, n, pause_s)
        call.cancel()
    reader, writer = await asyncio.open_connection(netns.UPPER, TCP_PORT)  # asyncio has set TCP_NODELAY

    async def over_tcp(message: bytes) -> None:
        writer.write(struct.pack("<I", len(message)) + message)
        await reader.readexactly(len(REPLY))

    found["TCP"] = await times(over_tcp, n, pause_s)
    writer.close()
    print(json.dumps(found))


async def times(send: Callable[[bytes], Awaitable[None]], n: int, pause_s: float) -> dict[int, list[float]]:
    await send(bytes(16))  # handshakes are behind us
    found: dict[int, list[float]] = {}
    for size in SIZES:
        for _ in range(n):
            await asyncio.sleep(pause_s)
            began = time.perf_counter()
            await send(bytes(size))
            found.setdefault(size, []).append(time.perf_counter() - began)
    return found


if __name__ == "__main__":
    main()
