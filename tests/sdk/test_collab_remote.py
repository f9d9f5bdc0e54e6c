"""A shared answer over a real socket, and over bad links."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="grpcio is not installed (extra [collab])")

from nearfar.chaos.profiles import Profile
from nearfar.chaos.proxy import running
from nearfar.chaos.schedule import Fault
from nearfar.collab_options import Collab
from nearfar.engine import Engine
from nearfar.errors import EgressDenied, MismatchError, UpperError, UsageError
from nearfar.halves import split
from nearfar.llm import LLM
from nearfar.lower import Lower, open_lower
from nearfar.lower_composed import Composed
from nearfar.sampling import Sampling
from nearfar.sequence import Notice
from nearfar.weights import Weights
from nearfar.wire.codec import Codec
from nearfar.wire.egress import Policy
from nearfar.wire.fingerprint import model_fp, parts
from nearfar.wire.messages import CodecId, CodecSpec, Ids, Mode, Open, Rows
from tests.sdk.wire_server import Door, WireServer, wait_for
from tests.tiny import write_tiny

PROMPT, N = "the inn and the old", 24
WARM = Sampling(temperature=1.0, seed=5)
INT8, IDS = CodecSpec(CodecId.INT8_OS), CodecSpec(CodecId.IDS)
FAST = Profile("fast", 1e9, 1)


class Place:
    """Two servers, of the upper half and of the whole model, and the files of a device."""

    def __init__(self, folder: Path) -> None:
        promise: dict[str, object] = {"nearfar.calibration.delta": 0.02}
        self.path = write_tiny(folder / "m.gguf", "llama", "F32", exits=(1, 2), tau=0.02, n_ctx=256, extra=promise)
        whole = Weights.open(self.path)
        halves = split(whole, 2, folder)
        self.device, self.upper_file = halves.device, halves.upper
        self.whole, self.upper = open_lower(whole), open_lower(Weights.open(halves.upper))
        self.servers = {}
        for file, lower, codec in ((halves.device, self.upper, INT8), (halves.device, self.whole, IDS)):
            with Weights.open(file) as weights:
                fingerprint = model_fp(parts(weights))
            self.servers[codec.id] = WireServer(Door(lower, fingerprint=fingerprint))

    def oracle(self, codec: CodecSpec, sampling: Sampling, n: int = N, prompt: str = PROMPT) -> list[int]:
        lower: Lower = self.whole
        with LLM.open(self.device) as llm:
            assert isinstance(llm.stepper, Engine)
            if codec.id != CodecId.IDS:
                round_trip = Codec.of(codec, self.whole.config.d_model).round_trip
                lower = Composed(llm.stepper.lower, self.upper, 2, round_trip)
            alone = LLM(Engine(lower, 256), llm.tokenizer, llm.metadata, max_len=256, backend="composed")
            return alone.generate(prompt, max_tokens=n, sampling=sampling, exits=False).ids


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("place"))
    with place.servers[CodecId.INT8_OS], place.servers[CodecId.IDS]:
        yield place


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("codec", [INT8, IDS], ids=lambda c: c.id.name)
@pytest.mark.parametrize("mode", [Mode.LOSSLESS, Mode.LOSSY])
def test_an_answer_over_a_socket_is_the_oracles(place: Place, mode: Mode, codec: CodecSpec, sampling: Sampling) -> None:
    how = Collab(mode, codec, 1.0 if mode == Mode.LOSSY else 0.01)
    with LLM.open(place.device, upper=place.servers[codec.id].url, collab=how) as llm:
        answers = [llm.generate(PROMPT, max_tokens=N, sampling=sampling) for _ in range(2)]
    assert [a.ids for a in answers] == [place.oracle(codec, sampling)] * 2
    shared = answers[0].stats.shared
    assert shared is not None
    assert shared.asks > 0
    assert shared.bytes_up > (0 if codec is IDS else 250 * N)
    assert {e.where for e in answers[0].events} == {"cloud"}


def test_a_calibrated_half_is_held_to_its_promise(place: Place) -> None:
    notices: list[Notice] = []
    with LLM.open(place.device, upper=place.servers[CodecId.INT8_OS].url, collab=Collab(Mode.LOSSLESS, INT8)) as llm:
        for seed in range(8):
            stream = llm.stream(
                PROMPT, max_tokens=8, sampling=Sampling(temperature=1.0, seed=seed), on_notice=notices.append
            )
            list(stream)
    shared = stream.completion.stats.shared
    assert shared is not None
    assert shared.alarm
    assert notices.count(Notice("alarm")) == 1


def test_audits_are_counted_as_what_they_are(place: Place) -> None:
    server = place.servers[CodecId.INT8_OS]
    answers = {}
    for audit in (0.0, 1.0):
        n_opened = server.door.n_opened
        with LLM.open(place.device, upper=server.url, collab=Collab(Mode.LOSSY, INT8, audit=audit)) as llm:
            stream = llm.stream(PROMPT, max_tokens=N)
            for _ in stream:  # a device that is sure of everything would be done before the server has opened
                wait_for(lambda n=n_opened: server.door.n_opened > n)
                time.sleep(0.01)
            answers[audit] = stream.completion
    assert answers[1.0].ids == answers[0.0].ids
    plain, audited = (answers[a].stats.shared for a in (0.0, 1.0))
    assert plain is not None
    assert audited is not None
    assert (plain.audits, plain.audit_bytes) == (0, 0)
    assert 0 < audited.audits <= audited.asks
    assert 0 < audited.audit_bytes < audited.bytes_up + audited.bytes_down


def test_the_plain_words_of_open_say_the_same(place: Place) -> None:
    url = place.servers[CodecId.IDS].url
    with LLM.open(place.device, upper=url, mode="lossless", rows="ids") as llm:
        assert llm.generate(PROMPT, max_tokens=N).ids == place.oracle(IDS, Sampling())
    with LLM.open(place.device, upper=url, mode="cloud-only") as llm:
        assert llm.generate(PROMPT, max_tokens=N).ids == place.oracle(IDS, Sampling())


@pytest.mark.parametrize("codec", [INT8, IDS], ids=lambda c: c.id.name)
def test_resets_in_the_middle_of_an_answer_change_no_token(place: Place, codec: CodecSpec) -> None:
    server = place.servers[codec.id]
    with running(("127.0.0.1", server.port), FAST) as link:
        url = f"grpc://{link.address[0]}:{link.address[1]}"
        with LLM.open(place.device, upper=url, collab=Collab(Mode.LOSSLESS, codec, 0.01)) as llm:
            ids = []
            for event in llm.stream(PROMPT, max_tokens=N, sampling=WARM):
                ids.append(event.id)
                if len(ids) % 8 == 4:
                    link.inject(Fault(0.0, "reset"))
    assert ids == place.oracle(codec, WARM)


@pytest.mark.parametrize("policy", [Policy(), Policy(ids_ok=False)], ids=["ids allowed", "rows only"])
def test_rows_that_a_thin_link_does_not_carry_give_way_to_ids_if_these_may_leave(place: Place, policy: Policy) -> None:
    """About 60 kB of rows at 25 kB/s; the server of the whole model takes both."""
    server, prompt, notices = place.servers[CodecId.IDS], " ".join([PROMPT] * 12), list[Notice]()
    n_seen = len(server.door.seen)
    how = Collab(Mode.LOSSY, INT8, 1.0, backlog="ids")
    with (
        running(("127.0.0.1", server.port), Profile("thin", 2e5, 20)) as link,
        LLM.open(place.device, upper=f"grpc://127.0.0.1:{link.address[1]}", collab=how, policy=policy) as llm,
    ):
        stream = llm.stream(prompt, max_tokens=8, on_notice=notices.append)
        tokens = [event.id for event in stream]
        n_prompt = stream.completion.stats.n_prompt
    assert n_prompt > 150
    oracle = place.oracle(IDS if policy.ids_ok else INT8, Sampling(), 8, prompt)
    assert tokens == oracle
    assert any(isinstance(m, Ids) for m in server.door.seen[n_seen:]) == policy.ids_ok
    assert notices.count(Notice("mode_changed")) == policy.ids_ok


def test_a_server_that_is_killed_and_started_again_gets_everything_again(place: Place) -> None:
    server = place.servers[CodecId.INT8_OS]
    with LLM.open(place.device, upper=server.url, collab=Collab(Mode.LOSSLESS, INT8, 0.01)) as llm:
        told: list[Notice] = []
        stream = llm.stream(PROMPT, max_tokens=N, sampling=WARM, on_notice=told.append)
        ids = [next(stream).id for _ in range(6)]
        server.stop()
        server.start()
        ids += [event.id for event in stream]
    assert ids == place.oracle(INT8, WARM)
    shared = stream.completion.stats.shared
    assert shared is not None
    assert shared.reopened >= 1
    assert {"degraded", "back"} <= {notice.kind for notice in told}


@pytest.mark.parametrize("codec", [INT8, IDS], ids=lambda c: c.id.name)
@pytest.mark.parametrize("event", ["nothing", "restart", "reset"])
def test_the_next_turn_sends_only_what_is_new_and_says_what_a_new_session_would(
    place: Place, codec: CodecSpec, event: str
) -> None:
    server = place.servers[codec.id]
    turns = [PROMPT + " road" * n for n in (0, 8, 16, 12)]  # the last one takes something back
    with running(("127.0.0.1", server.port), FAST) as link:
        url = f"grpc://{link.address[0]}:{link.address[1]}"
        with LLM.open(place.device, upper=url, collab=Collab(Mode.LOSSLESS, codec, 0.01, keep_s=60)) as llm:
            for turn in turns:
                server.door.seen.clear()
                answer = llm.generate(turn, max_tokens=N)
                assert answer.ids == place.oracle(codec, Sampling(), prompt=turn)
                first = min(m.pos0 for m in server.door.seen if isinstance(m, Rows | Ids))
                assert (first > 0) == (event != "restart" and turn != turns[0])
                assert sum(isinstance(m, Open) for m in server.door.seen) == 1
                if event == "restart":
                    server.stop()
                    server.door.sessions.clear()
                    server.start()
                elif event == "reset":
                    link.inject(Fault(0.0, "reset"))


def test_a_turn_with_a_journal_begins_a_session_of_which_the_journal_knows_everything(
    place: Place, tmp_path: Path
) -> None:
    server = place.servers[CodecId.IDS]
    with LLM.open(place.device, upper=server.url, collab=Collab(Mode.LOSSLESS, IDS, 0.01, keep_s=60)) as llm:
        llm.generate(PROMPT, max_tokens=N)
        server.door.seen.clear()
        ids = [event.id for event in llm.stream(PROMPT + " road", max_tokens=N, journal=tmp_path / "answer")]
        assert ids == place.oracle(IDS, Sampling(), prompt=PROMPT + " road")
        assert min(m.pos0 for m in server.door.seen if isinstance(m, Ids)) == 0


def test_a_turn_with_other_settings_begins_another_session(place: Place) -> None:
    server = place.servers[CodecId.INT8_OS]
    with LLM.open(place.device, upper=server.url, collab=Collab(Mode.LOSSLESS, INT8, 0.01, keep_s=60)) as llm:
        assert llm.generate(PROMPT, max_tokens=N).ids == place.oracle(INT8, Sampling())
        server.door.seen.clear()
        assert llm.generate(PROMPT, max_tokens=N, sampling=WARM).ids == place.oracle(INT8, WARM)
        assert min(m.pos0 for m in server.door.seen if isinstance(m, Rows)) == 0


def test_a_device_that_may_finishes_without_any_server(place: Place) -> None:
    how = Collab(Mode.LOSSLESS, INT8, 1.0, lost="finish")
    with LLM.open(place.device, upper="grpc://127.0.0.1:9", collab=how) as llm, LLM.open(place.device) as alone:
        answer = llm.generate(PROMPT, max_tokens=N)
        assert answer.ids == alone.generate(PROMPT, max_tokens=N, exits=False).ids
    assert {e.where for e in answer.events} == {"device"}


def test_without_a_server_the_error_says_who_is_out_of_reach(place: Place) -> None:
    with LLM.open(place.device, upper="grpc://127.0.0.1:9") as llm, pytest.raises(UpperError, match=r"127\.0\.0\.1"):
        llm.generate(PROMPT, max_tokens=2)


def test_another_model_is_refused_before_a_row_leaves(place: Place, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "o.gguf", "llama", "F32", seed=9, exits=(1, 2), n_ctx=256)
    with Weights.open(other) as whole:
        halves = split(whole, 2, tmp_path)
    with LLM.open(halves.device, upper=place.servers[CodecId.INT8_OS].url) as llm, pytest.raises(MismatchError):
        llm.generate(PROMPT, max_tokens=2)


def test_local_only_opens_no_link_and_options_without_an_upper_side_are_refused(place: Place) -> None:
    with pytest.raises(EgressDenied, match="local_only"):
        LLM.open(place.device, upper=place.servers[CodecId.INT8_OS].url, policy=Policy(local_only=True))
    with pytest.raises(UsageError, match="expected upper too"):
        LLM.open(place.device, policy=Policy(local_only=True))
    with LLM.open(place.device) as llm, pytest.raises(UsageError, match="a journal belongs to"):
        llm.stream(PROMPT, journal="answer")


@pytest.mark.parametrize("codec", [INT8, IDS], ids=lambda c: c.id.name)
def test_a_full_context_ends_the_answer_where_it_ends_for_the_oracle(place: Place, codec: CodecSpec) -> None:
    how = Collab(Mode.LOSSLESS, codec, 0.01)
    n_ctx = 40
    with LLM.open(place.device, upper=place.servers[codec.id].url, collab=how, n_ctx=n_ctx) as llm:
        answer = llm.generate(PROMPT, max_tokens=200)
        assert answer.finish_reason == "length"
        assert len(answer.ids) == n_ctx - answer.stats.n_prompt + 1
        assert answer.ids == place.oracle(codec, Sampling(), len(answer.ids))
