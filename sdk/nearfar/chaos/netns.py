"""A bad link for packets: two network namespaces and the kernel's own TCP between them.  Linux with root and TUN.

    namespace `device`                                                        namespace `upper`
    10.77.0.1  tun ══════ forward.py: rate, delay, jitter, loss, order ══════ tun  10.77.0.2

Each namespace leads all it does not know to its end of the link, so whatever tries to leave is seen by a `Capture`.
Nothing outside is touched: namespaces and interfaces go with the last descriptor, and no `ip` command is needed.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from nearfar.chaos.counters import Counters
from nearfar.chaos.forward import check_playable
from nearfar.chaos.profiles import Profile
from nearfar.chaos.schedule import Fault, Schedule
from nearfar.errors import NearfarError

T = TypeVar("T")

DEVICE, UPPER = "10.77.0.1", "10.77.0.2"
_INTERFACE = b"link"

# From Linux' headers, as x86-64 and ARM have them.
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_SIOCADDRT, _SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x890B, 0x8914, 0x8916, 0x891C
_IFF_UP, _RTF_UP = 0x1, 0x1
_ETH_P_ALL, _PACKET_OUTGOING = 0x0003, 4
_SO_RCVBUFFORCE = 33
_CAPTURED = 32 << 20  # bytes of the kernel's memory, some ten thousand packets


class Namespace:
    """A network of its own, for as long as its descriptor is open."""

    def __init__(self, address: str, descriptor: int) -> None:
        self.address, self._descriptor = address, descriptor

    def call(self, work: Callable[[], T]) -> T:
        """What `work` returns, on a thread inside; sockets that it opens and processes that it starts stay inside."""

        def inside() -> T:
            _checked(_libc().setns(self._descriptor, _CLONE_NEWNET), "setns")
            return work()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(inside).result()

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """A process inside; options are those of subprocess.Popen."""
        return self.call(lambda: subprocess.Popen(command, text=True, **options))

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet that an interface of a namespace sent or got."""

    interface: str
    is_outgoing: bool
    to: str  # IPv4 address, or the protocol's number where it is no IPv4

    @classmethod
    def of(cls, data: bytes, source: tuple[Any, ...]) -> Packet:
        interface, protocol, kind = source[:3]
        is_ipv4 = protocol == 0x0800 and len(data) >= 20
        to = socket.inet_ntoa(data[16:20]) if is_ipv4 else f"protocol {protocol:#06x}"
        return cls(interface, kind == _PACKET_OUTGOING, to)


class Capture:
    """Every packet of a namespace from now on, on all of its interfaces; on the loopback each is seen twice."""

    def __init__(self, namespace: Namespace) -> None:
        def listen() -> socket.socket:
            return socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))

        self._socket = namespace.call(listen)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _CAPTURED)
        self._socket.setblocking(False)

    def packets(self) -> list[Packet]:
        """Those since the last call, the first ones if there are very many.  Payloads are not read."""
        found = []
        while True:
            try:
                found.append(Packet.of(*self._socket.recvfrom(20)))  # an IPv4 header
            except BlockingIOError:
                return found

    def close(self) -> None:
        self._socket.close()


class PacketLink:
    """Two namespaces and the process that forwards between them."""

    def __init__(self, device: Namespace, upper: Namespace, control: socket.socket) -> None:
        self.device, self.upper = device, upper
        self._control = control.makefile("rw", encoding="utf-8")

    def inject(self, fault: Fault) -> None:
        """Do it now; returns when it is done.  A link of packets does blackouts and stalls."""
        check_playable(Schedule(0, "s", (fault,)))
        self._ask({"fault": fault.as_json() | {"at": 0.0}})

    def counters(self) -> Counters:
        """As they are now."""
        return Counters.from_json(self._ask({}))

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        try:
            self._control.write(json.dumps(what) + "\n")
            self._control.flush()
            answer = self._control.readline()
        except OSError:
            answer = ""
        if not answer:
            raise NearfarError("the process that forwards packets is gone; its stderr says why")
        facts: dict[str, Any] = json.loads(answer)
        return facts


