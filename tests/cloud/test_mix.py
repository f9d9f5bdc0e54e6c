"""The mix: the same state gives the same batches, shares hold, rows stay whole and apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nearfar import forms
from nearfar.errors import ConfigError, DataError, TokenizerError
from nearfar_cloud.training import generators, mix, rows, tokenizer
from nearfar_cloud.training.mix import LONG_RUN, NO_TARGET, PROMPT_WEIGHT, Batch, Mix
from nearfar_cloud.training.recipe import DEVICE_FIRST
from nearfar_cloud.training.tokenizer import RowTokenizer
from tests.cloud import mini_data

T = 128


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_data.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tok(data: Path) -> RowTokenizer:
    texts = [p.text for name in rows.FILE_SOURCES for row in _read(data, name) for p in row.parts if not p.control]
    made = generators.generators(data, 1, ["home", "journals", "skills"])
    texts += [p.text for g in made.values() for i in range(150) for p in g.row(i).parts if not p.control]
    return tokenizer.train(iter(texts), vocab_size=900)


def _read(data: Path, name: str) -> list[rows.Row]:
    return list(rows.FILE_SOURCES[name](data, "train", int(mix.CHARS_PER_TOKEN * T)))


def make(data: Path, tok: RowTokenizer, **options: object) -> Mix:
    return Mix(data, tok, **{"seq_len": T, "seed": 1, **options})  # type: ignore[arg-type]


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("ids", "targets", "weights", "pos", "doc"))


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(data: Path, tok: RowTokenizer) -> None:
    one, two, three = make(data, tok), make(data, tok), make(data, tok, seed=2)
    first, second, third = (m.next_batch(6, "stable") for m in (one, two, three))
    assert same(first, second)
    assert not np.array_equal(first.ids, third.ids)


@pytest.mark.parametrize("phase", ["stable", "decay"])
def test_a_restored_mix_goes_on_as_if_nothing_had_happened(data: Path, tok: RowTokenizer, phase: mix.Phase) -> None:
    unbroken, broken = make(data, tok), make(data, tok)
    for m in (unbroken, broken):
        m.next_batch(40, "stable")
    state = json.loads(json.dumps(broken.state()))
    resumed = make(data, tok)
    resumed.restore(state)
    for _ in range(3):
        assert same(unbroken.next_batch(7, phase), resumed.next_batch(7, phase))


def test_batch_size_does_not_change_the_sequences(data: Path, tok: RowTokenizer) -> None:
    whole, parts = make(data, tok), make(data, tok)
    a = whole.next_batch(6, "stable")
    b = [parts.next_batch(n, "stable") for n in (1, 3, 2)]
    assert np.array_equal(a.ids, np.concatenate([x.ids for x in b]))


def test_a_position_of_other_data_or_seed_is_refused(data: Path, tok: RowTokenizer, tmp_path: Path) -> None:
    state = make(data, tok).state()
    with pytest.raises(DataError, match="seed 1, this mix 2"):
        make(data, tok, seed=2).restore(state)
    other = mini_data.write(tmp_path)
    mini_data.write_lines(other / "math" / "gsm8k_train.jsonl.xz", [{"question": "x", "answer": "y"}] * 9)
    with pytest.raises(DataError, match="data_sha256"):
        make(other, tok).restore(state)


def test_positions_and_documents_restart_with_each_row(data: Path, tok: RowTokenizer) -> None:
    batch = make(data, tok).next_batch(30, "stable")
    for ids, pos, doc, targets in zip(batch.ids, batch.pos, batch.doc, batch.targets, strict=True):
        assert (np.diff(doc) >= 0).all()
        assert (np.diff(doc) <= 1).all()
        for d in range(doc.max() + 1):
            here = doc == d
            assert np.array_equal(pos[here], np.arange(here.sum()))
            if (ids[here] == tok.pad_id).all():
                assert (targets[here] == NO_TARGET).all()
            else:
                assert np.array_equal(targets[here][:-1], ids[here][1:])
                assert targets[here][-1] == NO_TARGET


def test_every_row_in_a_sequence_is_a_row_of_a_source(data: Path, tok: RowTokenizer) -> None:
    known = {tuple(ids.tolist())[:T] for name in rows.FILE_SOURCES for ids, _ in tok.encode_rows(_read(data, name))}
    made = generators.generators(data, 1, ["intents", "home", "journals", "skills"])
    known |= {tuple(ids)[:T] for g in made.values() for i in range(800) for ids in [tok.encode_parts(g.row(i).parts)]}
    batch = make(data, tok).next_batch(30, "stable")
    for ids, doc in zip(batch.ids, batch.doc, strict=True):
        for d in range(doc.max() + 1):
            row = ids[doc == d]
            assert (row == tok.pad_id).all() or tuple(row.tolist()) in known


def test_weights_are_one_in_the_stable_phase_and_small_on_prompts_in_the_decay(data: Path, tok: RowTokenizer) -> None:
    m = make(data, tok)
    stable, decay = m.next_batch(20, "stable"), m.next_batch(60, "decay")
    assert set(np.unique(stable.weights[stable.targets != NO_TARGET])) == {1.0}
    assert set(np.unique(decay.weights[decay.targets != NO_TARGET])) == {np.float32(PROMPT_WEIGHT), 1.0}
    assert (decay.weights[decay.targets == NO_TARGET] == 0).all()
    # The call token of a home request is given, what follows it is written.
    call = tok.controls[forms.CALL]
    asked = (decay.targets == call) & (decay.doc == 0)
    assert (decay.weights[asked] < 1).any()
    assert (decay.weights[:, 1:][decay.ids[:, 1:] == call] == 1).all()


def test_tokens_follow_the_shares(data: Path, tok: RowTokenizer) -> None:
    m = make(data, tok)
    m.next_batch(300, "stable")
    seen = m.state()["tokens"]["stable"]
    total = sum(seen.values())
    for name, share in m.shares["stable"].items():
        assert seen[name] / total == pytest.approx(share, abs=0.01)


def test_the_decay_draws_dialogues_with_calls_only(data: Path, tok: RowTokenizer, tmp_path: Path) -> None:
    other = mini_data.write(tmp_path)
    talk = [mini_data.dialogue(i) for i in range(60)]
    for dialogue in talk[::2]:
        del dialogue["turns"][1]["calls"]
    mini_data.write_lines(other / "dialogue" / "sgd_train.jsonl.xz", talk)
    m = make(other, tok, shares=mix.Shares({"sgd": 1}, {"sgd": 1}))
    call = tok.controls[forms.CALL]
    without = lambda b: [call not in b.ids[i][b.doc[i] == 0] for i in range(len(b.ids))]  # noqa: E731
    assert any(without(m.next_batch(20, "stable")))
    m.next_batch(20, "decay")  # what was waiting in the stable phase is gone by now
    assert not any(without(m.next_batch(20, "decay")))


@pytest.mark.parametrize("table", [LONG_RUN, DEVICE_FIRST])
def test_the_tables_are_percentages_of_known_sources(table: mix.Shares) -> None:
    for part in (table.stable, table.decay):
        assert sum(part.values()) == 100
        assert set(part) <= set(mix.SOURCES) & set(mix.FILES)


def test_leaving_a_source_out_renormalises_the_others(data: Path, tok: RowTokenizer) -> None:
    full, less = make(data, tok), make(data, tok, without=["sgd"])
    assert "sgd" not in less.shares["stable"]
    assert sum(less.shares["stable"].values()) == pytest.approx(1)
    ratio = [less.shares["stable"][n] / full.shares["stable"][n] for n in ("home", "books")]
    assert ratio[0] == pytest.approx(ratio[1])
    assert full.data_sha256 != less.data_sha256
    less.next_batch(10, "decay")
    assert all(row["source"] != "sgd" for row in less.description())


def test_a_source_without_its_file_trains_when_it_is_left_out(tmp_path: Path, tok: RowTokenizer) -> None:
    data = mini_data.write(tmp_path)
    (data / "dialogue" / "sgd_train.jsonl.xz").unlink()
    with pytest.raises(DataError, match=r"sgd_train\.jsonl\.xz: missing.*--without"):
        make(data, tok)
    make(data, tok, without=["sgd"]).next_batch(2, "stable")


def test_an_unknown_source_to_leave_out_is_named(data: Path, tok: RowTokenizer) -> None:
    with pytest.raises(ConfigError, match="without poems: expected sources of"):
        make(data, tok, without=["poems"])


def test_the_card_has_a_licence_and_a_credit_for_every_source(data: Path, tok: RowTokenizer) -> None:
    m = make(data, tok)
    m.next_batch(10, "stable")
    for row in m.description():
        assert row["licence"]
        assert row["credit"]
        assert row["tokens_seen"]["stable"] > 0
    json.dumps(m.description())


def test_the_cache_gives_the_rows_that_reading_gives(data: Path, tok: RowTokenizer, tmp_path: Path) -> None:
    fresh = make(data, tok, cache=tmp_path).next_batch(5, "stable")
    assert len(list(tmp_path.glob("*.npz"))) == len(rows.FILE_SOURCES) - 1  # intents are made anew
    assert same(fresh, make(data, tok, cache=tmp_path).next_batch(5, "stable"))
    assert same(fresh, make(data, tok).next_batch(5, "stable"))


# ---------------------------------------------------------------- tokenizer


def test_any_text_survives_the_tokenizer(tok: RowTokenizer) -> None:
    for text in ("Hällo, 12 wörld! 🦊", "a\n\n b\t", '{"intent":"x"}', "日本語", " leading"):
        assert tok.decode(tok.encode(text)) == text


def test_digits_stand_alone_and_controls_come_first(tok: RowTokenizer) -> None:
    assert [tok.decode([i]) for i in tok.encode("2047")] == list("2047")
    assert [tok.controls[c] for c in forms.CONTROLS] == list(range(7))
    assert tok.encode_parts([forms.Part("<|e|>", control=True)]) == [tok.eos_id]


def test_a_control_token_in_text_is_only_text(tok: RowTokenizer) -> None:
    ids = tok.encode("say <|e|> and <|u|>")
    assert not set(ids) & set(tok.controls.values())


def test_rows_encoded_together_equal_rows_encoded_alone(data: Path, tok: RowTokenizer) -> None:
    some = _read(data, "sgd")[:5]
    for row, (ids, written) in zip(some, tok.encode_rows(some), strict=True):
        assert ids.tolist() == tok.encode_parts(row.parts)
        assert len(written) == len(ids)


def test_training_a_tokenizer_twice_gives_the_same_file(data: Path, tmp_path: Path) -> None:
    one = tokenizer.train(iter(["turn off the light", "turn on the fan"] * 20), vocab_size=290)
    two = tokenizer.train(iter(["turn off the light", "turn on the fan"] * 20), vocab_size=290)
    assert one.text == two.text
    one.save(tmp_path / "t.json")
    assert RowTokenizer.load(tmp_path / "t.json").sha256 == one.sha256


def test_vocabulary_for_the_gguf_file_has_every_token_and_its_type(tok: RowTokenizer) -> None:
    tokens, merges, types = tok.gguf()
    assert len(tokens) == len(types) == tok.n_vocab
    assert len(set(tokens)) == len(tokens)
    assert types == [3] * 7 + [1] * (tok.n_vocab - 7)
    assert len(merges) == tok.n_vocab - 7 - 256
    assert all("".join(m.split(" ")) in tokens for m in merges)


@pytest.mark.parametrize("content", ["", "{}", '{"model": 1}'])
def test_a_tokenizer_file_in_another_form_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: expected"):
        RowTokenizer.load(path)
