"""Messages as bytes: the same in every version, there and back again, and nothing wrong gets in."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.errors import WireError
from nearfar.sampling import Sampling
from nearfar.wire import messages as m
from nearfar.wire import nearfar_pb2 as pb
from nearfar.wire import pack, unpack
from tests.paths import ROOT
from tests.sdk import wire_examples as examples

U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
POSITION = st.integers(0, (1 << 32) - 5000)
IDS = st.lists(U32, min_size=1, max_size=30).map(tuple)
TEXT = st.text(st.characters(categories=("L", "N", "P", "Zs")), max_size=20).map(
    lambda text: "".join(c for c in text if c.isprintable())
)
SAMPLING = st.builds(
    Sampling,
    temperature=st.floats(0, 10),
    top_k=U32,
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 10, exclude_min=True),
    repetition_window=U32,
    seed=U64,
)
CODECS = st.one_of(
    st.builds(m.CodecSpec, st.sampled_from([m.CodecId.FP16, m.CodecId.IDS])),
    st.builds(
        lambda i, channels: m.CodecSpec(i, outliers=tuple(sorted(channels))),
        st.sampled_from([m.CodecId.INT8_OS, m.CodecId.INT4_OS]),
        st.sets(U32, max_size=16),
    ),
)
ROWS = st.integers(1, 40).flatmap(
    lambda size: st.lists(st.binary(min_size=size, max_size=size), min_size=1, max_size=20).flatmap(
        lambda data: st.builds(m.Rows, U32, POSITION, st.just(tuple(data)), st.tuples(*[U32 for _ in data]))
    )
)
UP = st.one_of(
    st.builds(
        m.Open,
        st.binary(min_size=16, max_size=16),
        U32,
        st.sampled_from(m.Mode),
        CODECS,
        U32,
        SAMPLING,
        st.lists(U32, max_size=10).map(tuple),
        st.binary(max_size=256),
        st.booleans(),
        U32,
    ),
    ROWS,
    st.builds(m.Ids, U32, POSITION, IDS),
    st.builds(
        lambda req, gen, a, b, draft, run, ms: m.Ask(req, gen, max(a, b), min(a, b), draft, run, ms),
        *(U64, U32, U32, U32, st.lists(U32, max_size=20).map(tuple), st.integers(1, 1 << 20), U32),
    ),
    st.builds(m.Cut, U32, U32),
    st.builds(m.Commit, U32),
    st.builds(m.Ping, U64),
    st.builds(m.Close, U32, U32),
)
DOWN = st.one_of(
    st.none(),
    st.builds(m.Opened, U32, U32, U32, U64, st.binary(max_size=256), st.binary(max_size=64)),
    st.builds(
        m.Verdict,
        *(U64, U32, POSITION, st.integers(0, 4096), IDS, st.floats(0, width=32, allow_nan=False)),
        st.sampled_from([b"", b"8 bytes."]),
        U32,
        st.binary(max_size=50),
    ),
    st.builds(m.Need, U32, U32, TEXT),
    st.builds(m.Credit, U64, U32),
    st.builds(m.Err, st.sampled_from(m.Code), TEXT, st.booleans(), U32),
    st.builds(m.Pong, U64),
)


def test_the_bytes_of_every_message_are_those_of_the_protocol() -> None:
    golden = dict(line.split() for line in (Path(__file__).parent / "wire_golden.txt").read_text().splitlines())
    assert {name: data.hex() for name, data in examples.packed().items()} == golden
    for i, message in enumerate(examples.UP):
        assert unpack.unpack_up(bytes.fromhex(golden[type(message).__name__])) == (1 + i, message)
    for i, down in enumerate(examples.DOWN):
        assert unpack.unpack_down(bytes.fromhex(golden[type(down).__name__])) == (1 + i, down)
    assert unpack.unpack_down(bytes.fromhex(golden["Ack"])) == (300, None)
    assert unpack.unpack_client_hello(bytes.fromhex(golden["ClientHello"])) == examples.CLIENT_HELLO
    assert unpack.unpack_server_hello(bytes.fromhex(golden["ServerHello"])) == examples.SERVER_HELLO
    assert unpack.unpack_load(bytes.fromhex(golden["Load"])) == examples.LOAD


@settings(deadline=None)
@given(U64, UP)
def test_what_a_device_says_arrives_as_it_was(seq: int, message: m.Up) -> None:
    assert unpack.unpack_up(pack.pack_up(seq, message)) == (seq, message)


@settings(deadline=None)
@given(U64, DOWN)
def test_what_the_upper_side_says_arrives_as_it_was(ack: int, message: m.Down | None) -> None:
    assert unpack.unpack_down(pack.pack_down(ack, message)) == (ack, message)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_bytes_of_chance_are_a_message_or_a_wire_error(data: bytes) -> None:
    for read in (
        unpack.unpack_up,
        unpack.unpack_down,
        unpack.unpack_client_hello,
        unpack.unpack_server_hello,
        unpack.unpack_load,
    ):
        try:
            read(data)
        except WireError:
            continue


@pytest.mark.parametrize("name", [*examples.packed()])
def test_a_message_cut_at_any_byte_is_a_wire_error_or_a_shorter_message(name: str) -> None:
    data = examples.packed()[name]
    for n in range(len(data)):
        for read in (unpack.unpack_up, unpack.unpack_down, unpack.unpack_client_hello, unpack.unpack_server_hello):
            try:
                read(data[:n])
            except WireError:
                continue


def _open(**fields: object) -> pb.Open:
    """A sound Open with some fields changed; None clears a field."""
    good = pb.Up.FromString(examples.packed()["Open"]).open
    for name, value in fields.items():
        good.ClearField(name)
        if value is not None:
            getattr(good, name).MergeFrom(value) if hasattr(value, "DESCRIPTOR") else setattr(good, name, value)
    return good


GREEDY = {"top_p": 1.0, "repetition_penalty": 1.0}
BAD_UP = {
    "nothing": pb.Up(seq=1),
    "a session id of 15 bytes": pb.Up(open=_open(session=b"s" * 15)),
    "a session id of 17 bytes": pb.Up(open=_open(session=b"s" * 17)),
    "no mode": pb.Up(open=_open(mode=None)),
    "an unknown mode": pb.Up(open=_open(mode=9)),
    "no codec": pb.Up(open=_open(codec=None)),
    "an unknown codec": pb.Up(open=_open(codec=pb.CodecSpec(id=9))),
    "int8 in groups of 63": pb.Up(open=_open(codec=pb.CodecSpec(id=2, group=63))),
    "outliers that fall": pb.Up(open=_open(codec=pb.CodecSpec(id=2, group=64, outlier=[4, 3]))),
    "17 outliers": pb.Up(open=_open(codec=pb.CodecSpec(id=2, group=64, outlier=range(17)))),
    "a long resume token": pb.Up(open=_open(resume_token=bytes(257))),
    "no sampling": pb.Up(open=_open(sampling=None)),
    "a negative temperature": pb.Up(open=_open(sampling=pb.Sampling(temperature=-1, **GREEDY))),
    "a temperature that is no number": pb.Up(open=_open(sampling=pb.Sampling(temperature=float("nan"), **GREEDY))),
    "min_p above 1": pb.Up(open=_open(sampling=pb.Sampling(min_p=1.5, **GREEDY))),
    "too many stop ids": pb.Up(open=pb.Open(session=b"s" * 16, mode=1, stop_id=range(257))),
    "no rows": pb.Up(rows=pb.Rows(n=0)),
    "rows of no bytes": pb.Up(rows=pb.Rows(n=2, crc32=[0, 0])),
    "rows of unequal size": pb.Up(rows=pb.Rows(n=2, data=b"123", crc32=[0, 0])),
    "a row without checksum": pb.Up(rows=pb.Rows(n=2, data=b"1234", crc32=[0])),
    "more rows than bytes": pb.Up(rows=pb.Rows(n=1 << 31, data=b"1234", crc32=[0])),
    "two rows above 16 KiB": pb.Up(rows=pb.Rows(n=2, data=bytes((16 << 10) + 2), crc32=[0, 0])),
    "rows behind the last position": pb.Up(rows=pb.Rows(pos0=(1 << 32) - 1, n=2, data=b"12", crc32=[0, 0])),
    "no ids": pb.Up(ids=pb.Ids()),
    "too many ids": pb.Up(ids=pb.Ids(id=bytes(4097))),
    "an ask backwards": pb.Up(ask=pb.Ask(pos=3, verify_from=4, run=1)),
    "an ask for no token": pb.Up(ask=pb.Ask(pos=3, verify_from=3)),
    "too many drafts": pb.Up(ask=pb.Ask(pos=5000, verify_from=1, draft=bytes(4097), run=1)),
}
BAD_DOWN = {
    "an error without code": pb.Down(err=pb.Err(text="?")),
    "an error with an unknown code": pb.Down(err=pb.Err(code=99)),
    "an error that is a novel": pb.Down(err=pb.Err(code=1, text="x" * 4097)),
    "a verdict without token": pb.Down(verdict=pb.Verdict(req=1)),
    "a verdict with too many tokens": pb.Down(verdict=pb.Verdict(id=bytes(4097))),
    "a verdict that accepts too much": pb.Down(verdict=pb.Verdict(id=[1], n_accept=4097)),
    "a margin that is no number": pb.Down(verdict=pb.Verdict(id=[1], margin=float("nan"))),
    "a negative margin": pb.Down(verdict=pb.Verdict(id=[1], margin=-1)),
    "a state hash of 7 bytes": pb.Down(verdict=pb.Verdict(id=[1], state_hash=bytes(7))),
    "a long settings hash": pb.Down(opened=pb.Opened(settings_hash=bytes(65))),
    "a long reason": pb.Down(need=pb.Need(reason="x" * 4097)),
}


@pytest.mark.parametrize("what", BAD_UP)
def test_a_wrong_message_of_a_device_is_refused(what: str) -> None:
    with pytest.raises(WireError):
        unpack.unpack_up(BAD_UP[what].SerializeToString())


@pytest.mark.parametrize("what", BAD_DOWN)
def test_a_wrong_message_of_the_upper_side_is_refused(what: str) -> None:
    with pytest.raises(WireError):
        unpack.unpack_down(BAD_DOWN[what].SerializeToString())


@pytest.mark.parametrize(
    "hello",
    [
        pb.ClientHello(model_fp=bytes(15)),
        pb.ClientHello(model_fp=bytes(65)),
        pb.ClientHello(model_fp=bytes(32), parts={"x" * 65: b"1"}),
        pb.ClientHello(model_fp=bytes(32), parts={"upper": b""}),
        pb.ClientHello(model_fp=bytes(32), parts={"upper": bytes(65)}),
        pb.ClientHello(model_fp=bytes(32), parts={str(i): b"1" for i in range(65)}),
        pb.ClientHello(model_fp=bytes(32), proto=bytes(65)),
        pb.ClientHello(model_fp=bytes(32), codecs=[pb.CodecSpec(id=1)] * 65),
        pb.ClientHello(model_fp=bytes(32), region="x" * 65),
    ],
)
def test_a_wrong_hello_is_refused(hello: pb.ClientHello) -> None:
    with pytest.raises(WireError):
        unpack.unpack_client_hello(hello.SerializeToString())


def test_a_message_above_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(WireError, match="at most 1048576"):
        unpack.unpack_up(bytes((1 << 20) + 1))


def test_a_single_row_may_be_as_large_as_a_message() -> None:
    row = m.Rows(0, 0, (bytes(1 << 19),), (0,))
    assert unpack.unpack_up(pack.pack_up(1, row)) == (1, row)


def test_text_of_another_machine_cannot_command_the_terminal() -> None:
    data = pb.Down(err=pb.Err(code=1, text="\x1b[2Jgone\nsecond line")).SerializeToString()
    _, err = unpack.unpack_down(data)
    assert isinstance(err, m.Err)
    assert err.text.isprintable()
    assert "gone" in err.text


def test_a_field_of_a_later_version_is_passed_over() -> None:
    data = examples.packed()["Commit"] + struct.pack("<BB", 15 << 3, 7)  # field 15, a varint
    assert unpack.unpack_up(data) == (6, m.Commit(6))


WISH = m.Open(b"s" * 16, 0, m.Mode.LOSSY, examples.CODEC, 1, Sampling(top_k=1 << 40))


@pytest.mark.parametrize("message", [m.Cut(1 << 32, 0), m.Cut(-1, 0), m.Ids(0, 0, (1 << 32,)), m.Ping(1 << 64), WISH])
def test_a_number_that_has_no_place_in_its_field_is_a_wire_error(message: m.Up) -> None:
    with pytest.raises(WireError, match="does not fit"):
        pack.pack_up(1, message)


def test_the_generated_code_is_that_of_the_protocol_file(tmp_path: Path) -> None:
    """`make proto` after a change of nearfar.proto."""
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'sdk'}", f"--python_out={tmp_path}"]
    command += [f"--pyi_out={tmp_path}", str(ROOT / "sdk/nearfar/wire/nearfar.proto")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    for name in ("nearfar_pb2.py", "nearfar_pb2.pyi"):
        assert (tmp_path / "nearfar/wire" / name).read_text() == (ROOT / "sdk/nearfar/wire" / name).read_text()
