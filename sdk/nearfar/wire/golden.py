"""The self-test of a split model: short prompts, and the token that the two halves together say after each.

    nearfar.golden  =  [{"ids": [12, 7, 301], "token": 44}, ...]     JSON, in the device half

Fingerprints tell whether the files belong together, this tells whether the machines do: it goes the real way once, with
codec and network, and finds a kernel or a build that computes something else.  Ground floor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nearfar.errors import MismatchError, WeightsError

N_GOLDEN = 4
MOST_GOLDEN, LONGEST_GOLDEN = 64, 4096  # prompts of a file, ids of a prompt: what a reader takes


@dataclass(frozen=True, slots=True)
class Golden:
    """A prompt, and the likeliest token behind it."""

    ids: tuple[int, ...]
    token: int


def golden_prompts(metadata: Mapping[str, Any], n_vocab: int) -> tuple[Golden, ...]:
    """What `nearfar split` left in a device half; nothing in other files.  Raises WeightsError."""
    text = metadata.get("nearfar.golden", "[]")
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or len(found) > MOST_GOLDEN or not all(_is_golden(g, n_vocab) for g in found):
        raise WeightsError(
            f"nearfar.golden={str(text)[:40]!r}: expected a list of prompts, each with ids and the token behind them, "
            f"all of 0..{n_vocab - 1}; split the model again"
        )
    return tuple(Golden(tuple(g["ids"]), g["token"]) for g in found)


def as_json(golden: Sequence[Golden]) -> str:
    """The value of the key."""
    return json.dumps([{"ids": list(g.ids), "token": g.token} for g in golden])


def check_golden(golden: Sequence[Golden], next_token: Callable[[Sequence[int]], int]) -> None:
    """Ask `next_token(ids)` for each prompt, greedily.  Raises MismatchError where another token comes."""
    wrong = [i for i, g in enumerate(golden, 1) if next_token(g.ids) != g.token]
    if wrong:
        raise MismatchError(
            f"self-test: {len(wrong)} of {len(golden)} prompts (number {', '.join(map(str, wrong))}) go on with "
            "another token than when the model was split, so one of the two machines computes something else: use the "
            "same version on both, and NEARFAR_ISA=ref to see whether a kernel is at fault"
        )


def _is_golden(g: Any, n_vocab: int) -> bool:
    if not isinstance(g, dict) or g.keys() != {"ids", "token"} or not isinstance(g["ids"], list):
        return False
    return 0 < len(g["ids"]) <= LONGEST_GOLDEN and all(
        type(i) is int and 0 <= i < n_vocab for i in [*g["ids"], g["token"]]
    )