@contextmanager
def joined(
    profile: Profile, seed: int = 0, schedule: Schedule | None = None, *, reorder: float = 0.0
) -> Iterator[PacketLink]:
    """Two namespaces with a link between them for as long as the block lasts.

    `reorder` is the share of packets that later ones overtake.  Raises NearfarError where namespaces cannot be made,
    UsageError for faults that a link of packets cannot play.
    """
    schedule = schedule or Schedule(seed)
    check_playable(schedule)
    with ExitStack() as stack:
        device, device_end = _new_namespace(stack, DEVICE)
        upper, upper_end = _new_namespace(stack, UPPER)
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        with theirs:
            ends = (device_end, upper_end, theirs.fileno())
            settings = {"profile": asdict(profile), "seed": seed, "schedule": schedule.to_json(), "reorder": reorder}
            command = [sys.executable, "-m", "nearfar.chaos.forward", *map(str, ends), json.dumps(settings)]
            # a session of its own: Ctrl-C is for us, and our end of the control line is its end
            forwarder = stack.enter_context(subprocess.Popen(command, pass_fds=ends, start_new_session=True))
        stack.callback(forwarder.terminate)
        link = PacketLink(device, upper, ours)
        link.counters()  # an answer: it forwards from now on
        yield link


def why_not() -> str | None:
    """Why this machine cannot make such namespaces, or None."""
    try:
        with ExitStack() as stack:
            _new_namespace(stack, DEVICE)
    except NearfarError as error:
        return str(error)
    return None


def _new_namespace(stack: ExitStack, address: str) -> tuple[Namespace, int]:
    """A namespace with one interface, and the other end of that; `stack` closes both."""
    with ThreadPoolExecutor(1) as thread:  # which belongs to the new namespace, and to nothing else afterwards
        try:
            namespace, end = thread.submit(_unshare, address).result()
        except (OSError, AttributeError, ImportError, TypeError) as error:
            raise NearfarError(
                f"network namespaces cannot be made here ({error}); they need Linux, root and /dev/net/tun"
            ) from None
    stack.callback(os.close, end)
    return stack.enter_context(closing(Namespace(address, namespace))), end


def _unshare(address: str) -> tuple[int, int]:
    """Descriptors of a new namespace and of the far end of its interface."""
    import fcntl  # is not there on every system

    _checked(_libc().unshare(_CLONE_NEWNET), "unshare")
    for name in ("all", "default"):  # else the kernel greets its neighbours by itself
        switch = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
        if switch.exists():
            switch.write_text("1")
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", _INTERFACE, _IFF_TUN | _IFF_NO_PI))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, _SIOCSIFADDR, struct.pack("16s16s8x", _INTERFACE, _sockaddr(address)))
            fcntl.ioctl(control, _SIOCSIFNETMASK, struct.pack("16s16s8x", _INTERFACE, _sockaddr("255.255.255.252")))
            for interface in (b"lo", _INTERFACE):
                fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", interface, _IFF_UP))
            text = ctypes.create_string_buffer(_INTERFACE)  # lives as long as the call that points to it
            fcntl.ioctl(control, _SIOCADDRT, _default_route(ctypes.addressof(text)))
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC), end
    except OSError:
        os.close(end)
        raise


def _sockaddr(address: str) -> bytes:
    """struct sockaddr_in"""
    return struct.pack("=H2x4s8x", socket.AF_INET, socket.inet_aton(address))


def _default_route(interface: int) -> bytes:
    """struct rtentry: destination, gateway and mask 0.0.0.0 through the interface whose name lies at that address."""
    nowhere = _sockaddr("0.0.0.0")
    return struct.pack("@L16s16s16sHhLPhPLLH", 0, nowhere, nowhere, nowhere, _RTF_UP, 0, 0, 0, 0, interface, 0, 0, 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
