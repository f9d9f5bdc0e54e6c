"""Two builds that meet for the first time are put to the test, once."""

from __future__ import annotations

from pathlib import Path
from threading import Timer

import pytest

pytest.importorskip("grpc", reason="grpcio is not installed (extra [collab])")

from nearfar import env
from nearfar.cancel import Cancel
from nearfar.collab_options import Collab
from nearfar.errors import MismatchError, UpperError, UsageError
from nearfar.halves import Halves, split
from nearfar.llm import LLM
from nearfar.lower import Lower, open_lower
from nearfar.probes import golden
from nearfar.self_test import MOST_PAIRS, SelfTest, build_of, read, remember
from nearfar.upper import LocalUpper
from nearfar.weights import Weights
from nearfar.wire.fingerprint import model_fp, parts
from nearfar.wire.golden import as_json
from nearfar.wire.messages import CodecId, CodecSpec, Mode
from tests.sdk.wire_server import Door, WireServer
from tests.tiny import write_tiny

PROMPT, N, N_TESTS = "the inn", 4, 2
ROWS, IDS = CodecSpec(CodecId.INT8_OS), CodecSpec(CodecId.IDS)


class Place:
    def __init__(self, folder: Path) -> None:
        path = write_tiny(folder / "m.gguf", exits=(1, 2), tau=0.02, n_ctx=64)
        with Weights.open(path) as whole:
            test = as_json(golden(open_lower(whole), 2, [(5, 17, 3), (99, 42)], ()))
            self.halves: Halves = split(whole, 2, folder, golden=test)
        self.upper = open_lower(Weights.open(self.halves.upper))
        self.other = open_lower(Weights.open(write_tiny(folder / "o.gguf", exits=(2,), n_ctx=64, seed=5)))
        with Weights.open(self.halves.device) as device:
            self.fingerprint = model_fp(parts(device))

    def serve(self, lower: Lower | None = None) -> WireServer:
        return WireServer(Door(lower or self.upper, fingerprint=self.fingerprint))

    def ask(self, server: WireServer, how: Collab) -> int:
        """An answer of another LLM; how many sessions it took."""
        before = server.door.n_opened
        with LLM.open(self.halves.device, upper=server.url, collab=how) as llm:
            llm.generate(PROMPT, max_tokens=N)
        return server.door.n_opened - before


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nearfar" / "self-tests"


def test_a_pair_is_tested_once_and_again_when_the_other_side_is_another_process(place: Place, cache: Path) -> None:
    with place.serve() as server:
        assert [place.ask(server, Collab(codec=ROWS)) for _ in range(2)] == [1 + N_TESTS, 1]
        assert len(read(cache)) == 1
        server.door.epoch += 1
        assert [place.ask(server, Collab(codec=ROWS)) for _ in range(2)] == [1 + N_TESTS, 1]
        assert place.ask(server, Collab(codec=CodecSpec(CodecId.FP16))) == 1 + N_TESTS  # another codec, other kernels
        assert len(read(cache)) == 3


def test_one_llm_tests_once_whatever_is_written_down(place: Place, cache: Path) -> None:
    with place.serve() as server, LLM.open(place.halves.device, upper=server.url, collab=Collab(codec=ROWS)) as llm:
        first = llm.generate(PROMPT, max_tokens=N)
        cache.unlink()
        before = server.door.n_opened
        assert llm.generate(PROMPT, max_tokens=N).ids == first.ids
        assert server.door.n_opened - before == 1


@pytest.mark.parametrize(("when", "took"), [("always", [3, 3]), ("never", [1, 1])])
def test_the_test_can_be_had_each_time_or_not_at_all(place: Place, cache: Path, when: str, took: list[int]) -> None:
    with place.serve() as server:
        how = Collab(Mode.LOSSY, ROWS, 1.0, self_test=when)  # type: ignore[arg-type]
        assert [place.ask(server, how) for _ in range(2)] == took
    assert not cache.exists()
    with pytest.raises(UsageError, match="once, always or never"):
        Collab(self_test="often")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [Mode.LOSSLESS, Mode.LOSSY])
def test_a_build_that_computes_something_else_is_refused_before_the_first_token(
    place: Place, cache: Path, mode: Mode
) -> None:
    with place.serve(place.other) as server:
        for _ in range(2):  # what failed is not remembered
            llm = LLM.open(place.halves.device, upper=server.url, collab=Collab(mode, ROWS, 1.0))
            with llm, pytest.raises(MismatchError, match="use the same version on both"):
                next(llm.stream(PROMPT, max_tokens=N))
    assert not cache.exists()


def test_the_stop_button_works_while_the_test_waits(place: Place, cache: Path) -> None:
    with place.serve() as server:
        server.door.delay_s = 30.0
        cancel = Cancel()
        with LLM.open(place.halves.device, upper=server.url, collab=Collab(codec=ROWS)) as llm:
            Timer(0.5, cancel.set).start()
            answer = llm.generate(PROMPT, max_tokens=N, cancel=cancel)
            assert (answer.ids, answer.finish_reason) == ([], "cancelled")
            assert not cache.exists()
            server.door.delay_s = 0.0
            assert len(llm.generate(PROMPT, max_tokens=N).ids) == N
    assert len(read(cache)) == 1


def test_ids_and_an_upper_side_in_this_process_need_no_test(place: Place, cache: Path) -> None:
    """By ids any model with the tokenizer may decide, and the same process is the same build."""
    with place.serve(place.other) as server:
        assert place.ask(server, Collab(codec=IDS)) == 1
    with LLM.open(place.halves.device, upper=LocalUpper(place.upper, 64), collab=Collab(codec=ROWS)) as llm:
        llm.generate(PROMPT, max_tokens=N)
    assert not cache.exists()


def test_a_test_that_could_not_be_carried_out_is_made_up_for(tmp_path: Path) -> None:
    outcomes: list[Exception | None] = [UpperError("the link is lost"), None]
    ran = []

    def test(cancel: Cancel | None) -> None:
        ran.append(1)
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    meeting = SelfTest(lambda: b"half", test, path=tmp_path / "tests")
    for _ in range(3):
        meeting(7)
    assert len(ran) == 2
    SelfTest(lambda: b"half", test, path=tmp_path / "tests")(7)
    assert len(ran) == 2
    outcomes.append(None)
    SelfTest(lambda: b"another half", test, path=tmp_path / "tests")(7)
    assert len(ran) == 3


def test_what_is_remembered_is_bounded_and_damage_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "tests"
    assert read(path) == []
    pairs = [f"{i:032x}" for i in range(MOST_PAIRS + 5)]
    for pair in pairs:
        remember(path, pair)
    assert read(path) == pairs[-MOST_PAIRS:]
    path.write_bytes(b"\xff\x00nonsense\n" + f"{pairs[0]}\n{pairs[1][:-1]}".encode() + b"x" * 1_000_000)
    assert read(path) == [pairs[0]]
    blocked = tmp_path / "file"
    blocked.write_text("")
    remember(blocked / "tests", pairs[0])  # no folder, no memory, no error
    assert read(blocked / "tests") == []


def test_builds_differ_by_engine_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEARFAR_ISA", raising=False)
    plain = build_of("native")
    assert build_of("numpy") != plain
    monkeypatch.setenv("NEARFAR_ISA", env.ISA_NAMES[0])
    assert build_of("native") != plain
