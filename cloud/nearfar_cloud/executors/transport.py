"""Messages between processes: a header of msgpack, then arrays as they lie in memory, over any stream socket.

    | magic 4 | header bytes u32 | array bytes u64 | header: [message, [[dtype, shape], ...]] | array | array | ...

Whoever sends is not trusted.  Sizes are compared with the limits as soon as their 16 bytes are there, the arrays of a
header with what the frame announces; and nothing is set aside for what has not come.  Nothing here is pickled.
"""

from __future__ import annotations

import math
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
import numpy as np

from nearfar.errors import NearfarError

MAGIC = b"nfc1"
PREFIX = struct.Struct("<4sIQ")
MAX_HEADER, MAX_ARRAYS = 8 << 20, 64 << 20  # bytes of a frame, unless told otherwise
MAX_N, MAX_DIMS = 4096, 4  # arrays of a frame, and their dimensions
DTYPES = frozenset({"|u1", "<i4", "<i8", "<f2", "<f4"})
CHUNK = 1 << 18  # bytes read at a time

M = TypeVar("M", bound=msgspec.Struct)  # what comes: a tagged union of structs
Arrays = tuple[np.ndarray[Any, Any], ...]


class WireError(NearfarError):
    """Bytes that are no frame, or one cut short."""


class LinkEnded(NearfarError):
    """The other side has closed the link, or is gone; between two frames."""


class Frame(NamedTuple, Generic[M]):
    """A message and its arrays, which are views of what came: read-only."""

    message: M
    arrays: Arrays


def encode(message: msgspec.Struct, arrays: Sequence[np.ndarray[Any, Any]] = ()) -> bytes:
    """A frame.  Arrays of other dtypes than DTYPES are a bug."""
    flat = [np.asarray(a, order="C") for a in arrays]
    assert all(a.dtype.str in DTYPES for a in flat), [a.dtype for a in flat]
    header = msgspec.msgpack.encode((message, [(a.dtype.str, a.shape) for a in flat]))
    n = sum(a.nbytes for a in flat)
    return b"".join((PREFIX.pack(MAGIC, len(header), n), header, *(a.tobytes() for a in flat)))


class Frames(Generic[M]):
    """Bytes in, frames out: knows nothing of sockets."""

    def __init__(self, kind: type[M] | Any, max_header: int = MAX_HEADER, max_arrays: int = MAX_ARRAYS) -> None:
        self._decoder = msgspec.msgpack.Decoder(tuple[kind, list[tuple[str, list[int]]]])  # type: ignore[valid-type]
        self.max_header, self.max_arrays = max_header, max_arrays
        self._came = bytearray()

    @property
    def n_waiting(self) -> int:
        """Bytes of a frame that is not complete."""
        return len(self._came)

    def feed(self, data: bytes) -> list[Frame[M]]:
        """What is complete with `data`.  Raises WireError; the stream cannot be read on then."""
        self._came += data
        found, at = [], 0
        while len(self._came) - at >= PREFIX.size:
            n_header, n_arrays = self._sizes(at)
            begin = at + PREFIX.size
            end = begin + n_header + n_arrays
            if len(self._came) < end:
                break
            found.append(self._frame(bytes(self._came[begin:end]), n_header))
            at = end
        del self._came[:at]
        return found

    def _sizes(self, at: int) -> tuple[int, int]:
        magic, n_header, n_arrays = PREFIX.unpack_from(self._came, at)
        if magic != MAGIC:
            raise WireError(f"a frame begins with {magic.hex()}: expected {MAGIC.hex()}; is this another protocol?")
        for what, n, most in (("header", n_header, self.max_header), ("arrays", n_arrays, self.max_arrays)):
            if n > most:
                raise WireError(f"a frame announces {n} bytes of {what}: expected at most {most}")
        return n_header, n_arrays

    def _frame(self, body: bytes, n_header: int) -> Frame[M]:
        try:
            message, specs = self._decoder.decode(body[:n_header])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise WireError(f"a header that is none: {error}") from None
        if len(specs) > MAX_N or any(len(shape) > MAX_DIMS or min(shape, default=0) < 0 for _, shape in specs):
            raise WireError(f"{len(specs)} arrays: expected at most {MAX_N} of up to {MAX_DIMS} sizes from 0 up")
        if unknown := next((dtype for dtype, _ in specs if dtype not in DTYPES), None):
            raise WireError(f"an array of {unknown!r}: expected one of {sorted(DTYPES)}")
        n_bytes = [np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in specs]
        if sum(n_bytes) != len(body) - n_header:
            raise WireError(f"arrays of {sum(n_bytes)} bytes in a frame that holds {len(body) - n_header}")
        if any(math.prod(max(1, n) for n in shape) > self.max_arrays for _, shape in specs):  # beside a 0
            raise WireError(f"an array without elements, of absurd sizes: expected at most {self.max_arrays}")
        arrays, at = [], n_header
        for (dtype, shape), n in zip(specs, n_bytes, strict=True):
            arrays.append(np.frombuffer(body, dtype, math.prod(shape), at).reshape(shape))
            at += n
        return Frame(message, tuple(arrays))


class Link(Generic[M]):
    """One end of a connected stream socket, which it owns.  Only `wait` and `drain` wait; for one thread."""

    def __init__(self, sock: socket.socket, kind: type[M] | Any, **limits: int) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self._frames = sock, Frames[M](kind, **limits)
        self._unsent = bytearray()

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def n_unsent(self) -> int:
        """Bytes that the other side has not taken."""
        return len(self._unsent)

    def post(self, message: msgspec.Struct, arrays: Sequence[np.ndarray[Any, Any]] = ()) -> None:
        """Send, as far as it goes now; the rest goes with `flush`.  Raises LinkEnded."""
        self._unsent += encode(message, arrays)
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as it goes.  Raises LinkEnded."""
        try:
            while self._unsent:
                del self._unsent[: self.sock.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise LinkEnded(f"the other side is gone: {error.strerror}") from None

    def drain(self) -> None:
        """Wait until the other side has taken everything.  Raises LinkEnded."""
        while self._unsent:
            self._poll(select.POLLOUT, None)
            self.flush()

    def wait(self, seconds: float) -> bool:
        """Whether something has come, or the end, after `seconds` at most."""
        return self._poll(select.POLLIN, seconds)

    def _poll(self, events: int, seconds: float | None) -> bool:
        poll = select.poll()  # not select(), which knows no descriptor from 1024 on
        poll.register(self.sock, events)
        return bool(poll.poll(None if seconds is None else 1000 * seconds))

    def read(self) -> list[Frame[M]]:
        """What has come, at most CHUNK bytes of it.  Raises LinkEnded at the end, WireError for what is no frame."""
        try:
            data = self.sock.recv(CHUNK)
        except BlockingIOError:
            return []
        except OSError as error:
            raise LinkEnded(f"the other side is gone: {error.strerror}") from None
        if data:
            return self._frames.feed(data)
        if self._frames.n_waiting:
            raise WireError(f"the link ended within a frame, after {self._frames.n_waiting} bytes of it")
        raise LinkEnded("the other side has closed the link")

    def close(self) -> None:
        self.sock.close()
