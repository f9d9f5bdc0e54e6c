"""Intent rows: the same i is the same row, values stay spans, every request comes round, originals among them."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from nearfar import forms
from nearfar_cloud.training import intents, rows
from nearfar_cloud.training.intents import CYCLE, IntentGenerator, drop_word, restyle
from nearfar_cloud.training.rows import Labelled
from tests.cloud import mini_data
from tests.paths import SHARED, needs_shared


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_data.write(tmp_path_factory.mktemp("data"))


def test_row_i_is_the_same_row_in_whatever_order_rows_are_asked_for(data: Path) -> None:
    one, two = IntentGenerator(data, 1), IntentGenerator(data, 1)
    forward = [one.row(i) for i in range(300)]
    assert [two.row(i) for i in reversed(range(300))] == forward[::-1]
    assert [IntentGenerator(data, 2).row(i) for i in range(300)] != forward


def test_the_sets_take_turns_and_every_request_of_a_set_comes_once_in_an_epoch(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intents, "AS_WRITTEN", 1.0)
    g = IntentGenerator(data, 1)
    requests = [request.text for request in g.requests["hwu64"]]
    made = [g.row(i) for i in range(len(requests) * len(CYCLE))]
    assert Counter(row.parts[1].text for row in made[: len(CYCLE)]) == Counter(CYCLE)
    ours = [row.parts[3].text.strip() for row in made if row.parts[1].text == "hwu64"]
    epochs = [ours[i : i + len(requests)] for i in range(0, 2 * len(requests), len(requests))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(requests)
    assert epochs[0] != epochs[1]


def test_a_swapped_value_is_a_span_of_the_new_text(data: Path) -> None:
    g = IntentGenerator(data, 1)
    request = Labelled(
        "snips", "play Blue Moon by Ann Lee", "PlayMusic", (("track", "Blue Moon"), ("artist", "Ann Lee"))
    )
    g.values["snips", "track"] += ["Red Sun"]
    g.values["snips", "artist"] += ["Bo Diaz"]
    changed = {g.swap(request, random.Random(i)) for i in range(60)}
    assert len(changed) > 20
    for new in changed:
        assert new.intent == "PlayMusic"
        assert [kind for kind, _ in new.slots] == ["track", "artist"]
        assert all(value in new.text for _, value in new.slots)
        assert new.text.startswith("play ")


def test_a_value_that_occurs_twice_stays(data: Path) -> None:
    request = Labelled("snips", "play home by home", "PlayMusic", (("track", "home"),))
    assert all(IntentGenerator(data, 1).swap(request, random.Random(i)) == request for i in range(30))


def test_changes_keep_values_in_the_text() -> None:
    request = Labelled("hwu64", "Wake me at Six in the Hall please.", "alarm_set", (("time", "Six"), ("place", "Hall")))
    seen = set()
    for i in range(200):
        rng = random.Random(i)
        new = restyle(drop_word(request, rng), rng)
        seen.add(new.text)
        assert all(value in new.text for _, value in new.slots)
    assert len(seen) > 8
    assert any(len(text.split()) == 7 for text in seen)


@needs_shared
def test_slots_of_changed_requests_are_spans_of_their_text() -> None:
    g, checked, written = IntentGenerator(SHARED, 1), 0, 0
    originals = {request.text for request in rows.labelled(SHARED)}
    for i in range(20_000):
        row = g.row(i)
        written += row.parts[3].text.strip() in originals
        if row.parts[1].text == "snips":
            for value in json.loads(row.parts[5].text)["slots"].values():
                for span in value if isinstance(value, list) else [value]:
                    checked += 1
                    assert forms.neutral(span.strip()) in row.parts[3].text
    assert checked > 10_000
    assert 0.3 < written / 20_000 < 0.8
