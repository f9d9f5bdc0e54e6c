"""One message of every kind.

`python -m tests.sdk.wire_examples > tests/sdk/wire_golden.txt` writes their bytes down.
"""

from __future__ import annotations

from nearfar.sampling import Sampling
from nearfar.wire import messages as m
from nearfar.wire import pack

CODEC = m.CodecSpec(m.CodecId.INT8_OS, outliers=(3, 70))
UP: tuple[m.Up, ...] = (
    m.Open(b"s" * 16, 1, m.Mode.LOSSLESS, CODEC, 4, Sampling(0.7, 40, 0.9, 0.05, 1.1, 32, 7), (2, 300), b"t", True),
    m.Rows(1, 5, (b"row 5", b"row 6"), (1, 0xFFFFFFFF)),
    m.Ids(1, 5, (0, 300)),
    m.Ask(9, 1, 7, 5, (10, 11), 1, 400),
    m.Cut(2, 6),
    m.Commit(6),
    m.Ping(3),
    m.Close(1, 30),
)
DOWN: tuple[m.Down, ...] = (
    m.Opened(1, 5, 4, 1 << 63, b"token", b"h" * 16),
    m.Verdict(9, 1, 6, 1, (12,), 0.5, b"8 bytes.", 1234, b"\1\2"),
    m.Need(1, 5, "gap"),
    m.Credit(1 << 20, 50),
    m.Err(m.Code.OVERLOADED, "come back later", True, 100),
    m.Pong(3),
)
CLIENT_HELLO = m.ClientHello(b"f" * 32, {"split": b"4 of 8"}, (CODEC, m.CodecSpec(m.CodecId.IDS)), (1,), "0.1.0", "eu")
SERVER_HELLO = m.ServerHello(
    False, b"f" * 32, "upper (theirs 00, ours 01)", CODEC, 77, m.Limits(4096, 32, 60, 16, 1 << 20), region="eu"
)
LOAD = m.Load(1.5, 1 << 30, True)


def packed() -> dict[str, bytes]:
    """By name; a bare acknowledgement is "Ack"."""
    found = {type(x).__name__: pack.pack_up(1 + i, x) for i, x in enumerate(UP)}
    found |= {type(x).__name__: pack.pack_down(1 + i, x) for i, x in enumerate(DOWN)}
    found["Ack"] = pack.pack_down(300, None)
    found["ClientHello"] = pack.pack_client_hello(CLIENT_HELLO)
    found["ServerHello"] = pack.pack_server_hello(SERVER_HELLO)
    found["Load"] = pack.pack_load(LOAD)
    return found


if __name__ == "__main__":
    for name, data in packed().items():
        print(name, data.hex())
