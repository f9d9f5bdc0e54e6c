"""Who may open what: hellos judged against a file, and connections that are held to theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("grpc", reason="grpcio is not installed (extra [cloud])")

from nearfar.gguf_reader import GGUFFile
from nearfar.halves import split
from nearfar.weights import Weights
from nearfar.wire.fingerprint import codec_part
from nearfar.wire.messages import ClientHello, Code, CodecId, CodecSpec, Err, Limits, ServerHello
from nearfar.wire.rpc import Refused
from nearfar_cloud.gateway import greetings, pairing
from nearfar_cloud.gateway.greetings import Greetings
from nearfar_cloud.gateway.pairing import Judgement, Pairing
from tests.cloud.collab import halves, hello, whole
from tests.sdk.small_device import BY_IDS, BY_ROWS, ROW_LAYER, opening
from tests.tiny import write_tiny

LIMITS = Limits(512, 8, 60, 16, 1 << 15)
CHANNELS = CodecSpec(CodecId.INT8_OS, outliers=(3, 9))


def judged(what: ClientHello, path: Path | None = None) -> Judgement:
    """By a server with a whole model, or with the file `path`."""

    async def judge() -> Judgement:
        return await Pairing(Weights.open(path or whole()), LIMITS, epoch=1).judge(what)

    return asyncio.run(judge())


@cache
def others() -> Path:
    """The device half of another model."""
    folder = Path(mkdtemp())
    return split(Weights.open(write_tiny(folder / "other.gguf", n_ctx=512, seed=4)), 2, folder, make_exit=True).device


# ---------------------------------------------------------------- hellos


def test_everything_that_fits_may_be_opened_and_nothing_else() -> None:
    assert judged(hello()).fits == {(ROW_LAYER, BY_ROWS), (0, BY_IDS)}
    assert judged(hello(), halves().upper).fits == {(ROW_LAYER, BY_ROWS)}
    assert judged(hello(others(), (BY_ROWS,))).fits == set()
    assert not judged(hello(others(), (BY_ROWS,))).answer.match
    by_ids = judged(hello(others()))  # the same tokenizer
    assert by_ids.fits == {(0, BY_IDS)}
    assert by_ids.why.startswith("INT8_OS: device (theirs")


@pytest.mark.parametrize("at", ["whole", "upper"])
def test_channels_are_those_that_the_device_has_in_its_fingerprint(at: str) -> None:
    """A whole model has none of its own, and still does not take any that it is told."""
    path = whole() if at == "whole" else halves().upper
    answer = judged(hello(codecs=(CHANNELS,)), path).answer
    assert not answer.match
    assert "codec (theirs" in answer.why
    of_device = hello(codecs=(CHANNELS,))
    of_device = replace(of_device, parts={**of_device.parts, "codec": codec_part(CHANNELS.outliers)})
    assert judged(of_device, path).answer.match is (at == "whole")
    without = replace(of_device, parts={k: v for k, v in of_device.parts.items() if k != "codec"})
    assert not judged(without, path).answer.match


def test_channels_beyond_the_width_fit_nothing() -> None:
    wide = CodecSpec(CodecId.INT8_OS, outliers=(3, 256))
    of_device = replace(hello(codecs=(wide,)), parts={**hello().parts, "codec": codec_part(wide.outliers)})
    assert "of rows of width 256" in judged(of_device).answer.why


def test_rows_enter_the_layer_that_the_device_names(tmp_path: Path) -> None:
    """Where they leave it below its last layers."""
    with Weights.open(whole()) as weights:
        two = split(weights, 3, tmp_path, rows_at=1, make_exit=True)
    device = hello(two.device)
    assert judged(device).fits == {(1, BY_ROWS), (0, BY_IDS)}
    assert judged(device, two.upper).fits == {(1, BY_ROWS)}
    assert "split (theirs 3 of 4, rows of 1, ours 2 of 4)" in judged(device, halves().upper).why


def test_a_file_that_could_not_be_read_for_a_moment_is_read_again_for_the_next_hello(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, device = Weights.open(whole()), hello()
    real, reads = weights.file.raw, list[str]()

    def raw(name: str) -> Any:
        reads.append(name)
        if len(reads) == 6:
            raise OSError(5, "Input/output error")
        return real(name)

    monkeypatch.setattr(weights.file, "raw", raw)

    async def judge() -> Judgement:
        pairing = Pairing(weights, LIMITS, epoch=1)
        with pytest.raises(OSError, match="Input/output"):
            await pairing.judge(device)
        return await pairing.judge(device)

    assert asyncio.run(judge()).fits == {(ROW_LAYER, BY_ROWS), (0, BY_IDS)}
    assert reads.count(reads[5]) == 2  # what had been read before is still known
    assert len(reads) == len(set(reads)) + 1


def test_only_so_many_ways_to_cut_a_model_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "MOST_SPLITS", 2)
    device = hello()

    async def judge() -> None:
        of = Pairing(Weights.open(whole()), LIMITS, epoch=1)
        for split_part in (b"1 of 4", b"2 of 4, rows of 1", b"3 of 4", b"3 of 4, rows of 1"):
            answer = await of.judge(replace(device, parts={**device.parts, "split": split_part}, codecs=(BY_ROWS,)))
            assert "device (theirs" in answer.why or "upper (theirs" in answer.why
            assert len(of._parts) <= 2
        assert (await of.judge(device)).fits == {(ROW_LAYER, BY_ROWS), (0, BY_IDS)}

    asyncio.run(judge())


# ---------------------------------------------------------------- connections


def check(test: Callable[[Greetings], Coroutine[Any, Any, None]], within_s: float = 0.05) -> None:
    async def within() -> None:
        async with asyncio.timeout(30):
            await test(Greetings(within_s))

    asyncio.run(within())


async def judgement(*fits: tuple[int, CodecSpec], why: str = "", until: asyncio.Event | None = None) -> Judgement:
    if until is not None:
        await until.wait()
    return Judgement(ServerHello(bool(fits), b"f" * 32, why, None, 1, LIMITS), frozenset(fits), why)


async def refusal(of: Greetings, subject: str, peer: str, codec: CodecSpec = BY_ROWS, **fields: Any) -> Err:
    with pytest.raises(Refused) as refused:
        await of.check(subject, peer, replace(opening(codec), **fields))
    return refused.value.err


def test_a_connection_opens_what_its_hello_offered() -> None:
    async def test(of: Greetings) -> None:
        assert (await of.answer("alice", "a:1", judgement((2, BY_ROWS), (0, BY_IDS)))).match
        await of.check("alice", "a:1", opening(BY_ROWS))
        await of.check("alice", "a:1", opening(BY_IDS))
        for err in (
            await refusal(of, "alice", "a:1", CHANNELS),
            await refusal(of, "alice", "a:1", CodecSpec(CodecId.FP16)),
            await refusal(of, "alice", "a:1", row_layer=3),
        ):
            assert (err.code, err.retryable) == (Code.MISMATCH, False)
            assert "not what the hello offered" in err.text

    check(test)


def test_a_hello_that_does_not_fit_opens_nothing_and_says_why() -> None:
    async def test(of: Greetings) -> None:
        assert not (await of.answer("alice", "a:1", judgement(why="upper (theirs 00…, ours 01…)"))).match
        err = await refusal(of, "alice", "a:1")
        assert (err.code, err.retryable, err.text) == (Code.MISMATCH, False, "upper (theirs 00…, ours 01…)")

    check(test)


def test_an_open_waits_for_the_hello_that_came_with_it() -> None:
    async def test(of: Greetings) -> None:
        read = asyncio.Event()
        slow = asyncio.create_task(of.answer("alice", "a:1", judgement(why="other weights", until=read)))
        await asyncio.sleep(0)
        opened = asyncio.create_task(refusal(of, "alice", "a:1"))
        await asyncio.sleep(0.05)
        assert not opened.done()
        slow.cancel()  # the device has hung up: what was begun is judged all the same
        read.set()
        assert (await opened).text == "other weights"

    check(test)


def test_an_open_waits_for_a_hello_that_is_on_its_way() -> None:
    async def test(of: Greetings) -> None:
        opened = asyncio.create_task(of.check("alice", "a:1", opening(BY_ROWS)))
        await of.answer("bob", "a:1", judgement((2, BY_ROWS)))
        await of.answer("alice", "a:2", judgement((2, BY_ROWS)))
        await asyncio.sleep(0.05)
        assert not opened.done()
        await of.answer("alice", "a:1", judgement((2, BY_ROWS)))
        await opened

    check(test, within_s=30)


def test_without_a_hello_a_device_is_told_to_dial_again() -> None:
    async def test(of: Greetings) -> None:
        with pytest.raises(Refused) as refused:
            await of.check("alice", "a:1", opening(BY_ROWS))
        assert (refused.value.err.code, refused.value.err.retryable, refused.value.hangs_up) == (
            Code.MISMATCH,
            True,
            True,
        )

    check(test)


def test_the_last_hello_of_a_connection_counts_and_only_of_this_one() -> None:
    async def test(of: Greetings) -> None:
        await of.answer("alice", "a:1", judgement((2, BY_ROWS)))
        await of.answer("alice", "a:2", judgement(why="other weights"))
        await of.answer("bob", "a:1", judgement(why="other weights"))
        await of.check("alice", "a:1", opening(BY_ROWS))
        assert (await refusal(of, "alice", "a:2")).text == "other weights"
        assert (await refusal(of, "bob", "a:1")).text == "other weights"
        await of.answer("alice", "a:1", judgement(why="new weights"))
        assert (await refusal(of, "alice", "a:1")).text == "new weights"

    check(test)


def test_nobodys_hellos_push_out_those_of_another_key() -> None:
    async def test(of: Greetings) -> None:
        await of.answer("alice", "a:1", judgement(why="other weights"))
        for i in range(greetings.MOST + 9):
            await of.answer("mallory", f"m:{i}", judgement())
        assert (await refusal(of, "alice", "a:1")).text == "other weights"
        assert len(of) == greetings.MOST + 1

    check(test)


def test_the_file_of_a_device_says_its_channels() -> None:
    """What the tests above put into a hello is what `parts` reads from a half."""
    with GGUFFile.open(halves().device) as file:
        assert file.metadata.get("nearfar.codec.outlier_channels", []) == []
    assert hello().parts["codec"] == codec_part(())
