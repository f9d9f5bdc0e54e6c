"""How exact the bad links of `nearfar chaos` are: round trips of small messages beside those that were asked for.

    python bench/link.py
    python bench/link.py --rtt 0,20,100 --messages 300

An echo over a socket of this machine, then the same through the proxy and through two network namespaces (where they
can be made), with links of an exact round trip, no jitter and no loss.  The figure is what a round trip takes more
than it should; it includes what the echo itself takes without any link.
"""

from __future__ import annotations

import argparse
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

from line import say, show
from nearfar.arguments import whole
from nearfar.chaos import netns, proxy
from nearfar.chaos.profiles import Profile
from nearfar.cli.roofline import numbers

MESSAGE = bytes(64)
RATE = 1e9  # bit/s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt", type=numbers(0, 10_000), default=(0, 5, 20, 100), metavar="MS,..")
    parser.add_argument("--messages", type=whole(1, 100_000), default=200, metavar="N")
    args = parser.parse_args()
    tiers = {"no link": no_link, "proxy": through_proxy, "namespaces": through_namespaces}
    if reason := netns.why_not():
        say(f"skipped: {reason}")
        del tiers["namespaces"]
    for rtt_ms in args.rtt:
        for name, tier in tiers.items():
            with tier(Profile("exact", RATE, rtt_ms)) as sock:
                more = sorted(1e3 * echo(sock) - (0 if tier is no_link else rtt_ms) for _ in range(args.messages))
            p95 = more[int(0.95 * len(more))]
            show(
                f"{name}, round trip of {rtt_ms} ms: more than that, p50, p95, largest of {len(more)}",
                f"{more[len(more) // 2]:.2f}, {p95:.2f}, {more[-1]:.2f} ms",
            )


def echo(sock: socket.socket) -> float:
    """Seconds until a message is back."""
    began, n = time.perf_counter(), 0
    sock.sendall(MESSAGE)
    while n < len(MESSAGE):
        n += len(sock.recv(len(MESSAGE) - n))
    return time.perf_counter() - began


Sockets = Callable[[], socket.socket]


@contextmanager
def no_link(link: Profile) -> Iterator[socket.socket]:
    with server(lambda: socket.create_server(("127.0.0.1", 0))) as listener, dialled(lambda: dial(listener)) as sock:
        yield sock


@contextmanager
def through_proxy(link: Profile) -> Iterator[socket.socket]:
    with (
        server(lambda: socket.create_server(("127.0.0.1", 0))) as listener,
        proxy.running(listener.getsockname(), link) as running,
        dialled(lambda: socket.create_connection(running.address)) as sock,
    ):
        yield sock


@contextmanager
def through_namespaces(link: Profile) -> Iterator[socket.socket]:
    with (
        netns.joined(link) as joined,
        server(lambda: joined.upper.call(lambda: socket.create_server((netns.UPPER, 0)))) as listener,
        dialled(lambda: joined.device.call(lambda: dial(listener))) as sock,
    ):
        yield sock


@contextmanager
def server(listen: Sockets) -> Iterator[socket.socket]:
    """Echoes to one connection."""
    with closing(listen()) as listener:

        def serve() -> None:
            with suppress(OSError), listener.accept()[0] as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while data := sock.recv(1 << 16):
                    sock.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield listener


@contextmanager
def dialled(connect: Sockets) -> Iterator[socket.socket]:
    with closing(connect()) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        echo(sock)  # handshakes are behind us
        yield sock


def dial(listener: socket.socket) -> socket.socket:
    return socket.create_connection(listener.getsockname())


if __name__ == "__main__":
    main()
