"""Intent rows without end: the requests of HWU64, SNIPS and CLINC150, a little different each time they come round.

A model of this size learns ten thousand requests by heart before it learns what they have in common.  So a request is
seen as written only some of the time; otherwise its values are others of the same type (or names that nobody has, which
teaches copying instead of recalling), a word is missing, or case and last mark change.  Values stay spans of the text.
`IntentGenerator(data, seed).row(i)` is a pure function of seed and i.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from pathlib import Path

from nearfar_cloud.training import lexicon
from nearfar_cloud.training.held_out import test_texts, text_hash
from nearfar_cloud.training.lexicon import listed
from nearfar_cloud.training.rows import Labelled, Row, labelled

# Twelve rows at a time: HWU64 has the fewest rows for its labels, SNIPS the longest answers.
_FOUR_ROWS = ("hwu64", "clinc150", "hwu64", "snips")
CYCLE = (*_FOUR_ROWS, *_FOUR_ROWS, "clinc150", "hwu64", "snips", "clinc150")
AS_WRITTEN = 0.3
SWAPPED = 0.6  # of the values in a changed request
INVENTED = 0.35  # of the new values of a slot that holds names
DROPPED_WORD = 0.1  # of the changed requests lack one word
NAMED_SLOTS = listed(
    "artist|name|person|playlist|album|track|song|place|city|state|restaurant|poi|podcast|radio|entity|movie|game|"
    "business|device|list"
)  # a slot whose type contains one of these holds a name


class IntentGenerator:
    """`row(i)` for every i.  DataError when a file is missing or malformed."""

    def __init__(self, data: Path, seed: int) -> None:
        self.seed, self.known = seed, test_texts(data)
        self.requests: defaultdict[str, list[Labelled]] = defaultdict(list)
        self.values: defaultdict[tuple[str, str], list[str]] = defaultdict(list)  # (set, type) -> values seen
        for request in labelled(data):
            self.requests[request.space].append(request)
            for kind, value in request.slots:
                self.values[request.space, kind].append(value)
        self.sizes = {space: CYCLE.count(space) for space in CYCLE}
        self.orders: dict[str, tuple[int, list[int]]] = {}  # set -> (epoch, its order)

    def row(self, i: int) -> Row:
        """The i-th row."""
        request, rng = self._request(i), random.Random(f"intents {self.seed} {i}")
        if rng.random() >= AS_WRITTEN:
            changed = restyle(drop_word(self.swap(request, rng), rng), rng)
            # A value put elsewhere may make a sentence that somebody tests with.
            if text_hash(changed.text) not in self.known:
                request = changed
        return Row("intents", request.parts())

    def _request(self, i: int) -> Labelled:
        """Each set in its own order, anew in every epoch."""
        turn, place = divmod(i, len(CYCLE))
        space = CYCLE[place]
        n = turn * self.sizes[space] + CYCLE[:place].count(space)
        epoch, at = divmod(n, len(self.requests[space]))
        if self.orders.get(space, (-1,))[0] != epoch:
            order = list(range(len(self.requests[space])))
            random.Random(f"{space} {self.seed} {epoch}").shuffle(order)
            self.orders[space] = epoch, order
        return self.requests[space][self.orders[space][1][at]]

    def swap(self, request: Labelled, rng: random.Random) -> Labelled:
        """The same request about other things: new values for some of those that occur once in the text."""
        text, slots = request.text, []
        for kind, value in request.slots:
            pattern = rf"(?<!\w){re.escape(value)}(?!\w)"
            if value and len(re.findall(pattern, text)) == 1 and rng.random() < SWAPPED:
                new = self._value(request.space, kind, value, rng)
                new = new.lower() if request.text.islower() else new
                text = re.sub(pattern, lambda _, new=new: new, text)  # type: ignore[misc]
                value = new
            slots.append((kind, value))
        changed = Labelled(request.space, text, request.intent, tuple(slots))
        return changed if all(value in text for _, value in slots) else request

    def _value(self, space: str, kind: str, value: str, rng: random.Random) -> str:
        named = any(word in kind for word in NAMED_SLOTS) and not value.isdigit()
        if not named or rng.random() >= INVENTED:
            return rng.choice(self.values[space, kind])
        new = lexicon.invented_name(rng)
        return new.title() if value[:1].isupper() else new


def drop_word(request: Labelled, rng: random.Random) -> Labelled:
    """Now and then without one of the words that belong to no value."""
    words = request.text.split(" ")
    taken = {word for _, value in request.slots for word in value.split()}
    spare = [i for i, word in enumerate(words) if word not in taken]
    if len(words) < 5 or not spare or rng.random() >= DROPPED_WORD:
        return request
    gone = rng.choice(spare)
    text = " ".join(word for i, word in enumerate(words) if i != gone)
    changed = Labelled(request.space, text, request.intent, request.slots)
    return changed if all(value in text for _, value in request.slots) else request


def restyle(request: Labelled, rng: random.Random) -> Labelled:
    """The same request in another case, with or without its last mark; values change with the text."""
    text, slots, roll = request.text, request.slots, rng.random()
    if roll < 0.35:
        text, slots = text.lower(), tuple((kind, value.lower()) for kind, value in slots)
    elif roll < 0.5 and not any(text.startswith(value) for _, value in slots):
        text = text[:1].upper() + text[1:]
    ended = text.rstrip(".?! ") + rng.choice(("", "", ".", "?", "!"))
    if rng.random() < 0.4 and all(value in ended for _, value in slots):
        text = ended
    return Labelled(request.space, text, request.intent, slots)
